"""Whether a run is healthy, where it is not, what to try: of one run, of several, while one trains."""

from __future__ import annotations

import io
import json
import math
import threading
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from tests.reports.conftest import write_run
from tests.reports.recorded import record
from torchprobe.cli import main
from torchprobe.records import Record, Text
from torchprobe.reports.comparison import compare
from torchprobe.reports.events import EventFiles
from torchprobe.reports.run import read_run
from torchprobe.reports.summary import summarise
from torchprobe.reports.terminal import follow
from torchprobe.reports.verdict import episodes, parsed
from torchprobe.reports.views import views_of
from torchprobe.rules.alert import Alert, Display
from torchprobe.writers.event_file import EventFileWriter


def told(alerts: list[Alert]) -> dict:
    """Values of a step with these alerts, as a run writes them."""
    return dict(Display().values(alerts))


def ill(rule: str, step: int, where: str | None = None, **more) -> Alert:
    return Alert(rule, step, where, 1.0, 2.0, f"{rule} it is", advice=f"Try a cure of {rule}.", **more)


def run_with(path: Path, alerts: dict[int, list[Alert]], steps: int = 10, **values) -> Path:
    writer = EventFileWriter(path)
    for step in range(1, steps + 1):
        here = {tag: column[step - 1] for tag, column in values.items() if column[step - 1] is not None}
        loss = {"overview/loss": 1.0 / step, **here}
        writer.write([Record(step, 1000.0 + step, {**loss, **(told(alerts[step]) if step in alerts else {})})])
    writer.close()
    return path


def verdict(path: Path) -> dict:
    return summarise(read_run(path))["verdict"]


@pytest.mark.parametrize(
    ("alert", "place"),
    [
        (ill("dead_units", 3, "blocks.1.mlp"), ("blocks.1.mlp", None, 1)),
        (ill("my_rule", 3), (None, None, 0)),
        (ill("my rule: of mine", 3, "a"), ("a", None, 1)),
        (ill("vanishing_gradient", 3, "a_1", members=("a_1", "b", "c")), ("a_1", "c", 3)),
    ],
    ids=["a module", "the whole run", "a rule with a space", "many members"],
)
@pytest.mark.parametrize("ended", [False, True])
def test_an_alerts_line_is_understood(alert, place, ended):
    line = str(Alert(**{**{name: getattr(alert, name) for name in alert.__slots__}, "ended": ended}))
    found = parsed(line)
    assert found is not None
    assert (found["rule"], found["step"], found["ended"]) == (alert.rule, 3, ended)
    assert (found["where"], found["last"], found["members"]) == place


def test_episodes_begin_and_end_where_the_alerts_do():
    lines = [
        *("r, step 2 at a: x (value 1)", "r, step 3 at b: x (value 1)", "r has ended, step 5 at a: y"),
        *("r, step 7 at a: x (value 1)", "q, step 8 at a: x (value 1)"),
    ]
    found = episodes("r", [2, 3, 7, 9], [(line, "") for line in lines])
    assert [(one["step"], one["where"], one["until"]) for one in found] == [
        (2, "a", 5), (3, "b", None), (7, "a", None), (9, None, None),
    ]  # fmt: skip


def test_a_run_without_anything_is_healthy(tmp_path):
    state = [Text("finished"), *[None] * 9]
    found = verdict(run_with(tmp_path, {}, **{"torchprobe/state": state}))
    assert (found["healthy"], found["look_at"]) == (True, [])
    assert found["line"] == "Healthy: nothing to look at in 10 steps."


def test_what_nobody_has_watched_is_not_called_healthy(tmp_path):
    found = verdict(run_with(tmp_path / "foreign", {}))
    assert found["healthy"] is None
    assert found["line"] == "Nothing stands out in 10 steps, but no rule is known to have watched this run."
    found = verdict(write_run(tmp_path / "empty", {"torchprobe/state": [Text("running")]}))
    assert (found["healthy"], found["line"]) == (None, "Nothing is recorded yet.")


def test_what_begins_in_one_step_is_one_thing_headed_by_what_says_where(tmp_path):
    alerts = [ill("loss_spike", 4), ill("attention_collapse", 4, "block.2"), ill("grad_norm_spike", 4)]
    [thing] = verdict(run_with(tmp_path, {4: alerts}))["look_at"]
    assert (thing["step"], thing["where"], thing["advice"]) == (4, "block.2", "Try a cure of attention_collapse.")
    assert thing["rules"] == ["attention_collapse", "loss_spike", "grad_norm_spike"]


def test_the_gravest_that_still_holds_comes_first_and_three_at_most(tmp_path):
    over = ill("exploding_gradient", 2)
    end = Alert("exploding_gradient", 3, None, 0.0, None, "not seen any more", ended=True)
    rest = {5: [ill("update_ratio", 5, "w")], 6: [ill("dead_units", 6, "relu")], 7: [ill("mine", 7)]}
    found = verdict(run_with(tmp_path, {2: [over], 3: [end], **rest}))
    assert [thing["rules"][0] for thing in found["look_at"]] == ["mine", "dead_units", "update_ratio"]
    assert found["line"] == "Not healthy. Look at these 3 things (and 1 more):"


def test_a_consequence_goes_with_what_was_there_before(tmp_path):
    late = {7: [ill("at_chance", 7)], 9: [ill("learning_rate_too_low", 9)]}
    [thing] = verdict(run_with(tmp_path / "ill", {2: [ill("vanishing_gradient", 2, "fc")], **late}))["look_at"]
    assert thing["rules"] == ["vanishing_gradient", "learning_rate_too_low", "at_chance"]
    assert thing["what"].endswith("With it: learning rate too low, at chance")
    end = {4: [Alert("vanishing_gradient", 4, "fc", 0.0, None, "not seen any more", ended=True)]}
    over = verdict(run_with(tmp_path / "over", {2: [ill("vanishing_gradient", 2, "fc")], **end, **late}))["look_at"]
    assert [thing["rules"][0] for thing in over] == ["learning_rate_too_low", "at_chance", "vanishing_gradient"]
    slow = verdict(run_with(tmp_path / "slow", {2: [ill("input_bound", 2)], **late}))["look_at"]
    assert [thing["rules"][0] for thing in slow] == ["learning_rate_too_low", "at_chance", "input_bound"]


def test_what_is_over_leaves_a_run_healthy_at_the_end(tmp_path):
    end = Alert("loss_spike", 5, None, 0.0, None, "not seen any more", ended=True)
    found = verdict(run_with(tmp_path, {2: [ill("loss_spike", 2)], 5: [end]}))
    assert not found["healthy"]
    assert found["line"] == "Healthy at the end, but look at this:"
    assert "from step 2 to 5" in found["look_at"][0]["what"]


def test_numbers_speak_where_no_rule_was_on(tmp_path):
    nan = [1.0] * 5 + [math.nan] * 5
    assert "NaN" in verdict(run_with(tmp_path / "nan", {}, **{"overview/loss": nan}))["look_at"][0]["what"]
    dead = [1e-3] * 5 + [0.0] * 5
    [thing] = verdict(run_with(tmp_path / "dead", {}, **{"grad_mean_abs/fc": dead}))["look_at"]
    assert (thing["where"], thing["step"]) == ("fc", 6)


def test_a_crash_comes_before_all_else(tmp_path):
    state = [None] * 9 + [Text("crashed: ValueError: no")]
    found = verdict(run_with(tmp_path, {4: [ill("non_finite", 4)]}, **{"torchprobe/state": state}))
    assert found["look_at"][0]["what"] == "The run crashed at step 10: ValueError: no"


@pytest.mark.parametrize(
    ("illness", "rule", "where"),
    [
        ("dead", "vanishing_gradient", "blocks.1.norm2"),
        ("nan", "non_finite", "blocks.2.mlp.0.weight"),
        ("collapse", "attention_logit_growth", "blocks.2.attention"),
        ("spike", "exploding_gradient", None),
    ],
)
def test_a_planted_illness_is_what_the_first_screen_says(tmp_path, capsys, monkeypatch, illness, rule, where):
    monkeypatch.setenv("COLUMNS", "500")
    folder = record(tmp_path / "run", illness, steps=32, every=2, layers=3)
    found = summarise(read_run(folder))
    [first, *_] = found["verdict"]["look_at"]
    assert (first["rules"][0], first["where"], first["step"]) == (rule, where, 16)
    assert main(["report", str(folder)]) == 0
    screen = capsys.readouterr().out.splitlines()[:4]
    assert first["what"] in screen[2]
    assert first["advice"] in screen[3]


# ---- evidence


def test_layers_have_the_step_and_the_exact_zeros(tmp_path):
    dead = [0.5, 0.4, 0.0, 0.0, 0.0]
    write_run(tmp_path, {"grad_mean_abs/dead": dead, "grad_mean_abs/well": [0.2, 0.1, 0.3, 0.2, 0.2]})
    rows = summarise(read_run(tmp_path))["layers_to_look_at"]["smallest mean gradients"]
    assert rows[0] == {"where": "dead", "value": 0.0, "step": 3, "zeros": 3, "points": 5}
    assert (rows[1]["where"], rows[1]["step"], rows[1]["zeros"]) == ("well", 2, 0)


def test_training_is_held_against_validation_at_one_step(tmp_path):
    write_run(tmp_path, {"train/loss": [4.0, 3.0, 2.0, 1.0], "val/loss": [None, 5.0], "val/other": [1.0]})
    found = summarise(read_run(tmp_path))["train_against_validation"]
    assert found == {"loss": {"step": 2, "train": 3.0, "validation": 5.0, "gap": 2.0}}


def test_the_best_is_the_lowest_loss_and_the_highest_accuracy(tmp_path):
    columns = {"val/loss": [3.0, 1.0, 2.0], "val/accuracy": [0.1, 0.9, 0.5], "val/speed": [1.0, 2.0, 3.0]}
    write_run(tmp_path, columns)
    found = summarise(read_run(tmp_path))["final_and_best"]
    assert {tag: (one["final"], one["best"], one["best_step"]) for tag, one in found.items()} == {
        "val/loss": (2.0, 1.0, 2),
        "val/accuracy": (0.5, pytest.approx(0.9), 2),
    }


def test_times_have_a_median_and_a_95th_percentile(tmp_path, capsys):
    seconds = np.arange(1.0, 102.0)
    write_run(tmp_path, {"performance/step_seconds": seconds.tolist()})
    assert summarise(read_run(tmp_path))["performance"] == {"step_seconds": {"median": 51.0, "p95": 96.0}}
    assert main(["report", str(tmp_path)]) == 0
    assert "95th percentile" in capsys.readouterr().out
    run = read_run(tmp_path)
    [table] = [one for one in views_of(run, summarise(run))["tables"] if one["title"] == "Performance"]
    assert table["rows"] == [["step_seconds", 51.0, 96.0]]


# ---- several runs, and one that goes on


@pytest.fixture
def three_runs(tmp_path) -> Path:
    for name, losses in (("a", [3.0, 1.0]), ("b", [3.0, 2.0]), ("c", [3.0, 0.5])):
        write_run(tmp_path / "runs" / name, {"val/loss": losses, "val/accuracy": [1 - loss / 4 for loss in losses]})
    return tmp_path / "runs"


@pytest.mark.parametrize(
    ("options", "order"),
    [(["--sort", "val/loss"], "cab"), (["--sort", "val/loss", "--descending"], "bac"), (["--sort", "accuracy"], "bac")],
)
def test_runs_are_listed_by_any_metric(three_runs, capsys, monkeypatch, options, order):
    monkeypatch.setenv("COLUMNS", "200")
    assert main(["report", str(three_runs), *options, "--json"]) == 0
    assert [Path(row["run"]).name for row in json.loads(capsys.readouterr().out)["runs"]] == list(order)
    assert main(["report", str(three_runs), *options]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if "/runs/" in line]
    assert [line.split(" ")[1][-1] for line in lines] == list(order)


def test_several_runs_are_a_table_and_a_folder_is_listed_below_its_newest(three_runs, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    assert main(["report", str(three_runs / "a"), str(three_runs / "b")]) == 0
    said = capsys.readouterr().out
    assert "course of the run" not in said
    assert f"{three_runs / 'a'}" in said
    assert main(["report", str(three_runs)]) == 0
    said = capsys.readouterr().out
    assert said.startswith(f"{three_runs / 'c'}: 2 steps")
    assert all(f"{three_runs / name}" in said[said.index("\nruns") :] for name in "abc")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--sort", "val/speed"], "--sort: no run has 'val/speed'"),
        (["--follow", "--json"], "--follow: takes one local run"),
        (["--sort", "val/loss", "--html", "x.html"], "--html: takes one run"),
    ],
)
def test_what_does_not_fit_is_said_in_a_line(three_runs, capsys, options, message):
    assert main(["report", str(three_runs), *options]) == 1
    assert message in capsys.readouterr().err


def test_a_report_follows_a_run_until_it_ends(tmp_path):
    writer = EventFileWriter(tmp_path)
    written, out = threading.Event(), io.StringIO()

    def step(number: int, **values) -> None:
        writer.write([Record(number, 1000.0 + number, {"overview/loss": float(number), **values})])

    def go_on(seconds: float) -> None:
        assert not written.is_set(), "asked once more after the end"
        step(2, **{"torchprobe/state": Text("finished")})
        writer.close()
        written.set()

    step(1, **{"torchprobe/state": Text("running")})
    run = follow_now(tmp_path, out, go_on)
    assert (run.steps, written.is_set()) == (2, True)
    assert "2 steps" in out.getvalue()


def follow_now(folder: Path, out: io.StringIO, sleep):
    import torchprobe.reports.summary as summary

    clock = summary.time
    summary.time = lambda: 1000.0  # the run was not silent for long
    try:
        return follow(folder, Console(file=out, width=120), sleep=sleep)
    finally:
        summary.time = clock


def test_what_is_added_to_a_file_is_read_alone_and_a_torn_end_later(tmp_path):
    write_run(tmp_path, {"overview/loss": [1.0, 2.0, 3.0]})
    [file] = tmp_path.glob("*tfevents*")
    whole = file.read_bytes()
    file.write_bytes(whole[:-7])
    files = EventFiles(tmp_path)
    assert files.update()
    assert [point[0] for point in files.contents.scalars["overview/loss"]] == [1, 2]
    assert files.unread
    assert not files.update()
    file.write_bytes(whole)
    assert files.update()
    assert [point[0] for point in files.contents.scalars["overview/loss"]] == [1, 2, 3]
    assert files.unread == []


# ---- comparison


def test_runs_of_unequal_length_are_compared_at_the_step_that_both_have(tmp_path, capsys):
    a = write_run(tmp_path / "a", {"train/loss": [4.0, 2.0, 1.0, 0.5, 0.25]})
    b = write_run(tmp_path / "b", {"train/loss": [4.0, 4.0]})
    [found] = compare(read_run(a), read_run(b)).differences
    assert (found.a, found.b, found.step, found.ratio) == (2.0, 4.0, 2, "x 2")
    assert main(["compare", str(a), str(b)]) == 0
    assert "x 2" in capsys.readouterr().out


def test_numbers_of_unlike_sign_have_a_difference_and_no_ratio(tmp_path):
    a, b = (write_run(tmp_path / name, {"x/gap": [value]}) for name, value in (("a", -0.5), ("b", 0.25)))
    assert compare(read_run(a), read_run(b)).differences[0].ratio == "+0.75"
