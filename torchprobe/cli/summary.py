"""The table at the end of the demo."""

from __future__ import annotations

import math

from rich.table import Table

from torchprobe.cli.corpus import Corpus
from torchprobe.cli.validation import Validation


def summary_table(corpus: Corpus, validation: Validation, *, steps: int, seconds: float) -> Table:
    """What the model does on held-out files, beside what guessing would do."""
    classes = len(corpus.classes)
    table = Table(title="On held-out files", title_justify="left")
    table.add_column("measure")
    table.add_column("value", justify="right")
    table.add_column("by comparison")
    guess = f"{1 / classes:.1%} by chance, {corpus.majority_share:.1%} by always naming the commonest class"
    table.add_row("accuracy", f"{validation.accuracy:.1%}", guess)
    table.add_row("loss", f"{validation.loss:.3f} nats", f"{math.log(classes):.3f} nats by chance")
    table.add_row("epistemic, where right", _nats(validation.epistemic_right), "doubt about its own weights")
    table.add_row("epistemic, where wrong", _nats(validation.epistemic_wrong), _ratio(validation))
    for measure, (name, accuracy) in _extreme_classes(corpus, validation):
        table.add_row(measure, f"{accuracy:.1%}", name)
    table.add_row("training", f"{steps} steps", f"{seconds:.0f} s with validation and recording")
    return table


def _extreme_classes(corpus: Corpus, validation: Validation) -> list[tuple[str, tuple[str, float]]]:
    by_accuracy = sorted(zip(corpus.classes, validation.class_accuracy, strict=True), key=lambda pair: pair[1])
    return [("easiest class", by_accuracy[-1]), ("hardest class", by_accuracy[0])]


def _ratio(validation: Validation) -> str:
    """How much more the model doubts its mistakes; empty when there is nothing to compare."""
    right, wrong = validation.epistemic_right, validation.epistemic_wrong
    return f"{wrong / right:.1f} times as high as where right" if right > 0 and not math.isnan(wrong) else ""


def _nats(value: float) -> str:
    return "no such passage" if math.isnan(value) else f"{value:.3f} nats"
