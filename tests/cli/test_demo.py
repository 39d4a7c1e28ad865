from __future__ import annotations

import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from torchprobe.cli import main, training
from torchprobe.cli.corpus import standard_library
from torchprobe.cli.training import Progress

SMALL = ["--lines", "1", "--steps", "20", "--batch-size", "8", "--passes", "3", "--device", "cpu"]


def demo(texts: Path, log_dir: Path, *options: str) -> int:
    return main(["demo", "--data", str(texts), "--log-dir", str(log_dir), *SMALL, *options])


def scalars(run: Path) -> dict[str, dict[int, float]]:
    """Values by tag and step, as TensorBoard reads them."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    accumulator = EventAccumulator(str(run), size_guidance={"scalars": 0})
    accumulator.Reload()
    tags = accumulator.Tags()["scalars"]
    return {tag: {event.step: event.value for event in accumulator.Scalars(tag)} for tag in tags}


def test_a_run_trains_reports_and_says_how_to_look_at_it(
    texts: Path, tmp_path: Path, null_sessions: list[Any], capsys: pytest.CaptureFixture[str]
):
    assert demo(texts, tmp_path / "my runs") == 0
    text = capsys.readouterr().out
    assert re.search("from which class of .* does this line come\\? neg, pos", text)
    assert "24 passages of 12 files. Held out: 8 passages of 4 other files." in text
    assert re.search(r"^step 20/20  train loss \d\.\d+  held-out accuracy +\d+\.\d%", text, re.MULTILINE)
    assert "50.0% by chance" in text
    assert text.splitlines()[-2] == "To look at it:"
    assert re.fullmatch(r"  torchprobe view ['\"].*my runs['\"]", text.splitlines()[-1])
    assert not {"\x1b", "\r"} & set(text)


def test_what_is_logged_where(texts: Path, tmp_path: Path, null_sessions: list[Any]):
    demo(texts, tmp_path / "runs", "--every", "7")
    [session] = null_sessions
    assert session.arguments["every"] == 7
    assert session.arguments["log_dir"].parent == tmp_path / "runs"
    assert session.detached
    train = [metrics for prefix, metrics in session.logged if prefix == "train"]
    val = [metrics for prefix, metrics in session.logged if prefix == "val"]
    assert len(train) == 20
    assert len(val) == 2
    assert all(metrics.keys() == {"loss"} for metrics in train)
    assert all(metrics.keys() == {"accuracy", "loss", "epistemic"} for metrics in val)
    assert train[-1]["loss"] < train[0]["loss"]


def test_a_seed_gives_the_same_run_and_another_seed_another(texts: Path, tmp_path: Path, null_sessions: list[Any]):
    for seed in ("1", "1", "2"):
        demo(texts, tmp_path / "runs", "--seed", seed)
    first, again, other = (session.logged for session in null_sessions)
    assert first == again
    assert first != other


def test_epochs_are_passes_over_the_training_text(texts: Path, tmp_path: Path, null_sessions: list[Any]):
    options = ["--epochs", "3", "--batch-size", "5", "--lines", "1", "--passes", "1", "--device", "cpu"]
    assert main(["demo", "--data", str(texts), "--log-dir", str(tmp_path), *options]) == 0
    assert sum(prefix == "train" for prefix, _ in null_sessions[0].logged) == 3 * 5  # 24 passages, 5 a step


def test_every_run_has_a_folder_of_its_own(texts: Path, tmp_path: Path, null_sessions: list[Any]):
    for _ in range(2):
        demo(texts, tmp_path, "--steps", "1")
    first, second = (session.arguments["log_dir"] for session in null_sessions)
    assert first != second
    assert re.fullmatch(r"\d{8}-\d{6}", first.name)


def test_what_one_part_of_a_ready_split_lacks_is_mentioned(
    texts: Path, tmp_path: Path, null_sessions: list[Any], capsys: pytest.CaptureFixture[str]
):
    ready = tmp_path / "ready"
    ready.mkdir()
    for part in ("train", "test"):
        (ready / part).symlink_to(texts, target_is_directory=True)
    (texts / "meh").mkdir()
    (ready / "test").unlink()
    for name in ("pos", "neg"):
        (ready / "test" / name).mkdir(parents=True)
        (ready / "test" / name / "a.txt").write_text("words")
    demo(ready, tmp_path / "runs", "--steps", "1")
    assert "Not used, since only one of train and test has it: meh" in capsys.readouterr().out


def test_ctrl_c_ends_cleanly(
    texts: Path,
    tmp_path: Path,
    null_sessions: list[Any],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    advance = Progress.after_step

    def interrupt(self: Progress, step: int, loss: object) -> None:
        advance(self, step, loss)
        if step == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(Progress, "after_step", interrupt)
    assert demo(texts, tmp_path / "runs") == 130
    assert null_sessions[0].detached
    text = capsys.readouterr().out
    assert "Stopped after step 3; what was recorded until then is kept." in text
    assert "torchprobe view" in text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--data", "no/such/folder"], "error: --data: 'no/such/folder' is not a folder."),
        (["--device", "abacus"], "error: --device: 'abacus' cannot be used ("),
        (["--device", "cuda:99"], "--device cpu always works."),
        (["--log-dir", __file__], "error: --log-dir: cannot make a folder in"),
    ],
)
def test_what_cannot_be_done_is_one_line(
    options: list[str], message: str, texts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    assert demo(texts, tmp_path, *options) == 1
    errors = capsys.readouterr().err.replace("\\", "/")
    assert message in errors
    assert errors.startswith("torchprobe demo: error: ")
    assert len(errors.splitlines()) == 1


def test_instrumented_and_bare_runs_are_the_same_to_the_last_bit(
    texts: Path, tmp_path: Path, request: pytest.FixtureRequest
):
    assert demo(texts, tmp_path / "real", "--every", "5") == 0
    [run] = (tmp_path / "real").iterdir()
    recorded = scalars(run)

    sessions: list[Any] = request.getfixturevalue("null_sessions")
    assert demo(texts, tmp_path / "bare") == 0
    logged = sessions[0].logged

    losses = [metrics["loss"] for prefix, metrics in logged if prefix == "train"]
    assert recorded["train/loss"] == {step: np.float32(loss) for step, loss in enumerate(losses, 1)}
    validations = [metrics for prefix, metrics in logged if prefix == "val"]
    for name in ("accuracy", "loss", "epistemic"):
        expected = [np.float32(metrics[name]) for metrics in validations]
        assert recorded[f"val/{name}"] == dict(zip((10, 20), expected, strict=True))
    assert recorded["grad_norm/blocks.0.attention.output.weight"].keys() == {1, 5, 10, 15, 20}


@pytest.mark.skipif(sys.platform == "win32", reason="SIGINT cannot be sent to one process on Windows")
def test_a_real_ctrl_c_leaves_a_readable_run(texts: Path, tmp_path: Path):
    options = ["--data", str(texts), "--log-dir", str(tmp_path / "runs"), *SMALL, "--steps", "100000"]
    command = [sys.executable, "-m", "torchprobe", "demo", *options]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        _wait_until(lambda: any((tmp_path / "runs").glob("*/*tfevents*")) or process.poll() is not None)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert "Stopped after step" in out
    assert "Traceback" not in err
    [run] = (tmp_path / "runs").iterdir()
    stopped = int(re.search(r"Stopped after step (\d+)", out)[1])
    assert len(scalars(run).get("train/loss", {})) in {stopped, stopped + 1}


@pytest.mark.slow
@pytest.mark.timeout(900)  # half a minute of work, on a machine that may be busy
def test_on_the_standard_library_it_is_far_above_chance_after_a_quarter_of_its_steps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(training, "MIN_STEPS_BETWEEN_VALIDATIONS", 80)  # of eight, which take as long as the training
    options = ["--steps", "80", "--passes", "2", "--device", "cpu"]
    assert main(["demo", "--log-dir", str(tmp_path), *options]) == 0
    [run] = tmp_path.iterdir()
    recorded = scalars(run)
    assert recorded["val/accuracy"][80] >= 2 * standard_library(lines=10, seed=0).majority_share
    assert recorded["train/loss"].keys() == set(range(1, 81))


def _wait_until(condition: Callable[[], bool], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.05)
