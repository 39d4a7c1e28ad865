"""Where a run's files go."""

from __future__ import annotations

import os
from datetime import datetime
from pathlib import Path

import pytest

from torchprobe.writers import run_directory as module
from torchprobe.writers.run_directory import run_directory


@pytest.fixture(autouse=True)
def working_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def frozen(monkeypatch):
    """All runs begin in the same second."""

    class Frozen(datetime):
        @classmethod
        def now(cls):
            return cls(2024, 5, 6, 7, 8, 9)

    monkeypatch.setattr(module, "datetime", Frozen)


def test_a_log_directory_is_taken_as_it_is_and_not_made_yet(tmp_path):
    for log_dir in ("runs/exp1", Path("runs/exp1"), tmp_path / "elsewhere"):
        assert run_directory(log_dir, None, "GPT") == Path(log_dir)
    assert list(tmp_path.iterdir()) == []


def test_a_run_name_is_a_folder_in_it():
    assert run_directory("logs", "seed 3", "GPT") == Path("logs/seed 3")
    assert run_directory(None, "v1.2", "GPT") == Path("runs/v1.2")


def test_without_either_the_folder_says_when_and_what(frozen):
    assert run_directory(None, None, "GPT") == Path("runs/20240506-070809-GPT")


def test_runs_of_the_same_second_get_folders_of_their_own(frozen):
    paths = [run_directory(None, None, "GPT") for _ in range(3)]
    assert [path.name for path in paths] == ["20240506-070809-GPT", "20240506-070809-GPT-2", "20240506-070809-GPT-3"]
    assert all(path.is_dir() for path in paths)


def test_a_link_to_nowhere_is_an_error_and_no_endless_search(tmp_path):
    (tmp_path / "runs").symlink_to(tmp_path / "gone" / "away")
    with pytest.raises(OSError, match="runs"):
        run_directory(None, None, "GPT")


@pytest.mark.parametrize("name", ["", " ", ".", "..", "../up", "a/b", "a\\b", "a\0b", "/abs"])
def test_a_run_name_that_is_no_folder_name_is_refused(name):
    with pytest.raises(ValueError, match=r"^run_name=.*takes one folder name.*log_dir"):
        run_directory("logs", name, "GPT")


@pytest.mark.parametrize("log_dir", [5, b"runs", ["runs"]])
def test_what_is_no_path_is_refused(log_dir):
    with pytest.raises(TypeError, match=r"^log_dir=.*takes a path, such as 'runs/exp1'"):
        run_directory(log_dir, None, "GPT")


def test_a_run_name_that_is_no_string_is_refused():
    with pytest.raises(TypeError, match=r"^run_name=3: takes a string, not int"):
        run_directory("logs", 3, "GPT")


def test_an_empty_path_is_refused():
    with pytest.raises(ValueError, match=r"^log_dir='' is empty"):
        run_directory("", None, "GPT")


@pytest.mark.parametrize("arguments", [("taken", None), ("taken/below", None), ("taken", "run")])
def test_a_path_through_a_file_is_refused(tmp_path, arguments):
    (tmp_path / "taken").write_text("x")
    with pytest.raises(ValueError, match="taken is a file, and a run needs a directory"):
        run_directory(*arguments, "GPT")


def test_a_file_called_runs_is_refused(tmp_path):
    (tmp_path / "runs").write_text("x")
    with pytest.raises(ValueError, match="runs is a file"):
        run_directory(None, None, "GPT")


def test_any_path_object_serves(tmp_path):
    class Mine(os.PathLike):
        def __fspath__(self):
            return str(tmp_path / "mine")

    assert run_directory(Mine(), "run", "GPT") == tmp_path / "mine" / "run"
