from __future__ import annotations

import io
import math
from dataclasses import replace
from pathlib import Path

from rich.console import Console

from torchprobe.cli.bayesian_transformer import Validation
from torchprobe.cli.corpus import Corpus, Part
from torchprobe.cli.training import summary_table

CORPUS = Corpus(
    classes=("asyncio", "json"),
    train=Part(("x",), (0,), (Path("a"),)),
    held_out=Part(("x", "y", "z"), (0, 0, 1), (Path("b"),)),
)
VALIDATION = Validation(
    accuracy=0.6, loss=0.5, epistemic=0.15, epistemic_right=0.1, epistemic_wrong=0.3, class_accuracy=(0.5, 0.75)
)


def text_of(validation: Validation) -> str:
    file = io.StringIO()
    Console(file=file, width=140).print(summary_table(CORPUS, validation, steps=300, seconds=41.4))
    return file.getvalue()


def row(text: str, measure: str) -> str:
    return next(line for line in text.splitlines() if measure in line)


def test_accuracy_stands_beside_both_ways_of_guessing():
    accuracy = row(text_of(VALIDATION), "accuracy")
    for part in ("60.0%", "50.0% by chance", "66.7% by always naming the commonest class"):
        assert part in accuracy


def test_loss_stands_beside_that_of_chance():
    assert "0.693 nats by chance" in row(text_of(VALIDATION), "loss")


def test_doubt_where_wrong_is_compared_with_doubt_where_right():
    assert "0.300 nats" in row(text_of(VALIDATION), "where wrong")
    assert "3.0 times as high as where right" in row(text_of(VALIDATION), "where wrong")


def test_a_model_that_is_never_wrong_has_nothing_to_compare():
    wrong = row(text_of(replace(VALIDATION, epistemic_wrong=math.nan)), "where wrong")
    assert "no such passage" in wrong
    assert "times" not in wrong


def test_the_easiest_and_hardest_class_and_the_cost_are_named():
    text = text_of(VALIDATION)
    assert "json" in row(text, "easiest")
    assert "asyncio" in row(text, "hardest")
    assert "300 steps" in row(text, "training")
    assert "41 s" in row(text, "training")
