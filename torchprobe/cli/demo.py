"""`torchprobe demo`: train a small Bayesian transformer on text that every machine has, fully instrumented."""

from __future__ import annotations

import argparse
import math
import shlex
import subprocess
import sys
import time
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

from torchprobe.cli.arguments import CommandError, add_command, positive_float, positive_int, probability, seed_number
from torchprobe.cli.corpus import Corpus, labelled_folder, standard_library

if TYPE_CHECKING:
    import torch
    from rich.console import Console

    from torchprobe.cli.training import Settings

WORDS = 128
VOCABULARY = 8192
INTERRUPTED = 130

_DESCRIPTION = """\
Train a small transformer with Monte-Carlo dropout and record everything torchprobe measures.

The task: from which standard-library package do these ten lines of source come? Up to ten
packages of the running Python are the classes. Files are split: a quarter of each package's
files is held out, and no file is in both parts. Blank lines are dropped, package names are
blanked out, and a passage is cut after 128 words. Nothing is downloaded. It takes about a
minute on two CPU cores.

With --data the same is done for texts of yours: DIR holds one sub-folder of text files a
class (DIR/pos, DIR/neg), or such folders in DIR/train and DIR/test.
"""

_EXAMPLES = """\
examples:
  torchprobe demo
  torchprobe demo --steps 100 --device cpu
  torchprobe demo --data aclImdb --lines 1 --epochs 2

then:
  torchprobe view runs/demo
"""


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command's options to the command line."""
    about = "train a small model on text that is on every machine, and record everything"
    parser = add_command(commands, "demo", run, about=about, description=_DESCRIPTION, examples=_EXAMPLES)
    data = parser.add_argument_group("what to read and where to write")
    data.add_argument("--data", type=Path, metavar="DIR", help="folder of texts (default: the standard library)")
    data.add_argument(
        "--lines", type=positive_int, default=10, metavar="N", help="non-blank lines a passage (default: 10)"
    )
    place = "each run gets a new, time-stamped folder in here (default: runs/demo)"
    data.add_argument("--log-dir", type=Path, default=Path("runs", "demo"), metavar="DIR", help=place)
    _add_training_options(parser)


def run(arguments: argparse.Namespace) -> int:
    """Read the text, train, print the table and the line that shows the run. Returns the exit code."""
    from rich.console import Console

    console = Console(markup=False, highlight=False, soft_wrap=True)  # paths are neither wrapped nor taken for markup
    given = {"lines": arguments.lines, "seed": arguments.seed}
    corpus = standard_library(**given) if arguments.data is None else labelled_folder(arguments.data, **given)
    console.print(*_introduction(arguments, corpus), sep="\n")
    settings = _settings(arguments, corpus)
    console.print(f"Recording to {settings.log_dir}")
    return _train(console, arguments, corpus, settings)


def _add_training_options(parser: argparse.ArgumentParser) -> None:
    training = parser.add_argument_group("how to train")
    length = training.add_mutually_exclusive_group()
    length.add_argument("--steps", type=positive_int, default=300, metavar="N", help="optimizer steps (default: 300)")
    length.add_argument("--epochs", type=positive_int, metavar="N", help="as many steps as N passes over the text take")
    options = (
        ("--batch-size", positive_int, 32, "N", "passages a step"),
        ("--learning-rate", positive_float, 2e-3, "X", "highest learning rate, after the warm-up"),
        ("--dropout", probability, 0.3, "P", "share of activations dropped, in training and in Monte-Carlo passes"),
        ("--passes", positive_int, 8, "N", "Monte-Carlo passes at a validation; 1 gives no epistemic uncertainty"),
        ("--every", positive_int, 10, "N", "record attention, gradients and the like every N steps"),
        ("--seed", seed_number, 0, "N", "of the split, the weights and the order"),
        ("--device", str, "auto", "NAME", "cpu, cuda, mps, ...; auto takes an accelerator if there is one"),
    )
    for name, kind, default, metavar, text in options:
        training.add_argument(name, type=kind, default=default, metavar=metavar, help=f"{text} (default: {default})")


def _introduction(arguments: argparse.Namespace, corpus: Corpus) -> list[str]:
    source = "standard-library package" if arguments.data is None else f"class of {arguments.data}"
    train, held_out = corpus.train, corpus.held_out
    passage = "does this line" if arguments.lines == 1 else f"do these {arguments.lines} lines"
    lines = [
        f"Task: from which {source} {passage} come? {', '.join(corpus.classes)}",
        f"To train on: {len(train.passages)} passages of {len(train.files)} files. "
        f"Held out: {len(held_out.passages)} passages of {len(held_out.files)} other files.",
    ]
    if corpus.ignored:
        lines.append(f"Not used, since only one of train and test has it: {', '.join(corpus.ignored)}")
    return lines


def _settings(arguments: argparse.Namespace, corpus: Corpus) -> Settings:
    from torchprobe.cli.training import Settings

    steps = arguments.steps
    if arguments.epochs is not None:
        steps = arguments.epochs * math.ceil(len(corpus.train.passages) / arguments.batch_size)
    return Settings(
        **{name: getattr(arguments, name) for name in ("batch_size", "learning_rate", "passes", "every", "seed")},
        steps=steps,
        device=_device(arguments.device),
        log_dir=_new_folder(arguments.log_dir),
    )


def _device(name: str) -> torch.device:
    """The device of that name, tried out; raises CommandError when there is none."""
    import torch

    if name == "auto":
        found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
        return found or torch.device("cpu")
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise CommandError(f"--device: '{name}' cannot be used ({reason}). --device cpu always works.") from error
    return device


def _new_folder(log_dir: Path) -> Path:
    """A new folder in log_dir, named for the time; a second one in the same second gets a number."""
    from torchprobe.writers.run_directory import new_folder

    try:
        return new_folder(log_dir, f"{datetime.now():%Y%m%d-%H%M%S}")
    except OSError as error:
        raise CommandError(f"--log-dir: cannot make a folder in '{log_dir}': {error.strerror}") from error


def _train(console: Console, arguments: argparse.Namespace, corpus: Corpus, settings: Settings) -> int:
    import torch

    from torchprobe.cli.bayesian_transformer import BayesianTransformer
    from torchprobe.cli.training import Data, Progress, summary_table, train

    torch.manual_seed(settings.seed)
    model = BayesianTransformer(len(corpus.classes), vocabulary=VOCABULARY, length=WORDS, dropout=arguments.dropout)
    model.to(settings.device)
    data = Data.of(corpus, WORDS, VOCABULARY)
    start = time.monotonic()
    progress = Progress(console, settings.steps)
    try:
        with progress:
            validation = train(model, data, settings, progress)
    except KeyboardInterrupt:
        console.print(f"Stopped after step {progress.completed}; what was recorded until then is kept.")
        console.print(_view_lines(arguments.log_dir))
        return INTERRUPTED
    table = summary_table(corpus, validation, steps=settings.steps, seconds=time.monotonic() - start)
    console.print(table, soft_wrap=False)
    _print_verdict(console, settings.log_dir)
    console.print(_view_lines(arguments.log_dir))
    return 0


def _print_verdict(console: Console, log_dir: Path) -> None:
    """What `torchprobe report` says first of the run, and where in it to look."""
    from torchprobe.reports.run import NoRunError, read_run
    from torchprobe.reports.summary import summarise
    from torchprobe.reports.terminal import verdict_lines

    try:
        run = read_run(log_dir)
    except NoRunError:  # the disk was full
        return
    console.print()
    for line in verdict_lines(summarise(run)["verdict"]):
        console.print(line, soft_wrap=False)
    norm = "overview/grad_norm_unclipped"
    shown = [norm] if norm in run.scalars else ["overview/grad_norm"]
    look = ["val/calibration/ece", "val/overview/epistemic", *shown]
    console.print(
        f"Worth a look: {', '.join(tag for tag in look if tag in run.scalars)}, and the heads in the Probe tab."
    )


def _view_lines(log_dir: Path) -> str:
    command = ["torchprobe", "view", str(log_dir)]
    quoted = subprocess.list2cmdline(command) if sys.platform == "win32" else shlex.join(command)
    return f"To look at it:\n  {quoted}"
