"""Runs with damaged or foreign files in them, and names that a terminal would obey."""

from __future__ import annotations

import json
import math
import os
import struct
import sys
import unicodedata
from pathlib import Path
from typing import Any

import pytest
from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary, SummaryMetadata
from tensorboard.compat.proto.tensor_pb2 import TensorProto

from tests.reports.conftest import write_run
from torchprobe.cli import main
from torchprobe.records import Record, Text
from torchprobe.reports.run import read_run, runs_in
from torchprobe.writers.event_file import EventFileWriter
from torchprobe.writers.hparams import HParamsWriter
from torchprobe.writers.tfrecord import frame


def foreign(tag: str, plugin: str, content: bytes = b"", **tensor: Any) -> bytes:
    data = SummaryMetadata(plugin_data=SummaryMetadata.PluginData(plugin_name=plugin, content=content))
    value = Summary.Value(tag=tag, tensor=TensorProto(**tensor), metadata=data)
    return Event(step=2, wall_time=2.0, summary=Summary(value=[value])).SerializeToString()


def shape(size: int) -> dict[str, Any]:
    return {"dim": [{"size": size}]}


DAMAGED = {
    "no protobuf": b"\xff" * 50,
    "two numbers as a scalar": foreign("a", "scalars", dtype=1, tensor_shape=shape(2), float_val=[1, 2]),
    "none as a scalar": foreign("a", "scalars", dtype=1, tensor_shape=shape(0)),
    "a word as a scalar": foreign("a", "scalars", dtype=7, string_val=[b"x"]),
    "a number as a text": foreign("a", "text", dtype=1, float_val=[1.0]),
    "a huge shape": foreign("a", "scalars", dtype=1, tensor_shape=shape(10**12), float_val=[1.0]),
    "hyperparameters": foreign("_hparams_/session_start_info", "hparams", b"\xff\xff", dtype=1),
}


def write_more(run: Path, record: Record) -> None:
    """A second event file of the run."""
    writer = EventFileWriter(run / "more")
    writer.write([record])
    writer.close()
    for file in (run / "more").iterdir():
        file.rename(run / f"{file.name}.more")


@pytest.mark.parametrize("name", DAMAGED)
def test_what_is_damaged_takes_nothing_else_along(tmp_path, capsys, name):
    write_run(tmp_path, {"overview/loss": [1.0]})
    with next(tmp_path.glob("*tfevents*")).open("ab") as file:
        file.write(frame(DAMAGED[name]))
    write_more(tmp_path, Record(3, 3.0, {"overview/later": 2.0}))
    assert main(["report", str(tmp_path)]) == 0
    told = capsys.readouterr().out
    assert "overview/loss" in told
    assert "overview/later" in told


def test_a_record_that_says_to_be_larger_than_its_file_ends_it(tmp_path, capsys):
    write_run(tmp_path, {"overview/loss": [1.0]})
    header = frame(b"x" * 9)[:12]
    length = struct.pack("<Q", 1 << 50)
    with next(tmp_path.glob("*tfevents*")).open("ab") as file:
        file.write(length + struct.pack("<I", _masked(length)) + header)
    assert main(["report", str(tmp_path)]) == 0
    assert "overview/loss" in capsys.readouterr().out
    (unread,) = read_run(tmp_path).unread
    assert unread.startswith("the last 24 bytes of events")


def _masked(data: bytes) -> int:
    """The checksum that stands behind a length, which frame() tells of eight bytes of data."""
    return int(struct.unpack("<I", frame(data)[-4:])[0])


def test_a_time_beyond_all_calendars_is_none(tmp_path, capsys):
    write_run(tmp_path, {"overview/loss": [1.0, 2.0]})
    write_more(tmp_path, Record(3, 1e300, {"overview/odd": 1.0}))
    assert main(["report", str(tmp_path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["seconds"] == 1.0


def test_counts_and_times_that_are_no_numbers_are_left_out(tmp_path, capsys):
    write_run(tmp_path, {"overview/alerts": [math.nan], "overview/loss": [1.0, 2.0]})
    write_more(tmp_path, Record(3, math.nan, {"overview/odd": 1.0}))
    assert main(["report", str(tmp_path), "--json"]) == 0
    found = json.loads(capsys.readouterr().out, parse_constant=pytest.fail)
    assert (found["counts"], found["seconds"]) == ({"alerts": 0}, 1.0)


@pytest.mark.parametrize(
    "text",
    [
        '{"alerts": "abc"}',
        '{"alerts": [1, 2]}',
        '{"alert": 5}',
        '{"step": NaN, "reason": Infinity, "alert": {"value": 1e999}}',
        "[" * 100_000,
        '{"step": 1, "exception": "\\ud800"}',
        f'{{"step": {"9" * 9000}}}',
        "[1]",
    ],
)
def test_damaged_flight_recordings_take_nothing_else_along(ill_run, tmp_path, capsys, text):
    (ill_run / "flight").mkdir()
    (ill_run / "flight" / "1.json").write_text(text)
    for option in ([], ["--html", str(tmp_path / "run.html")]):
        assert main(["report", str(ill_run), *option]) == 0
    assert "overview/loss" in capsys.readouterr().out.encode().decode()
    assert main(["report", str(ill_run), "--json"]) == 0
    json.loads(capsys.readouterr().out, parse_constant=pytest.fail)


@pytest.mark.skipif(sys.platform == "win32", reason="has no pipes, and links for some users only")
@pytest.mark.parametrize("make", [getattr(os, "mkfifo", None), Path.mkdir, lambda path: path.symlink_to("/nowhere")])
def test_pipes_folders_and_links_to_nothing_are_no_event_files(tmp_path, make):
    write_run(tmp_path / "run", {"train/loss": [1.0]})
    make(tmp_path / "run" / "events.out.tfevents.0000000001.x")
    assert list(read_run(tmp_path / "run").scalars) == ["train/loss"]
    assert list(read_run(tmp_path).scalars) == ["train/loss"]


@pytest.mark.skipif(sys.platform == "win32", reason="links for some users only")
def test_links_lead_to_runs_as_they_do_in_tensorboard_and_never_round_in_circles(tmp_path, capsys):
    write_run(tmp_path / "far" / "a", {"train/loss": [1.0]})
    chosen = tmp_path / "chosen"
    chosen.mkdir()
    (chosen / "b").symlink_to(tmp_path / "far" / "a")
    (tmp_path / "far" / "a" / "round").symlink_to(tmp_path / "far")
    assert runs_in(chosen) == [chosen / "b"]
    assert main(["report", str(chosen)]) == 0
    (tmp_path / "far" / "latest").symlink_to(tmp_path / "far" / "a")
    assert runs_in(tmp_path / "far") == [tmp_path / "far" / "a"]


def test_no_control_character_reaches_the_terminal(tmp_path, capsys):
    evil = "\x1b]0;title\x07\x1b[2J\x9b31m"
    runs = []
    for name, scale in (("a", 1.0), (f"b{evil}", 2.0)):
        writer = HParamsWriter(EventFileWriter(tmp_path / name), {evil: f"{evil}{scale}"})
        tags = ("train/{}", "grad_norm_layer/{}", f"only/{scale}{{}}", "attention_entropy/{}", "uncertainty_{}")
        writer.write([Record(1, 1.0, {tag.format(evil): scale for tag in tags})])
        writer.write([Record(2, 2.0, {"torchprobe/stopped": Text(evil), f"alerts/{evil}": 1.0})])
        writer.close()
        runs.append(str(tmp_path / name))
    for words, code in ((["report", runs[1]], 0), (["compare", *runs], 0), (["report", runs[1] + evil], 1)):
        assert main(words) == code
        told = capsys.readouterr()
        assert not {c for c in told.out + told.err if c != "\n" and unicodedata.category(c) == "Cc"}


TURNING = "a\u202eb\u2066c\u2028d\u2029e"


def test_what_turns_or_ends_a_line_is_shown_as_an_escape_and_an_emoji_as_it_is(tmp_path, capsys):
    folder = write_run(tmp_path / TURNING, {f"train/{TURNING}": [1.0], "train/👩\u200d🔬": [1.0]})
    assert main(["report", str(folder)]) == 0
    told = capsys.readouterr().out
    assert not {*TURNING[1::2]} & {*told}
    assert "👩\u200d🔬" in told


@pytest.mark.parametrize("name", ["a\x1b[2Jb", TURNING, "exp[/red]", "[bold]b", "[link=file:etc]c"])
def test_the_lines_of_a_command_show_places_as_they_are_called(tmp_path, capsys, monkeypatch, name):
    monkeypatch.setenv("COLUMNS", "300")
    write_run(tmp_path / "older", {"overview/loss": [1.0]})
    folder = write_run(tmp_path / name, {"overview/loss": [1.0]})
    [file] = folder.glob("*tfevents*")
    os.utime(file, (4e9, 4e9))
    shown = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in name)
    assert main(["report", str(tmp_path)]) == 0
    assert f"{shown}; name another one" in capsys.readouterr().out
    assert main(["report", str(folder), "--html", str(folder / "x.html")]) == 0
    told = capsys.readouterr().out
    assert f"{shown}/x.html shows" in told
    assert told.rstrip("\n").isprintable()
    with pytest.raises(SystemExit):
        main(["compare", str(folder), str(folder), name])
    assert f"unrecognized arguments: {shown}\n" in capsys.readouterr().err


@pytest.mark.parametrize("facts", ['{"hparams": {"clip": Infinity, "x": NaN}}', '{"a": 1e999}', "[" * 10**5])
def test_a_description_that_is_no_json_costs_itself_alone(tmp_path, capsys, facts):
    page = Text(f"|  |  |\n\n```json\n{facts}\n```\n")
    folder = write_run(tmp_path, {"overview/loss": [1.0], "torchprobe/run": [page]})
    for options in ([], ["--json"], ["--html", str(tmp_path / "x.html")]):
        assert main(["report", str(folder), *options]) == 0
    told = capsys.readouterr().out
    assert "overview/loss" in told


def test_a_byte_that_is_wrong_in_a_value_costs_its_record_alone(tmp_path):
    folder = write_run(tmp_path, {"overview/loss": [1.0, 2.0, 3.0, 4.0, 5.0]})
    [file] = folder.glob("*tfevents*")
    data = file.read_bytes()
    at = data.index(Event(step=3, wall_time=1002.0).SerializeToString())
    file.write_bytes(data[:at] + b"\xff" + data[at + 1 :])
    run = read_run(folder)
    assert run.scalars["overview/loss"].steps.tolist() == [1, 2, 4, 5]
    assert run.scalars["overview/loss"].values.tolist() == [1.0, 2.0, 4.0, 5.0]
    assert run.unread == [f"a record of {file.name}"]


def test_what_came_after_the_step_at_which_a_run_was_taken_up_again_is_gone(tmp_path):
    write_run(tmp_path, {"train/loss": [4.0, 3.0, 9.0], "train/later": [None, None, 1.0]})
    event = Event(step=3, wall_time=9.0, session_log=SessionLog(status=SessionLog.START))
    (tmp_path / "events.out.tfevents.9999999999.z").write_bytes(frame(event.SerializeToString()))
    run = read_run(tmp_path)
    assert {tag: series.values.tolist() for tag, series in run.scalars.items()} == {"train/loss": [4.0, 3.0]}


@pytest.mark.parametrize(
    ("break_it", "named"),
    [
        (lambda run, events: events.write(frame(b"\xff" * 9)), "a record of "),
        (lambda run, events: events.write(frame(b"x" * 50)[:30]), "the last 30 bytes of "),
        (lambda run, events: events.write(frame(b"x" * 50)[:-1] + b"?"), "the last 66 bytes of "),
        (lambda run, events: (run / "flight" / "7.json").write_text("{"), "flight/7.json"),
        (lambda run, events: (run / "flight" / "8.json").write_text("[" * 10**5), "flight/8.json"),
        (lambda run, events: (run / "flight" / "\x1b[2J.json").write_text("3"), "flight/\\x1b[2J.json"),
    ],
    ids=["no event", "torn", "a wrong checksum", "half a flight", "a deep one", "an odd name"],
)
def test_what_cannot_be_read_is_named_and_costs_nothing_else(tmp_path, capsys, break_it, named):
    folder = write_run(tmp_path / "run", {"overview/loss": [1.0, 2.0]})
    (folder / "flight").mkdir()
    (folder / "flight" / "1.json").write_text('{"step": 1}')
    assert read_run(folder).unread == []
    [file] = folder.glob("*tfevents*")
    with file.open("ab") as events:
        break_it(folder, events)
    run = read_run(folder)
    assert len(run.unread) == 1
    assert run.unread[0].startswith(named)
    assert (run.steps, len(run.flights)) == (2, 1)
    assert main(["report", str(folder)]) == 0
    assert f"Not read, since damaged or of another program: {named[:9]}" in capsys.readouterr().out
