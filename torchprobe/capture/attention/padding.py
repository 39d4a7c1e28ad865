"""Which tokens are padding: by masks that name them, remembered with the sequence whose tokens they are."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from torchprobe.capture.attention.labels import Indices, Label, Root
from torchprobe.capture.attention.places import Places, Tokens, coordinates, resolved
from torchprobe.statistics.dtypes import moved


class Padding:
    """The padded tokens of the running pass: bool (batch, tokens), by what batch and tokens count."""

    def __init__(self) -> None:
        self._said: dict[Tokens, Tensor] = {}  # by arguments
        self._masks: dict[Tokens, Tensor] = {}  # by masks on the logits

    def clear(self) -> None:
        """The pass is over."""
        self._said.clear()
        self._masks.clear()

    def say(self, label: Label, batch: int | None, place: int, padded: Tensor) -> None:
        """An argument names the padded tokens. batch, place: dimensions of the labelled tensor, None for no batch."""
        place_root, batch_root = _whole(label, place), None if batch is None else _whole(label, batch)
        if place_root is not None and (batch is None or batch_root is not None or padded.size(0) == 1):
            self.say_of(Tokens(batch_root, place_root), padded)

    def say_of(self, tokens: Tokens, padded: Tensor) -> None:
        """The same where it is known what batch and tokens count."""
        self._said[tokens] = padded

    def note(self, where: Places, hidden: Tensor) -> None:
        """A mask on the logits that is one for all heads and queries hides keys: bool (batch, keys).

        It is one of padding where it differs between the sequences of a batch.
        """
        for tokens, at in where.keys.items():
            if tokens.batch is not None and hidden.size(0) > 1:
                self._note(tokens, at, hidden)

    def _note(self, tokens: Tokens, at: Indices, hidden: Tensor) -> None:
        keys = np.flatnonzero(at >= 0)
        order = keys[np.argsort(at[keys], kind="stable")]
        known = at[order]
        if len(known) <= hidden.size(1) and np.array_equal(known, np.arange(len(known))):
            differs = (hidden != hidden[:1]).any()
            self._masks[tokens] = _picked(hidden, order) & differs

    def of(self, where: Places, batch: int, queries: int) -> Tensor | None:
        """Which queries are padded: bool (batch, queries); None where nothing says so."""
        if where.tokens is None or where.at is None:
            return None
        padded = self._said.get(where.tokens, self._masks.get(where.tokens))
        if padded is None or padded.size(0) not in (1, batch) or len(where.at) != queries:
            return None
        if where.at.min(initial=0) < 0 or where.at.max(initial=0) >= padded.size(1):
            return None
        return _picked(padded, where.at).expand(batch, -1)


def _picked(x: Tensor, index: Indices) -> Tensor:
    if np.array_equal(index, np.arange(len(index))):
        return x[:, : len(index)]
    return x.index_select(1, moved(torch.from_numpy(index), x.device))


def _whole(label: Label, axis: int) -> Root | None:
    """What a dimension counts, where it counts one thing from its beginning."""
    values = resolved(coordinates(label.dims[axis], label.at))
    if len(values) != 1:
        return None
    root, value = next(iter(values.items()))
    return root if np.array_equal(value, np.arange(len(value))) else None
