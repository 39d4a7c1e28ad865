"""How modules are called in a sampled training pass: in which order, on what, and what becomes of their outputs."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any
from weakref import ReferenceType, ref

import torch
from torch import Tensor, nn

from torchprobe.capture.compat import in_backward
from torchprobe.capture.diagnosis.evidence import Evidence
from torchprobe.capture.outputs import given_tensors, main_tensor, tensors_in
from torchprobe.capture.source import Pass
from torchprobe.naming import named_modules
from torchprobe.probes.base import Reporter
from torchprobe.statistics.dtypes import measurable

NOT_CALLED, BESIDE, NO_GRAD, DETACHED = 1.0, 2.0, 3.0, 4.0
"""Why a parameter that is held has no gradient: its module did not run; its output is not used for the loss, as far as
is known; it ran under `no_grad`; its output was detached."""

_WEIGHTED = (nn.Linear, nn.Bilinear, nn.modules.conv._ConvNd, nn.RNNBase)
_SQUASHING = (nn.Tanh, nn.Sigmoid)
_NORMALISING = (nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm, nn.LocalResponseNorm)
_MANY = 2**18  # elements of an input that are looked at
_BEYOND = 0.97  # of a tanh; a sigmoid is one of half its input


class _Calls:
    """Of one pass: no tensor is kept, only where they lie."""

    def __init__(self, passing: Pass | None) -> None:
        self.of: ReferenceType[Pass] | None = None if passing is None else ref(passing)
        self.order: dict[str, int] = {}  # the first call of each module
        self.without_graph: set[str] = set()
        self.outputs: dict[int, tuple[str, torch.Size]] = {}  # by address: of outputs with a graph
        self.detached: set[str] = set()  # their output is an input without a graph
        self.perhaps: set[str] = set()  # something of its output's shape is
        self.saturated: dict[str, tuple[int, Tensor]] = {}
        self.weighted = False  # a layer with weights was called

    def note_weighted(self) -> None:
        """A layer with weights is called."""
        self.weighted = True


class ModuleCalls:
    """A watcher of eager modules (`capture.eager_hooks`) that own parameters, squash, or normalise."""

    in_validation = False

    def __init__(self, evidence: Evidence, reporter: Reporter | None) -> None:
        self.reporter: Any = reporter
        self._evidence = evidence
        self._now = _Calls(None)
        self._kinds: dict[str, type[nn.Module]] = {}

    def chosen(self, model: nn.Module) -> Iterable[tuple[str, nn.Module]]:
        """Modules that own parameters, and those that squash."""
        found = [
            (name, module)
            for name, module in named_modules(model)
            if isinstance(module, _SQUASHING) or any([p is not None for p in module._parameters.values()])  # noqa: C419
        ]
        self._kinds = {name: type(module) for name, module in found}
        return found

    def before(
        self, passing: Pass, name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        """A chosen module is called."""
        if in_backward():
            return
        if self._now.of is None or self._now.of() is not passing:
            self._now = _Calls(passing)
        calls = self._now
        calls.order.setdefault(name, len(calls.order))
        for tensor in given_tensors(args, kwargs):
            if not tensor.requires_grad and _has_address(tensor):
                self._cut(tensor)
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            self._normalised(name, module, args)
        if not calls.weighted and isinstance(module, (*_WEIGHTED, *_NORMALISING)):
            calls.note_weighted()
            weight = next(module.parameters(recurse=False), None)
            if isinstance(module, _WEIGHTED) and args and weight is not None and weight.requires_grad:
                self._first_input(args[0])

    def after(self, passing: Pass, name: str, output: Any) -> None:
        """It has returned."""
        tensor = main_tensor(output)
        if tensor is None or in_backward() or not _has_address(tensor):
            return
        calls = self._now
        if tensor.requires_grad:
            calls.outputs[tensor.data_ptr()] = name, tensor.shape
        else:
            calls.without_graph.add(name)
        kind = self._kinds.get(name, nn.Module)
        if issubclass(kind, _SQUASHING):
            away = tensor if issubclass(kind, nn.Tanh) else 2 * tensor - 1
            calls.saturated[name] = tensor.data_ptr(), (away.abs() > _BEYOND).float().mean()

    def unseen(self, reason: str) -> None:
        """Inside a graph nothing is seen, and nothing is said."""

    def returned(self, output: Any) -> None:
        """The pass is over. What is the model's own output is no hidden layer."""
        ends = {t.data_ptr() for t in tensors_in(output) if _has_address(t)}
        for name, (address, share) in self._now.saturated.items():
            if address not in ends:
                self._evidence.put(f"saturated/{name}", share)

    def why_without_gradient(self, module: str, with_gradient: Iterable[str]) -> float:
        """Of the last pass: why a module's parameters have no gradient while those of others have. 0: not known."""
        calls = self._now
        if not calls.order:
            return 0.0
        at = calls.order.get(module)
        if at is None:
            return NOT_CALLED
        if module in calls.without_graph:
            return NO_GRAD
        first = min((calls.order[name] for name in with_gradient if name in calls.order), default=None)
        before_all = first is not None and at < first
        return DETACHED if module in calls.detached or (before_all and module in calls.perhaps) else BESIDE

    def _cut(self, given: Tensor) -> None:
        """A module is called with a tensor that has no graph: which outputs it may come from."""
        calls = self._now
        source = calls.outputs.get(given.data_ptr())
        if source is not None and source[1].numel() == given.numel():
            calls.detached.add(source[0])
        elif source is None:
            shapes = calls.outputs.values()
            calls.perhaps.update(
                n for n, size in shapes if size.numel() == given.numel() or size[:2] == given.shape[:2]
            )

    def _first_input(self, given: Any) -> None:
        if not isinstance(given, Tensor) or not _has_address(given) or given.dim() < 2:
            return
        x = given.detach()
        sample = x.reshape(-1)[:: 1 + x.numel() // _MANY].float()
        self._evidence.put("input_scale", sample.std().maximum(sample.mean().abs()))

    def _normalised(self, name: str, module: nn.Module, args: tuple[Any, ...]) -> None:
        if module.training and args and isinstance(args[0], Tensor) and _has_address(args[0]) and args[0].dim() > 1:
            self._evidence.put(f"norm_values/{name}", args[0].numel() / max(1, args[0].shape[1]))


def _has_address(tensor: Tensor) -> bool:
    """Whether it is numbers in memory, which a sparse or a nested tensor is not."""
    return measurable(tensor) and tensor.is_floating_point() and tensor.numel() > 0
