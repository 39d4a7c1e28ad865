"""Outputs of the model's parts in one pass: chosen modules, and the members of ensembles inside the model."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from fnmatch import fnmatchcase
from functools import partial
from typing import Any, NamedTuple
from weakref import ReferenceType, ref

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from torchprobe.capture.compat import in_backward, under_transform
from torchprobe.capture.compiled.graphs import has_compiled_part, in_compiled_call
from torchprobe.capture.modules import hookable
from torchprobe.capture.predictions.inputs import InputKey
from torchprobe.naming import ROOT, all_modules, named_modules

OnOutput = Callable[[str, nn.Module, Sequence[Any], Mapping[str, Any], Any], None]
Protect = Callable[[Any], AbstractContextManager[None]]


class Site(NamedTuple):
    """A module that gets a hook: as a part that was chosen, or as a member of an ensemble."""

    module: ReferenceType[nn.Module]
    name: str
    number: int | None  # of the member


class Parts:
    """Hooks on parts of the model, on between the start and the end of a sampled pass.

    modules: patterns of the names of modules to read. on_output: called with the output of each such one. protected:
    the boundary around what is done with an output. What may be an ensemble are two or more modules of one class in an
    `nn.ModuleList`, called with the same input.
    """

    def __init__(
        self, model: ReferenceType[nn.Module], modules: Sequence[str], on_output: OnOutput, protected: Protect
    ) -> None:
        self._model = model
        self._protected = protected
        self._modules = modules
        self._on_output = on_output
        self._sites: dict[bool, list[Site]] = {}  # in training, and in validation
        self._handles: list[RemovableHandle] = []
        self._calls: defaultdict[str, list[tuple[int, InputKey, Any]]] = defaultdict(list)

    def arm(self, training: bool) -> None:
        """A sampled pass begins. Nothing inside a compiled model gets a hook: it would be compiled anew."""
        self.disarm()
        if training not in self._sites:
            self._sites[training] = list(self._find(training))
        if in_compiled_call():
            return
        for site in self._sites[training]:
            module = site.module()
            if module is not None:
                self._handles.append(module.register_forward_hook(partial(self._heard, site), with_kwargs=True))

    def look_again(self) -> None:
        """The model may be another one at the next pass. Looking costs microseconds a module."""
        self._sites.clear()

    def _find(self, training: bool) -> Iterator[Site]:
        model = self._model()
        kinds = () if model is None else {type(module) for _, module in all_modules(model)}
        if model is None or not (self._modules or any(issubclass(kind, nn.ModuleList) for kind in kinds)):
            return
        if has_compiled_part(model):
            return
        modules = list(hookable(named_modules(model)))
        may = {module for _, module, in_eval in modules if training or in_eval}
        for name, module, _ in modules:
            if module in may and name != ROOT and any(fnmatchcase(name, pattern) for pattern in self._modules):
                yield Site(ref(module), name, None)
            if _may_be_ensemble(module) and may.issuperset(module.children()):
                yield from (Site(ref(member), name, index) for index, member in enumerate(module.children()))

    def disarm(self) -> None:
        """The pass is over: hooks are off."""
        while self._handles:
            self._handles.pop().remove()

    def forget(self) -> None:
        """No output is kept."""
        self._calls.clear()

    def ensembles(self) -> Iterator[tuple[str, list[Any]]]:
        """Names of the ensembles that were called in this pass, and their members' outputs.

        Members that were called with different inputs are layers, or something else.
        """
        for name, calls in self._calls.items():
            numbers, keys, outputs = zip(*calls, strict=True)
            if len(set(numbers)) == len(calls) > 1 and all(key.same_as(keys[0]) for key in keys[1:]):
                yield name, list(outputs)

    def _heard(self, site: Site, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        if torch.compiler.is_compiling() or under_transform() or in_backward():
            return
        if site.number is None:
            self._on_output(site.name, module, args, kwargs, output)
        else:
            with self._protected(output):
                self._calls[site.name].append((site.number, InputKey(args, kwargs), output))


def _may_be_ensemble(module: nn.Module) -> bool:
    """Members of one class with parameters of the same shapes."""
    members = list(module.children()) if isinstance(module, nn.ModuleList) else []  # a list may hold None, too
    kinds = {(type(member), tuple(p.shape for p in member.parameters())) for member in members}
    return len(members) > 1 and len(kinds) == 1 and bool(next(iter(kinds))[1])
