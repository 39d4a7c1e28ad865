"""What a recorded run says."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.reports.conftest import write_run
from torchprobe.cli import main
from torchprobe.records import Record, Text
from torchprobe.reports.comparison import compare
from torchprobe.reports.run import NoRunError, Series, read_run
from torchprobe.reports.summary import summarise
from torchprobe.reports.terminal import BARS, sparkline
from torchprobe.reports.views import page
from torchprobe.writers.event_file import EventFileWriter
from torchprobe.writers.hparams import HParamsWriter

SCRIPTS = 3  # of a page: Plotly, the run's data, the views


def series(values: list[float]) -> Series:
    return Series(np.arange(1, len(values) + 1), np.array(values, float), np.zeros(len(values)))


def test_a_report_says_what_went_wrong_where_and_when(ill_run, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "160")
    assert main(["report", str(ill_run)]) == 0
    said = capsys.readouterr().out
    assert f"{ill_run}: 4 steps in 3 s, 2.0% of the time in probes, 2 skipped steps" in said
    assert "exploding_gradient, step 3 at fc1: total norm < 10 x the largest (value 90, threshold 10)" in said
    assert "largest gradients" in said
    assert "▁▁█!" in said.replace("▃", "▁")  # the loss: 2, 1, 5, NaN


def test_json_is_valid_and_holds_the_numbers(ill_run, capsys):
    assert main(["report", str(ill_run), "--json"]) == 0
    found = json.loads(capsys.readouterr().out, parse_constant=pytest.fail)
    assert found["steps"] == 4
    assert found["counts"] == {"skipped_steps": 2}
    loss = {"first": 2.0, "last": None, "lowest": 1.0, "highest": 5.0, "points": 4, "not_finite": 1}
    assert found["curves"]["overview/loss"] == loss
    assert found["layers"]["largest gradients"][0] == {"where": "fc1", "value": 90.0}
    assert found["alerts"][0]["steps"] == [3]
    assert found["calibration"]["val/"] == {"ece": pytest.approx(0.1)}


def test_a_page_is_one_file_that_fetches_nothing(ill_run, tmp_path, capsys):
    assert main(["report", str(ill_run), "--html", str(tmp_path / "run.html")]) == 0
    text = (tmp_path / "run.html").read_text(encoding="utf-8")
    found = Tags()
    found.feed(text)
    assert found.names.count("script") == SCRIPTS
    assert not {"link", "img", "iframe", "base"} & set(found.names)
    assert not {"src", "href"} & found.attributes
    assert "exploding_gradient" in text


class Tags(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []
        self.attributes: set[str] = set()

    def handle_starttag(self, tag, attrs):
        self.names.append(tag)
        self.attributes |= {name for name, _ in attrs}


def test_names_from_a_run_cannot_break_the_page(tmp_path):
    names = {"overview/<script>alert(1)": [1.0], "grad_norm_layer/</script><img src=x>": [1.0]}
    run = read_run(write_run(tmp_path / "<b>run", names))
    text = page(run, summarise(run))
    found = Tags()
    found.feed(text)
    assert found.names.count("script") == SCRIPTS
    assert "img" not in found.names
    assert "alert(1)" in text  # as text


def test_a_healthy_run_has_no_alert(tmp_path, capsys):
    assert main(["report", str(write_run(tmp_path / "well", {"train/loss": [2.0, 1.0]}))]) == 0
    assert "No alert." in capsys.readouterr().out


def test_flight_recordings_are_named_and_a_half_written_one_is_passed_over(ill_run, capsys):
    (ill_run / "flight").mkdir()
    (ill_run / "flight" / "3.json").write_text('{"step": 3, "alert": {"rule": "exploding_gradient"}}')
    (ill_run / "flight" / "4.json").write_text('{"step": 4, "ale')
    assert main(["report", str(ill_run)]) == 0
    assert "Flight recording of step 3" in capsys.readouterr().out
    assert [flight["step"] for flight in summarise(read_run(ill_run))["flight_recordings"]] == [3]


def test_a_folder_of_runs_gives_the_newest(tmp_path):
    write_run(tmp_path / "runs" / "first", {"train/loss": [1.0]})
    newest = write_run(tmp_path / "runs" / "second", {"train/loss": [1.0, 0.5]})
    assert read_run(tmp_path / "runs").path == newest


@pytest.mark.parametrize("command", ["report", "compare"])
def test_no_run_is_said_in_one_line(command, tmp_path, capsys):
    folders = [str(tmp_path)] * (2 if command == "compare" else 1)
    assert main([command, *folders]) == 1
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "no run is recorded" in said
    with pytest.raises(NoRunError, match="not a folder"):
        read_run(tmp_path / "none")


def test_a_page_that_cannot_be_written_is_said(ill_run, tmp_path, capsys):
    assert main(["report", str(ill_run), "--html", str(tmp_path / "none" / "x.html")]) == 1
    assert "--html: cannot write" in capsys.readouterr().err


@pytest.mark.parametrize("text", ["Recording stopped at step 3: a\\_b failed", "a\\_b failed"])
def test_a_recording_that_stopped_is_said_first(tmp_path, capsys, monkeypatch, text):
    monkeypatch.setenv("COLUMNS", "400")
    run = write_run(tmp_path / "run", {"train/loss": [2.0, 1.0], "torchprobe/stopped": [None, None, Text(text)]})
    line = "Recording stopped at step 3: a_b failed"
    assert main(["report", str(run)]) == 0
    assert capsys.readouterr().out.splitlines()[1] == line
    assert main(["report", str(run), "--json", "--html", str(tmp_path / "run.html")]) == 0
    assert json.loads(capsys.readouterr().out)["stopped"] == {"step": 3, "why": "a_b failed"}
    assert line in (tmp_path / "run.html").read_text(encoding="utf-8")
    well = read_run(write_run(tmp_path / "well", {"train/loss": [1.0]}))
    assert summarise(well)["stopped"] is None


def test_layers_that_get_nothing_are_the_smallest_and_a_warm_up_from_0_is_none(tmp_path):
    values = {"dead": [1e-3, 0.0, 0.0], "warm": [0.0, 1e-3, 1e-3], "well": [0.1, 0.1, 0.1]}
    run = write_run(tmp_path, {f"update_ratio/{name}": of_layer for name, of_layer in values.items()})
    layers = summarise(read_run(run))["layers"]
    assert [row["where"] for row in layers["smallest update ratios"]] == ["dead", "warm", "well"]
    assert [row["value"] for row in layers["smallest update ratios"][:2]] == [0.0, pytest.approx(1e-3)]


# ---- comparison


def test_many_times_apart_is_more_than_a_hundred_percent(tmp_path, capsys):
    tags = ("lr/SGD/group_0", "calibration/confidence_gap", "overview/loss")
    a, b = (
        write_run(tmp_path / name, {tag: [value] for tag, value in zip(tags, values, strict=True)})
        for name, values in (("a", (0.01, -0.3, 1.0)), ("b", (50.0, 0.05, 0.0)))
    )
    assert [difference.tag for difference in compare(read_run(a), read_run(b)).differences] == list(tags)
    assert main(["compare", str(a), str(b)]) == 0
    told = capsys.readouterr().out
    assert "5,000 times" in told
    assert "100.0%" in told  # the loss: nothing is a multiple of 0


def test_the_biggest_difference_comes_first_and_noise_counts_less(tmp_path, capsys):
    rng = np.random.default_rng(0)
    common = {"grad_norm/fc1": [1.0] * 20, "lr/SGD/group_0": [0.1] * 20}
    a = write_run(tmp_path / "a", {**common, "mean/noise": rng.normal(0, 1e-3, 20).tolist(), "only/a": [1.0]})
    b = write_run(
        tmp_path / "b",
        {"grad_norm/fc1": [4.0] * 20, "lr/SGD/group_0": [0.1] * 20, "mean/noise": rng.normal(0, 1e-3, 20).tolist()},
    )
    found = compare(read_run(a), read_run(b))
    assert found.differences[0].tag == "grad_norm/fc1"
    assert found.differences[0].size == pytest.approx(0.75)
    assert found.differences[-1].size == 0
    assert (found.only_a, found.only_b) == (["only/a"], [])
    assert main(["compare", str(a), str(b), "--only", "grad"]) == 0
    said = capsys.readouterr().out
    assert "75.0%" in said
    assert "mean/noise" not in said


finite = st.floats(-1e6, 1e6)


@given(st.lists(finite, min_size=1, max_size=30), st.lists(finite, min_size=1, max_size=30))
def test_a_difference_does_not_depend_on_the_order_of_the_runs(one, other):
    from torchprobe.reports.comparison import _difference

    there, back = _difference("t", series(one), series(other)), _difference("t", series(other), series(one))
    assert there.size == back.size
    assert 0 <= there.size <= 2
    assert _difference("t", series(one), series(one)).size == 0


def test_a_run_that_became_nan_differs_most():
    from torchprobe.reports.comparison import _difference

    assert _difference("t", series([1.0]), series([math.nan])).size == math.inf
    assert _difference("t", series([math.nan]), series([math.nan])).size == 0


# ---- sparklines


@given(st.lists(st.floats(allow_nan=True, allow_infinity=True, width=32), max_size=100))
def test_a_sparkline_is_as_wide_as_it_may_be_and_shows_extremes(values):
    line = sparkline(np.array(values, float), 24)
    assert len(line) == min(24, len(values))
    if 1 < len(values) <= 24 and all(map(math.isfinite, values)) and max(values) > min(values):
        assert line[int(np.argmax(values))] == BARS[-1]
        assert line[int(np.argmin(values))] == BARS[0]


def test_reading_a_run_needs_no_torch():
    check = "import sys, torchprobe.reports.views, torchprobe.reports.summary; print('torch' in sys.modules)"
    said = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=True)
    assert said.stdout.strip() == "False"


def test_two_points_of_one_step_count_as_one(tmp_path: Path):
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(str(tmp_path)) as writer:
        for value in (1.0, 2.0):
            writer.add_scalar("train/loss", value, 5)
        writer.add_text("alerts", "- non_finite, step 5: somewhere")
    run = read_run(tmp_path)
    assert run.scalars["train/loss"].values.tolist() == [2.0]
    assert run.texts["alerts/text_summary"] == [(0, "- non_finite, step 5: somewhere")]


# ---- what a person reads


def test_one_is_one_and_many_are_many_and_none_is_not_said():
    from torchprobe.reports.summary import headline

    summary = {"steps": 1, "seconds": 0.42, "probe_overhead": None, "counts": {"alerts": 1, "skipped_steps": 0}}
    assert headline(summary) == "1 step in 0.42 s, 1 alert"
    summary = {"steps": 300, "seconds": 75.3, "probe_overhead": 0.02, "counts": {"alerts": 2, "skipped_steps": 1}}
    assert headline(summary) == "300 steps in 75 s, 2.0% of the time in probes, 2 alerts, 1 skipped step"


def test_hyperparameters_are_told_and_compared(tmp_path, capsys):
    for name, lr, tied in (("a", 1e-3, True), ("b", 1e-2, True)):
        writer = HParamsWriter(EventFileWriter(tmp_path / name), {"lr": lr, "batch": 32, "tied": tied})
        writer.write([Record(1, 1000.0, {"train/loss": lr})])
        writer.close()
    assert read_run(tmp_path / "a").hparams == {"batch": 32.0, "lr": 0.001, "tied": True}
    assert not any("Final" in tag for tag in read_run(tmp_path / "a").scalars)
    assert main(["report", str(tmp_path / "a")]) == 0
    assert "batch 32, lr 0.001, tied True" in capsys.readouterr().out
    assert main(["compare", str(tmp_path / "a"), str(tmp_path / "b")]) == 0
    table = capsys.readouterr().out
    assert "hyperparameters that differ" in table
    assert [line.split()[0] for line in table.splitlines() if "0.001 │" in line] == ["lr", "train/loss"]
    assert "tied" not in table


def test_the_whole_run_stands_before_its_layers(tmp_path, capsys):
    a, b = (
        write_run(tmp_path / name, {"train/loss": [loss], "val/loss": [loss], "activation_mean/fc": [mean]})
        for name, loss, mean in (("a", 1.0, 0.1), ("b", 2.0, -0.1))
    )
    assert main(["compare", str(a), str(b), "--most", "1"]) == 0
    said = capsys.readouterr().out
    order = ["the whole run", "train/loss", "1 smaller difference is", "inside the model", "activation_mean/fc"]
    assert sorted(order, key=said.index) == order


def test_rounding_is_no_course():
    clipped = np.array([0.9999996, 0.9999998, 0.9999997])
    assert sparkline(clipped) == BARS[0] * 3


def test_a_flight_recording_says_why(ill_run, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "400")
    (ill_run / "flight").mkdir()
    for step, more in (
        (3, {"alerts": [{"rule": "exploding_gradient"}]}),
        (4, {"exception": "Traceback\nKeyError: 1\n"}),
    ):
        (ill_run / "flight" / f"{step}.json").write_text(json.dumps({"step": step, **more}))
    assert main(["report", str(ill_run)]) == 0
    said = capsys.readouterr().out
    assert "Flight recording of step 3 (exploding_gradient): " in said
    assert "Flight recording of step 4 (KeyError: 1): " in said


def test_tags_that_begin_alike_stay_apart_in_a_narrow_terminal(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    tags = ["overview/attention_entropy_min", "overview/attention_max_logit"]
    write_run(tmp_path, {tag: [1.0 / step for step in range(1, 30)] for tag in tags})
    assert main(["report", str(tmp_path)]) == 0
    told = capsys.readouterr().out
    assert all(tag in told for tag in tags)
