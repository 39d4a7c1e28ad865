"""Chooses the modules whose outputs are captured, and puts the shared hook on them and off."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from typing import NamedTuple
from weakref import ReferenceType, WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from torchprobe.buffer.step import Piece
from torchprobe.capture.compat import skip_frames as keep_out
from torchprobe.capture.gate import Gate
from torchprobe.capture.passes import ROOT_KEY
from torchprobe.capture.sites import SITE, Pass, Site, observe_output
from torchprobe.capture.taps import Memo, Tap
from torchprobe.naming import named_modules
from torchprobe.probes.base import Probe

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
    leaf = all(name == PARAMETRIZATIONS for name, _ in module.named_children())
    return leaf and next(module.parameters(recurse=False), None) is not None


class ModuleCapture:
    """The hooks on modules: on for sampled steps, off for all others.

    Where a hook found itself being traced by `torch.compile` (`current.compiled`), hooks stay on,
    since a compiled graph never sees a later one, and only the gates' flags change.
    """

    def __init__(
        self,
        model: ReferenceType[nn.Module],
        gates: Mapping[Probe, Gate],
        wanted: Callable[[str, nn.Module], bool],
    ) -> None:
        self._model = model
        self._gates = {probe: gate for probe, gate in gates.items() if probe.source.startswith("output")}
        self._all_gates = [gate for probe, gate in gates.items() if probe in self._gates or probe.source == "attention"]
        self._wanted = wanted
        self._sites: WeakKeyDictionary[nn.Module, Site] = WeakKeyDictionary()
        self._handles: list[RemovableHandle] = []
        self._armed: tuple[bool, int] | None = None
        self._memo = Memo()
        self.current = Pass()
        keep_out(observe_output)

    def follow_gates(self) -> None:
        """The gates were opened or closed: compiled graphs go by one flag for all probes."""
        sampled = sampled_val = False
        for gate in self._all_gates:
            sampled |= gate.train
        for gate in self._gates.values():
            sampled_val |= gate.val
        self.current.sampled, self.current.sampled_val = sampled, sampled_val

    def due(self, training: bool) -> bool:
        """Whether a probe of outputs samples the coming pass."""
        return any(gate.train if training else gate.val for gate in self._gates.values())

    def arm(self, training: bool) -> None:
        """Put hooks on the modules of the coming pass: all of them, or those that evaluation allows."""
        model = self._model()
        if model is None or not self._gates:
            return
        if self._armed == (training, _hooks_on(model)):
            return
        if self.current.compiled and self._handles:
            return
        self._remove()
        for name, module, in_eval in chosen_modules(model, self._wanted):
            if training or in_eval:
                self._hook(name, module, model)
        self._armed = training, _hooks_on(model)

    def disarm(self) -> None:
        """Take the hooks off, unless a compiled graph holds them."""
        if not self.current.compiled:
            self._remove()

    def detach(self) -> None:
        """Take everything off: hooks and the sites' state."""
        self._remove()
        for module in list(self._sites):
            module.__dict__.pop(SITE, None)
        self._sites.clear()

    def collect(self, due: Container[Probe], training: bool, scale: Tensor | None = None) -> list[Piece]:
        """The merged rows of the step or of the validation pass, for the probes due; the rows start anew.

        scale: what GradScaler multiplied the loss with, and so the gradients of outputs.
        """
        groups: defaultdict[tuple[Probe, torch.device], list[tuple[str, Tensor]]] = defaultdict(list)
        in_place: list[Tensor] = []
        for site in self._sites.values():
            for tap in (*site.outputs, *site.gradients):
                row = tap.take(training, self.current.compiled)
                if tap.probe in due:  # a compiled graph feeds all probes whenever it feeds one
                    groups[tap.probe, row.device].append((site.name, row))
                if self.current.compiled or not row.is_cpu:
                    in_place.append(tap.train if training else tap.val)
        prefix = "" if training else "val/"
        pieces = [_piece(probe, rows, prefix, scale) for (probe, _), rows in groups.items()]
        if in_place:
            torch._foreach_zero_(in_place)
        return pieces

    def _hook(self, name: str, module: nn.Module, model: nn.Module) -> None:
        if module not in self._sites:
            self._sites[module] = self._site(name, module, model)
        module.__dict__[SITE] = self._sites[module]
        is_root = ROOT_KEY in module.__dict__  # whose pass is over, for us, when the hook that is there has run
        self._handles.append(module.register_forward_hook(observe_output, prepend=is_root))

    def _site(self, name: str, module: nn.Module, model: nn.Module) -> Site:
        device = _device_of(module) or _device_of(model) or torch.device("cpu")
        taps = [Tap(probe, gate, device, self._memo) for probe, gate in self._gates.items()]
        outputs = tuple(tap for tap in taps if tap.probe.source == "outputs")
        gradients = tuple(tap for tap in taps if tap.probe.source == "output_gradients")
        return Site(name, self.current, outputs, gradients)

    def _remove(self) -> None:
        while self._handles:
            self._handles.pop().remove()
        self._armed = None


def _hooks_on(model: nn.Module) -> int:
    """Changes when a model grows, or gets a hook after ours that may change the output, as tensor parallelism adds."""
    return sum(1 + len(module._forward_hooks) for module in model.modules())


def _device_of(module: nn.Module) -> torch.device | None:
    parameter = next(module.parameters(), None)
    return None if parameter is None or parameter.device.type == "meta" else parameter.device


def _piece(probe: Probe, named_rows: Sequence[tuple[str, Tensor]], prefix: str, scale: Tensor | None) -> Piece:
    names, rows = zip(*named_rows, strict=True)
    stacked = torch.stack(rows)
    if scale is not None and probe.source == "output_gradients":
        stacked = probe.unscale(stacked, scale.to(stacked.device, stacked.dtype))
    return Piece(probe, names, stacked, prefix, counted=True)
