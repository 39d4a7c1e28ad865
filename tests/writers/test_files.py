import errno

import pytest

from torchprobe.writers.files import AppendFile


class FailingDisk:
    """A raw file that takes three bytes of a write, then has no space, and maybe cannot shrink either."""

    closed = False

    def __init__(self, raw, *, can_truncate):
        self.raw, self.can_truncate, self.taken = raw, can_truncate, False

    def write(self, data):
        if self.taken:
            raise OSError(errno.ENOSPC, "No space left on device")
        self.taken = True
        return self.raw.write(data[:3])

    def truncate(self, size):
        if not self.can_truncate:
            raise OSError(errno.EIO, "Input/output error")
        return self.raw.truncate(size)

    def seek(self, offset):
        return self.raw.seek(offset)

    def close(self):
        self.closed = True
        self.raw.close()


@pytest.fixture
def file(tmp_path):
    file = AppendFile(tmp_path / "data", "xb")
    yield file
    file.close()


def test_what_was_appended_is_on_disk_at_once(file):
    file.append(b"one")
    file.append(b"two")
    assert file.path.read_bytes() == b"onetwo"


def test_an_append_that_does_not_fit_leaves_the_file_as_it_was(file, full_disk):
    file.append(b"good")
    with full_disk(100_000), pytest.raises(OSError, match="File too large"):
        file.append(b"x" * 200_000)
    assert file.path.read_bytes() == b"good"


def test_the_same_piece_fits_once_there_is_space_again(file, full_disk):
    file.append(b"good")
    with full_disk(100_000), pytest.raises(OSError, match="File too large"):
        file.append(b"x" * 200_000)
    file.append(b"x" * 200_000)
    assert file.path.read_bytes() == b"good" + b"x" * 200_000


def test_no_space_is_reported_and_rolled_back(file, monkeypatch):
    file.append(b"good")
    monkeypatch.setattr(file, "_raw", FailingDisk(file._raw, can_truncate=True))
    with pytest.raises(OSError, match="No space left"):
        file.append(b"lost bytes")
    assert file.path.read_bytes() == b"good"
    assert file.fault() is None


def test_a_file_that_cannot_shrink_is_given_up_so_that_nothing_follows_its_torn_tail(file, monkeypatch):
    monkeypatch.setattr(file, "_raw", FailingDisk(file._raw, can_truncate=False))
    with pytest.raises(OSError, match="No space left"):
        file.append(b"lost bytes")
    assert file.path.read_bytes() == b"los"
    assert file.fault() is not None


def test_a_deleted_file_is_not_in_place(file):
    assert file.fault() is None
    file.path.unlink()
    assert file.fault() is not None


def test_a_renamed_file_is_not_in_place(file):
    file.path.rename(file.path.with_suffix(".old"))
    assert file.fault() is not None


def test_exclusive_mode_refuses_a_file_that_exists(file):
    with pytest.raises(FileExistsError):
        AppendFile(file.path, "xb")


def test_append_mode_goes_on_at_the_end(file):
    file.append(b"old")
    again = AppendFile(file.path, "ab")
    again.append(b"new")
    again.close()
    assert file.path.read_bytes() == b"oldnew"
