"""Damaged, foreign and hostile files."""

from __future__ import annotations

import logging

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
    assert manager.load_latest() is None
    with pytest.raises(RuntimeError, match=r"all 1 checkpoints in .* are damaged"):
        manager.restore(*run.parts)


def test_a_foreign_file_of_that_name_is_skipped(manager):
    torch.save({"weights": torch.ones(1)}, manager.directory / "step_0000000009.pt")
    assert manager.load_latest() is None


def test_loading_runs_no_code(manager, tmp_path, caplog):
    class Evil:
        def __reduce__(self):
            return (print, ("it ran",))

    torch.save(Evil(), manager.directory / "step_0000000009.pt")
    with caplog.at_level(logging.WARNING, "torchprobe"):
        assert manager.load_latest() is None
    assert "damaged" in caplog.text


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
