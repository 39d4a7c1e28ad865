"""Damaged, foreign and hostile files."""

from __future__ import annotations

import logging
import pickle

import pytest
import torch

from tests.checkpoint.run import Run, names
from torchprobe import CheckpointManager


def test_a_step_saved_twice_is_there_once(manager):
    run = Run()
    manager.save_checkpoint(*run.parts, 0, 1, {"val_loss": 1.0})
    manager.save_checkpoint(*run.parts, 0, 1, {"val_loss": 2.0})
    assert names(manager) == ["step_0000000001.pt"]
    assert manager.load_latest()["metrics"] == {"val_loss": 2.0}


def damage(path, how):
    data = bytearray(path.read_bytes())
    if how == "truncated":
        path.write_bytes(data[: len(data) // 2])
    elif how == "empty":
        path.write_bytes(b"")
    elif how == "text":
        path.write_text("not a checkpoint")
    else:  # one bit, in the middle of the weights
        at = data.index(b"PK\x03\x04", len(data) // 3) - 64
        data[at] ^= 1
        path.write_bytes(data)


@pytest.mark.parametrize("how", ["truncated", "empty", "text", "one bit"])
def test_a_damaged_file_is_skipped_with_a_warning_and_the_one_before_is_loaded(manager, how, caplog):
    run = Run()
    for step in (1, 2):
        run.train(1)
        manager.save_checkpoint(*run.parts, 0, step, {})
    damage(manager.directory / "step_0000000002.pt", how)
    with caplog.at_level(logging.WARNING, "torchprobe"):
        assert manager.restore(*run.parts)["step"] == 1
        assert manager.load_latest()["step"] == 1
    assert "step_0000000002.pt is damaged and skipped" in caplog.text


def test_when_all_are_damaged_the_run_does_not_silently_begin_anew(manager):
    run = Run()
    manager.save_checkpoint(*run.parts, 0, 1, {})
    damage(manager.directory / "step_0000000001.pt", "truncated")
    for load in (manager.load_latest, lambda: manager.restore(*run.parts)):
        with pytest.raises(RuntimeError, match=r"all 1 checkpoints in .* are damaged: step_0000000001.pt"):
            load()


def test_every_damaged_checkpoint_is_named_newest_first(manager):
    run = Run()
    for step, how in enumerate(["empty", "text", "truncated"], 1):
        manager.save_checkpoint(*run.parts, 0, step, {"val_loss": 1.0 / step})
        damage(manager.directory / f"step_{step:010d}.best.pt", how)
        manager = CheckpointManager(manager.directory)
    names = r"step_0000000003.best.pt \(damaged\), step_0000000002.best.pt \(damaged\), step_0000000001.best.pt"
    for load in (manager.load_latest, manager.load_best, lambda: manager.restore(*run.parts, which="best")):
        with pytest.raises(RuntimeError, match=f"all 3 .* are damaged: {names}"):
            load()


def test_a_run_whose_best_is_damaged_goes_on_saving(manager):
    run = Run()
    manager.save_checkpoint(*run.parts, 0, 1, {"val_loss": 1.0})
    damage(manager.directory / "step_0000000001.best.pt", "truncated")
    manager = CheckpointManager(manager.directory)
    manager.save_checkpoint(*run.parts, 0, 2, {"val_loss": 2.0})
    assert manager.load_best()["step"] == manager.load_latest()["step"] == 2


def test_where_nothing_was_saved_there_is_nothing(manager, tmp_path):
    run = Run()
    (manager.directory / "notes.txt").write_text("mine")
    (manager.directory / "step_12.pt").write_text("not one of ours by its name")
    other = CheckpointManager(tmp_path / "other")
    other.directory.rmdir()
    for one in (manager, other):
        assert one.load_latest() is None
        assert one.load_best() is None
        assert one.restore(*run.parts) is None


def test_a_foreign_file_of_that_name_is_skipped_and_does_not_count_as_none(manager):
    for saved in (False, True):
        path = manager.directory / "step_0000000009.pt"
        path.unlink(missing_ok=True)
        if saved:
            manager.save_checkpoint(*Run().parts, 0, 1, {})
        torch.save({"weights": torch.ones(1)}, path)
        if saved:
            assert manager.load_latest()["step"] == 1
        else:
            with pytest.raises(RuntimeError, match=r"step_0000000009\.pt"):
                manager.load_latest()


@pytest.mark.parametrize("damaged", ["empty folder", "no index", "broken index"])
def test_a_damaged_folder_of_tensors_is_skipped(manager, damaged, caplog):
    run = Run()
    manager.save_checkpoint(*run.parts, 0, 1, {})
    folder = manager.directory / "step_0000000002.sharded"
    folder.mkdir()
    if damaged != "empty folder":
        torch.save({"step": 2}, folder / "rest.pt")
    if damaged == "broken index":
        (folder / ".metadata").write_bytes(b"no pickle")
    assert manager.restore(*run.parts)["step"] == 1
    assert manager.load_latest()["step"] == 1
    assert "step_0000000002.sharded is damaged and skipped" in caplog.text


# ---- what would run code


class Evil:
    def __reduce__(self):
        return (print, ("it ran",))


class Harmless:
    pass


def bare(value, path):
    path.write_bytes(pickle.dumps(value))


@pytest.mark.parametrize(
    ("save", "value", "named"),
    [
        (torch.save, Evil(), "print"),
        (torch.save, {"model": {}, "extras": Harmless()}, "Harmless"),
        (bare, Evil(), "a bare pickle"),
        (bare, {"model": {}}, "a bare pickle"),
    ],
)
def test_a_pickle_is_refused_and_nobody_advises_to_load_it(manager, save, value, named, caplog, capsys):
    path = manager.directory / "step_0000000009.pt"
    save(value, path)
    for load in (manager.load_latest, lambda: manager.restore(*Run().parts)):
        with pytest.raises(RuntimeError, match=r"all 1 checkpoints in .* are refused: step_0000000009.pt") as raised:
            load()
        assert "weights_only" not in str(raised.value)
    assert capsys.readouterr().out == ""
    said = [message for message in caplog.messages if "step_0000000009.pt" in message]
    assert len(said) == 2
    assert all("is refused and skipped" in message and named in message for message in said)
    assert not any(word in caplog.text for word in ("weights_only", "damaged", "safe_globals", "trust"))


def test_damaged_and_refused_ones_are_told_apart(manager):
    torch.save(Evil(), manager.directory / "step_0000000002.pt")
    (manager.directory / "step_0000000001.pt").write_bytes(b"")
    with pytest.raises(RuntimeError, match=r"all 2 .* are damaged or refused: .*2.pt \(refused\), .*1.pt \(damaged\)"):
        manager.load_latest()


# ---- disks and arguments


def test_a_full_disk_is_an_oserror_that_leaves_what_there_was(manager, full_disk):
    run = Run()
    manager.save_checkpoint(*run.parts, 0, 1, {})
    before = names(manager)
    with (
        full_disk(3000),
        pytest.raises(OSError, match=r"the checkpoint of step 2 could not be written .* as they were"),
    ):
        manager.save_checkpoint(*run.parts, 0, 2, {})
    assert names(manager) == before
    assert manager.load_latest()["step"] == 1


def test_a_directory_that_cannot_be_made_says_so(tmp_path):
    (tmp_path / "taken").write_text("x")
    with pytest.raises(OSError, match="taken"):
        CheckpointManager(tmp_path / "taken")


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"max_keep": 0}, ValueError, "max_keep=0"),
        ({"metric": 3}, TypeError, "metric=3"),
        ({"mode": "most"}, ValueError, "mode='most'.*'min'"),
        ({"mode": "max"}, ValueError, "needs metric="),
        ({"session": "s"}, TypeError, r"session='s'.*torchprobe\.instrument"),
    ],
)
def test_a_wrong_option_is_named(tmp_path, options, error, words):
    with pytest.raises(error, match=words):
        CheckpointManager(tmp_path, **options)
