"""Directories that event files are made in, and those that cannot be used."""

from pathlib import Path

import pytest

from torchprobe.writers.event_file import EventFileWriter


def test_a_missing_directory_is_made(tmp_path):
    writer = EventFileWriter(str(tmp_path / "a" / "b"))
    writer.close()
    assert writer.path.parent == tmp_path / "a" / "b"


@pytest.mark.parametrize("below", ["", "deeper/still"])
def test_a_file_in_the_way_is_named(tmp_path, below):
    obstacle = tmp_path / "taken"
    obstacle.touch()
    message = rf"log_dir='{obstacle / below}': '{obstacle}' is a file, not a directory: pass another log_dir"
    with pytest.raises(OSError, match=message):
        EventFileWriter(obstacle / below)


def test_a_directory_without_permission_is_named_with_the_reason(tmp_path, monkeypatch):
    def refuse(*arguments, **options):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", refuse)
    message = r"log_dir='.*': cannot write there \(Permission denied\): pass a directory"
    with pytest.raises(PermissionError, match=message):
        EventFileWriter(tmp_path)


def test_a_full_disk_is_reported_at_the_call(tmp_path, full_disk):
    with full_disk(0), pytest.raises(OSError, match=r"log_dir='.*File too large.*free space"):
        EventFileWriter(tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("log_dir", [None, 3, b"runs"])
def test_what_is_no_path_is_refused(log_dir):
    with pytest.raises(TypeError, match=rf"log_dir={log_dir!r} is a {type(log_dir).__name__}: pass the path"):
        EventFileWriter(log_dir)
