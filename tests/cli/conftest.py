from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

import torchprobe


class NullSession:
    """Stands in for torchprobe.Session: keeps what was logged, records nothing."""

    def __init__(self, **arguments: Any) -> None:
        self.arguments = arguments
        self.logged: list[tuple[str, dict[str, float]]] = []
        self.detached = False

    def log_metrics(self, metrics: Mapping[str, Any], prefix: str = "") -> None:
        self.logged.append((prefix, {name: float(torch.as_tensor(value).detach()) for name, value in metrics.items()}))

    def log_predictions(self, probs: Any, targets: Any) -> None:
        assert len(probs) == len(targets)

    def __enter__(self) -> NullSession:
        return self

    def __exit__(self, *_: object) -> None:
        self.detached = True


@pytest.fixture
def null_sessions(monkeypatch: pytest.MonkeyPatch) -> list[NullSession]:
    """Replaces instrument(); the list holds the sessions that were made."""
    made: list[NullSession] = []

    def instrument(model: object, **arguments: Any) -> NullSession:
        made.append(NullSession(**arguments))
        return made[-1]

    monkeypatch.setattr(torchprobe, "instrument", instrument, raising=False)
    return made


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    """Two classes of eight short files each."""
    for name, word in (("pos", "lovely"), ("neg", "dreadful")):
        folder = tmp_path / "texts" / name
        folder.mkdir(parents=True)
        for number in range(8):
            (folder / f"{number}.txt").write_text(f"a {word} film, seen {number} times\nand {word} again\n")
    return tmp_path / "texts"


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Two threads on a busy machine wait for each other; these models are small."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
