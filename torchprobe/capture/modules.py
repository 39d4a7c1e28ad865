"""Chooses the modules whose outputs are captured, and puts the shared hook on them and off."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple
from weakref import ReferenceType

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from torch.utils.weak import WeakIdKeyDictionary

from torchprobe.buffer.step import Piece
from torchprobe.capture.compat import skip_frames
from torchprobe.capture.marks import ROOT_KEY, mark, unmark
from torchprobe.capture.sites import SITE, Kept, Memo, Site, Tap, observe_output
from torchprobe.capture.source import Running
from torchprobe.naming import all_modules, named_modules
from torchprobe.probes.base import Probe, Reporter
from torchprobe.statistics.dtypes import moved

PARAMETRIZATIONS = "parametrizations"  # where torch keeps what makes a weight of other parameters; no layers of a model
# A hook below one of these turns off its fused inference path, which changes padded outputs.
_FAST_IN_EVAL = (nn.TransformerEncoder, nn.TransformerEncoderLayer, nn.MultiheadAttention)


class Chosen(NamedTuple):
    """A module to capture. in_eval is False where a hook would change what the model computes."""

    name: str
    module: nn.Module
    in_eval: bool


def chosen_modules(model: nn.Module, wanted: Callable[[str, nn.Module], bool]) -> Iterator[Chosen]:
    """The modules that `wanted` picks, in the order of `named_modules()`."""
    fast: set[nn.Module] = set()
    for name, module in named_modules(model):
        if module in fast or isinstance(module, _FAST_IN_EVAL):
            fast.update(module.modules())
        if wanted(name, module):
            yield Chosen(name, module, module not in fast)


def interesting(module: nn.Module) -> bool:
    """The default choice: leaves that have parameters, and attention and normalisation blocks."""
    kind = type(module).__name__.lower()
    if "attention" in kind or "attn" in kind or "norm" in kind:
        return True
    leaf = all([name == PARAMETRIZATIONS for name, child in module._modules.items() if child is not None])  # noqa: C419
    return leaf and any([parameter is not None for parameter in module._parameters.values()])  # noqa: C419


class OutputSource:
    """Outputs of modules and their gradients: hooks that are on for sampled passes, off for all others.

    Where a hook found itself being traced by `torch.compile` (`running.compiled`), hooks stay on, since a compiled
    graph never sees a later one, and only flags change.
    """

    names = ("outputs", "output_gradients")

    def __init__(
        self,
        model: ReferenceType[nn.Module],
        reporters: Sequence[Reporter],
        wanted: Callable[[str, nn.Module, Probe], bool],
        running: Running,
    ) -> None:
        self._model = model
        self._reporters = [reporter for reporter in reporters if reporter.source in self.names]
        self._wanted = wanted
        self._running = running
        self._sites: WeakIdKeyDictionary = WeakIdKeyDictionary()
        self._handles: list[RemovableHandle] = []
        self._hooked: list[ReferenceType[nn.Module]] = []
        self._armed: tuple[bool, list[tuple[str, int, int]]] | None = None
        self._memo = Memo()
        skip_frames(observe_output)

    def wants(self, due: frozenset[Reporter]) -> bool:
        """Whether a probe of outputs is among those due."""
        return not due.isdisjoint(self._reporters)

    def watched(self) -> Iterator[tuple[Reporter, str]]:
        """Whose outputs, and their gradients, are captured, by module."""
        for site in self._sites.values():
            for tap in (*site.outputs, *site.gradients):
                yield tap.reporter, tap.name

    def arm(self, training: bool) -> None:
        """Put hooks on the modules of the coming pass: all of them, or those that evaluation allows."""
        model = self._model()
        if model is None or not self._reporters:
            return
        if self._armed == (training, _hooks_on(model)):
            return
        if self._running.compiled and self._handles:
            return
        self._remove()
        for name, module, in_eval in chosen_modules(model, self._is_wanted):
            if training or in_eval:
                self._hook(name, module)
        self._armed = training, _hooks_on(model)

    def disarm(self) -> None:
        """Take the hooks off, unless a compiled graph holds them."""
        if not self._running.compiled:
            self._remove()

    def detach(self) -> None:
        """Take everything off: hooks and the sites' state."""
        self._remove()
        self._sites.clear()

    def merge(self, a: Kept, b: Kept) -> Kept:
        """Rows of both, tap by tap."""
        for tap, rows in b.items():
            a[tap] = tap.shortened([*a[tap], *rows]) if tap in a else rows
        return a

    def rows(
        self, kept: Kept, training: bool, due: frozenset[Reporter], scale: float | Tensor | None = None
    ) -> list[Piece]:
        """The merged rows for the probes due. scale: what the gradients of outputs were multiplied with."""
        groups: defaultdict[tuple[Reporter, torch.device], list[tuple[str, Tensor, int]]] = defaultdict(list)
        for tap, rows in kept.items():
            if tap.reporter in due and not tap.reporter.gate.failed:
                with tap.reporter.gate.boundary(), torch.no_grad():
                    row, calls = tap.merged(rows)
                    groups[tap.reporter, row.device].append((tap.name, row, calls))
        prefix = "" if training else "val/"
        return [_piece(reporter, rows, prefix, scale) for (reporter, _), rows in groups.items()]

    def _hook(self, name: str, module: nn.Module) -> None:
        mark(module, SITE, self._sites[module])
        is_root = ROOT_KEY in module.__dict__  # whose pass is over, for us, when the hook that is there has run
        self._handles.append(module.register_forward_hook(observe_output, prepend=is_root))
        self._hooked.append(ReferenceType(module))

    def _is_wanted(self, name: str, module: nn.Module) -> bool:
        known = self._sites.get(module)
        if known is not None and known.name == name:  # a module that was put elsewhere has another name
            return True
        mine = [reporter for reporter in self._reporters if self._wants(reporter, name, module)]
        if mine:
            self._sites[module] = self._site(name, mine)
        return bool(mine)

    def _wants(self, reporter: Reporter, name: str, module: nn.Module) -> bool:
        """Whether a probe watches a module; a predicate of the user's that raises switches it off."""
        gate = reporter.gate
        if gate.failed:
            return False
        with gate.boundary():
            return self._wanted(name, module, reporter.probe)
        return False  # the boundary took an exception

    def _site(self, name: str, mine: Sequence[Reporter]) -> Site:
        outputs, gradients = (
            tuple([Tap(name, r, self, self._running, self._memo) for r in mine if r.source == source])
            for source in self.names
        )
        return Site(name, self._running, outputs, gradients)

    def _remove(self) -> None:
        while self._handles:
            self._handles.pop().remove()
        while self._hooked:
            module = self._hooked.pop()()
            if module is not None:
                unmark(module, SITE)
        self._armed = None


def _hooks_on(model: nn.Module) -> list[tuple[str, int, int]]:
    """Changes when a model grows, or gets a hook after ours that may change the output, as tensor parallelism adds."""
    return [(name, id(module), len(module._forward_hooks)) for name, module in all_modules(model)]


def _piece(
    reporter: Reporter, named_rows: Sequence[tuple[str, Tensor, int]], prefix: str, scale: float | Tensor | None
) -> Piece:
    names, rows, calls = zip(*named_rows, strict=True)
    stacked = torch.stack(rows)
    counts = moved(torch.tensor(calls, dtype=stacked.dtype, device="cpu"), stacked.device)
    stacked = torch.cat((stacked, counts[:, None]), dim=1)
    piece = Piece(reporter, names, stacked, prefix, counted=True)
    return piece if scale is None else piece.unscaled(scale)
