"""Which tokens are padding: by masks that name them, remembered with the sequence whose tokens they are."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from torchprobe.capture.attention.labels import Indices, Label
from torchprobe.capture.attention.layout import blocked, by_name, picked
from torchprobe.capture.attention.places import Places, Tokens, coordinates, named, resolved, whole
from torchprobe.capture.attention.tape import Args
from torchprobe.capture.source import Pass
from torchprobe.naming import Modules
from torchprobe.probes.base import Reporter
from torchprobe.statistics.attention.keys import NEVER_A_LOGIT
from torchprobe.statistics.dtypes import moved


class Padding:
    """The padded tokens of the running pass: bool (batch, tokens), by what batch and tokens count."""

    def __init__(self) -> None:
        self._said: dict[Tokens, Tensor] = {}  # by arguments
        self._masks: dict[Tokens, Tensor] = {}  # by masks on the logits
        self._believed: dict[Tokens, Tensor] = {}  # what arguments said, once it was held against masks

    def clear(self) -> None:
        """The pass is over."""
        self._said.clear()
        self._masks.clear()
        self._believed.clear()

    def say(self, label: Label, batch: int | None, place: int, padded: Tensor) -> None:
        """An argument names the padded tokens. batch, place: dimensions of the labelled tensor, None for no batch."""
        places = resolved(coordinates(label.dims[place], label.at))
        entries = {} if batch is None else resolved(coordinates(label.dims[batch], label.at))
        self.say_of(Tokens(named(entries), whole(places) or named(places)), padded)

    def say_of(self, tokens: Tokens, padded: Tensor) -> None:
        """The same where it is known what batch and tokens count."""
        self._said[tokens] = padded
        self._believed.pop(tokens, None)

    def note(self, where: Places, hidden: Tensor) -> None:
        """A mask on the logits that is one for all heads and queries hides keys: bool (batch, keys).

        It is one of padding where it differs between the sequences of a batch.
        """
        for tokens, at in where.keys.items():
            if tokens.batch and hidden.size(0) > 1:
                self._note(tokens, at, hidden)

    def hold_against(self, where: Places, masked: Tensor, limit: float = NEVER_A_LOGIT) -> None:
        """A mask, or masked logits (batch, heads, queries, keys), of tokens of which no argument that says it is known.

        They are what one names where this hides just its padding from all queries, and these are the keys themselves.
        """
        alike = [each for each in self._said.values() if each.shape == (len(masked), masked.size(-1))]
        begun = [one for one, at in where.queries.items() if at.min() == 0]
        if not alike or masked.size(-2) != masked.size(-1) or not self._said.keys().isdisjoint((*begun, where.joined)):
            return
        hidden = blocked(masked[:, 0], limit).all(1)
        named = torch.stack([each & (each == hidden).all() for each in alike]).any(0)
        for tokens, at in where.keys.items():
            if tokens.batch and (tokens == where.joined or np.array_equal(at, where.queries.get(tokens, ()))):
                self._note(tokens, at, named)

    def _note(self, tokens: Tokens, at: Indices, hidden: Tensor) -> None:
        keys = np.flatnonzero(at >= 0)
        order = keys[np.argsort(at[keys], kind="stable")]
        known = at[order]
        if len(known) <= hidden.size(1) and np.array_equal(known, np.arange(len(known))):
            before, found = self._masks.get(tokens), picked(hidden, order) & (hidden != hidden[:1]).any()
            if before is None:
                self._believed.pop(tokens, None)
            elif before.shape == found.shape:
                found = torch.where(found.any(), found, before)
            self._masks[tokens] = found

    def of(self, where: Places, batch: int, queries: int) -> Tensor | None:
        """Which queries are padded: bool (batch, queries); None where nothing says so."""
        whole = None if where.joined is None else self._padded(where.joined)
        if whole is not None:
            whole = whole.expand(batch, -1) if whole.size(0) in (1, batch) and whole.size(1) == queries else None
        if where.joined in self._said:
            return whole
        found: Tensor | None = None
        for tokens, at in where.queries.items():
            padded = self._padded(tokens)
            padded = self._of_some(tokens, where) if padded is None else padded
            if padded is None or padded.size(0) not in (1, batch) or len(at) != queries or at.max() >= padded.size(1):
                continue
            each = picked(padded, at.clip(0)).expand(batch, -1)
            if at.min() < 0:  # some are of another sequence: all of this one has to be among them, for a shift is none
                if len(np.unique(at)) <= padded.size(1):
                    continue
                each = each & moved(torch.from_numpy(at >= 0), each.device)
            found = each if found is None else found | each
        return whole if found is None else found

    def _of_some(self, tokens: Tokens, where: Places) -> Tensor | None:
        """The same of some of the sequences, where all of a batch are known."""
        for each in {**self._said, **self._masks}:
            counted = [*each.batch] if each.place == tokens.place and isinstance(each.batch, frozenset) else []
            at = where.entries.get(counted[0][0]) if len(counted) == 1 else None
            padded = None if at is None else self._padded(each)
            if at is None or padded is None or counted[0][1] != np.arange(len(padded)).tobytes():
                continue
            if at.min() >= 0 and at.max() < len(padded):
                return padded.index_select(0, moved(torch.from_numpy(at), padded.device))
        return None

    def _padded(self, tokens: Tokens) -> Tensor | None:
        """What an argument says, unless it means the opposite: all is padding, or just what no mask hides."""
        said, masks = self._said.get(tokens), self._masks.get(tokens)
        if said is None:
            return masks
        if tokens not in self._believed:
            sensible = said & ~said.all()
            if masks is not None and masks.shape == said.shape:
                sensible = torch.where((masks != said).all(), masks, sensible)
            self._believed[tokens] = sensible
        return self._believed[tokens]


# ---- arguments that name it

_KEEPS = "attention_mask"
_WORDS = (_KEEPS, "key_padding_mask", "padding_mask")


class MaskArguments:
    """Looks at the calls of modules that take such a mask, the model's own included.

    `attention_mask` is not 0 for tokens, or is added and hides the others; `padding_mask` is true for padding; whatever
    stands before. The tokens are those of the arguments with the same beginning: `decoder_attention_mask` goes with
    `decoder_input_ids`.
    """

    in_validation = True

    def __init__(self, reporter: Reporter, say: Callable[[Tensor, Tensor], None]) -> None:
        """say: takes tokens (batch, tokens, …), and which are padded: bool (batch, tokens)."""
        self.reporter = reporter
        self._say = say

    def chosen(self, modules: Modules) -> Iterator[tuple[str, nn.Module]]:
        """The modules whose code takes such an argument; PyTorch's own hand theirs on."""
        for name, module in modules:
            kind: Any = type(module)
            if not kind.__module__.startswith("torch.") and any(_beginning(p) is not None for p in _parameters(kind)):
                yield name, module

    def before(self, passing: Pass, name: str, module: nn.Module, args: Args, kwargs: dict[str, Any]) -> None:
        """One of them is called."""
        call = by_name(_parameters(cast("Any", type(module))), args, kwargs)
        masks = {name: value for name, value in call.items() if _is_mask(name, value)}
        for each, mask in masks.items():
            padded = _left_out(mask) if each.endswith(_KEEPS) else mask
            for tokens in _tokens(call, each, mask):
                self._say(tokens, padded)

    def after(self, passing: Pass, name: str, output: Any) -> None:
        """It has returned."""

    def unseen(self, reason: str) -> None:
        """A compiled model: what is read inside its graphs goes by masks alone."""


@cache
def _parameters(kind: Any) -> tuple[str, ...]:
    try:
        return tuple(inspect.signature(kind.forward).parameters)[1:]
    except (AttributeError, TypeError, ValueError):  # a forward that Python cannot look into; a class of torch.jit's
        return ()


def _beginning(name: str) -> str | None:
    """What stands before the word in the name of a mask; None for any other name."""
    return next((name.removesuffix(word).rstrip("_") for word in _WORDS if name.endswith(word)), None)


def _is_mask(name: str, value: Any) -> bool:
    if _beginning(name) is None or not isinstance(value, Tensor) or value.dim() != 2:
        return False
    return name.endswith(_KEEPS) or value.dtype is torch.bool


def _left_out(mask: Tensor) -> Tensor:
    return torch.where((mask < 0).any(), blocked(mask), mask == 0) if mask.is_floating_point() else mask == 0


def _tokens(call: Mapping[str, Any], mask_name: str, mask: Tensor) -> Iterator[Tensor]:
    """What has an entry for each of the mask's, and a name that begins as that of this mask, and of no longer one."""
    beginning = _beginning(mask_name) or ""
    longer = [other for name in call if (other := _beginning(name)) and len(other) > len(beginning)]
    for name, value in call.items():
        if not isinstance(value, Tensor) or _beginning(name) is not None or value.shape[:2] != mask.shape:
            continue
        of_keys = mask_name.endswith("key_padding_mask") and "key" in call
        if name == "key" if of_keys else name.startswith(beginning) and not name.startswith(tuple(longer)):
            yield value
