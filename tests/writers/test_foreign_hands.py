"""Files that other programs cut short, replace, copy away or delete while a run writes them."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import torch

import torchprobe
from tests.loaders import has_rust_loader, python_points, rust_points
from tests.models import inputs, mlp
from torchprobe.records import Record
from torchprobe.writers.event_file import EventFileWriter
from torchprobe.writers.files import AppendFile
from torchprobe.writers.json_lines import JsonLinesWriter

LOADERS = [
    python_points,
    pytest.param(rust_points, marks=pytest.mark.skipif(not has_rust_loader(), reason="no data server here")),
]


def cut_to_nothing(file):
    os.truncate(file, 0)


def cut_in_a_record(file):
    os.truncate(file, file.stat().st_size - 5)


def replace_with_a_copy(file):
    copy = shutil.copy(file, file.with_suffix(".copy"))
    Path(copy).replace(file)


def copy_away_and_cut(file):
    """What log rotation calls copytruncate."""
    shutil.copy(file, file.parent.parent / "rotated")
    os.truncate(file, 0)


def move_folder_and_copy_back(file):
    folder = file.parent
    shutil.move(folder, f"{folder}.old")
    shutil.copytree(f"{folder}.old", folder)


def add_to(file):
    with file.open("ab") as other:
        other.write(b"\n")


def rotate(file):
    file.rename(f"{file}.1")


def move_folder(file):
    shutil.move(file.parent, f"{file.parent}.old")


def delete(file):
    file.unlink()


def delete_with_folder(file):
    shutil.rmtree(file.parent)


FAULTS = {
    cut_to_nothing: "cut short",
    cut_in_a_record: "cut short",
    copy_away_and_cut: "cut short",
    replace_with_a_copy: "replaced by another file",
    move_folder_and_copy_back: "replaced by another file",
    add_to: "written to by another program",
    rotate: "moved away",
    move_folder: "moved away with its directory",
    delete: "deleted",
    delete_with_folder: "deleted with its directory",
}
faults = pytest.mark.parametrize(("do", "said"), FAULTS.items(), ids=lambda x: getattr(x, "__name__", ""))


def record(step):
    return Record(step, 1.7e9 + step, {"loss": step / 2})


def lines(caplog, path):
    return [message for message in caplog.messages if message.startswith(str(path))]


@pytest.fixture
def events(tmp_path):
    writer = EventFileWriter(tmp_path / "run")
    yield writer
    writer.close()


@pytest.fixture
def json_lines(tmp_path):
    writer = JsonLinesWriter(tmp_path / "run" / "run.jsonl")
    yield writer
    writer.close()


@faults
@pytest.mark.parametrize("load", LOADERS)
def test_what_comes_after_is_in_a_new_event_file_and_the_log_says_why(load, do, said, events, tmp_path, caplog):
    events.write([record(step) for step in (1, 2, 3)])
    before = events.path
    do(before)
    for step in (4, 5, 6):
        events.write([record(step)])
    assert events.path != before
    steps = [step for step, _ in load(tmp_path / "run")["loss"]]
    assert steps[-3:] == [4, 5, 6]
    assert steps == sorted(set(steps))
    assert lines(caplog, before) == [f"{before} was {said}: writing goes on in {events.path}"]


@faults
def test_what_was_whole_stays_beside_it(do, said, events, tmp_path):
    events.write([record(step) for step in (1, 2, 3)])
    do(events.path)
    events.write([record(4)])
    lost = (
        1 if do is cut_in_a_record else 3 * (do not in (replace_with_a_copy, move_folder_and_copy_back, add_to, rotate))
    )
    left = [1, 2, 3][: 3 - lost]
    assert [step for step, _ in python_points(tmp_path / "run")["loss"]] == [*left, 4]


@faults
def test_json_lines_go_on_under_their_name(do, said, json_lines, tmp_path, caplog):
    path = tmp_path / "run" / "run.jsonl"
    json_lines.write([record(step) for step in (1, 2, 3)])
    do(path)
    for step in (4, 5, 6):
        json_lines.write([record(step)])
    read = path.read_text().splitlines()
    assert [json.loads(line)["step"] for line in read[-3:]] == [4, 5, 6]
    assert "\0" not in path.read_text()
    assert lines(caplog, path) == [f"{path} was {said}: writing goes on in it"]


def test_a_file_that_is_replaced_again_and_again_is_said_once(events, caplog):
    for step in range(1, 5):
        events.write([record(step)])
        replace_with_a_copy(events.path)
    assert len([message for message in caplog.messages if "replaced" in message]) == 1


def test_two_writers_of_one_json_file_lose_no_line(json_lines, tmp_path):
    path = tmp_path / "run" / "run.jsonl"
    other = JsonLinesWriter(path)
    for step in range(1, 4):
        json_lines.write([record(step)])
        other.write([record(10 * step)])
    other.close()
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 10, 2, 20, 3, 30]


def test_a_full_disk_for_the_new_file_puts_it_off(events, tmp_path, full_disk, caplog):
    events.write([record(1)])
    before = events.path
    before.unlink()
    for _ in range(2):
        with full_disk(0), pytest.raises(OSError, match="File too large"):
            events.write([record(2)])
    events.write([record(2)])
    assert [step for step, _ in python_points(tmp_path / "run")["loss"]] == [2]
    assert lines(caplog, before) == [f"{before} was deleted: writing goes on in {events.path}"]


def test_a_file_system_that_numbers_a_file_twice_goes_by_name_and_size(tmp_path, monkeypatch):
    monkeypatch.setattr(os.path, "samestat", lambda *_: False)
    file = AppendFile(tmp_path / "data", "xb")
    file.append(b"12345")
    assert file.fault() is None
    os.truncate(file.path, 2)
    assert file.fault() == "cut short"
    file.close()


@pytest.mark.parametrize("do", FAULTS, ids=lambda do: do.__name__)
def test_a_session_goes_on_and_says_so(do, tmp_path, caplog):
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with torchprobe.instrument(model, log_dir=tmp_path / "run", every=1, flush_every=2, rules=[]) as session:
        for step in range(1, 21):
            if step == 11:
                assert session.flush()
                [file] = (tmp_path / "run").glob("*tfevents*")
                do(file)
            model(inputs("mlp")).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        assert session.flush()
    shown = [step for step, _ in python_points(tmp_path / "run")["overview/grad_norm"]]
    assert shown[-10:] == list(range(11, 21))
    assert session.log_dir == tmp_path / "run"
    assert len(lines(caplog, file)) == 1


def close_what_is_open_in(folder):
    """As a daemon does with all that it finds open."""
    opened = {int(link.name): link.resolve().parent for link in Path("/proc/self/fd").iterdir()}
    for descriptor, place in opened.items():
        if place == folder.resolve():
            os.close(descriptor)


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="nothing here tells what is open")
@pytest.mark.parametrize("make", [EventFileWriter, lambda folder: JsonLinesWriter(folder / "run.jsonl")])
def test_a_descriptor_that_the_program_has_closed_is_opened_again(tmp_path, make, caplog):
    writer = make(tmp_path)
    for step in (1, 2, 3):
        writer.write([Record(step, 1.0 * step, {"loss": 1.0})])
        close_what_is_open_in(tmp_path)
    writer.close()
    written = b"".join(file.read_bytes() for file in sorted(tmp_path.iterdir()))
    assert written.count(b"loss") == 3
    [line] = caplog.records
    assert " was closed by the program: writing goes on in " in line.getMessage()


def test_a_program_that_goes_to_another_directory_takes_no_run_along(tmp_path, monkeypatch, caplog):
    """Before the first write and after it, with flight recordings."""
    monkeypatch.chdir(tmp_path)
    model, elsewhere = mlp(), tmp_path / "elsewhere"
    elsewhere.mkdir()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for first, run in ((True, "a"), (False, "b")):
        monkeypatch.chdir(tmp_path)
        with torchprobe.instrument(model, log_dir=run, every=1, flush_every=1, rules=[always]) as session:
            for step in range(1, 7):
                if step == (1 if first else 4):
                    assert session.log_dir == Path(run)
                    session.flush()
                    monkeypatch.chdir(elsewhere)
                model(inputs("mlp")).square().mean().backward()
                optimizer.step()
                optimizer.zero_grad()
            assert session.log_dir == tmp_path / run
        shown = [step for step, _ in python_points(tmp_path / run)["overview/grad_norm"]]
        assert shown == [1, 2, 3, 4, 5, 6]
        assert (tmp_path / run / "flight" / "1.json").is_file()
    assert list(elsewhere.iterdir()) == []
    assert "moved away" not in caplog.text


def always(record):
    return [torchprobe.Alert("always", record.step, None, 1.0, 0.5, "m")]


def test_json_lines_stay_where_they_are_when_the_program_goes_elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    writer = JsonLinesWriter("run.jsonl")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    writer.write([record(1)])
    writer.close()
    assert len((tmp_path / "run.jsonl").read_text().splitlines()) == 1


def test_the_end_of_a_full_disk_is_said(tmp_path, full_disk, caplog):
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with torchprobe.instrument(model, log_dir=tmp_path, every=1, rules=[]) as session:
        for limit in (2**40, 0, 2**40):
            model(inputs("mlp")).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            with full_disk(limit):
                assert session.flush() == bool(limit)
    said = [message for message in caplog.messages if "writing" in message]
    assert [message.split(":")[0].split(";")[0] for message in said] == ["writing failed", "writing works again"]
    assert [step for step, _ in python_points(tmp_path)["overview/grad_norm"]] == [1, 2, 3]
