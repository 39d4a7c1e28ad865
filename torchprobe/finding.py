"""Finds the model of a script by itself, and watches it for some steps: for `torchprobe check`."""

from __future__ import annotations

from typing import Any

from torch import is_grad_enabled, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils.hooks import RemovableHandle

from torchprobe.capture.optimizers import any_alive
from torchprobe.capture.root_hooks import enter
from torchprobe.session import Session, instrument, session_of
from torchprobe.writers.protocol import NoWriter

_EVERY = 10
_ALWAYS_LOOKED = 16  # outermost calls; later ones are looked at when their number is a power of two


class EnoughSteps(BaseException):
    """Ends a script from within `optimizer.step()`; no `except Exception` of the script's holds it up."""


class Finder:
    """Instruments the first outermost module that is called and whose parameters a living optimizer holds.

    A model that the script instruments by itself is left to that session. Inside the context the process belongs to
    the script that is examined: hooks are process-wide. steps: after as many, `EnoughSteps` is raised.
    """

    def __init__(self, steps: int) -> None:
        self.session: Session | None = None
        self._steps = steps
        self._depth = 0
        self._calls = 0
        self._handles: list[RemovableHandle] = []

    def __enter__(self) -> Finder:
        self._handles = [
            register_module_forward_pre_hook(self._enter),
            register_module_forward_hook(self._leave, always_call=True),
            register_optimizer_step_post_hook(self._stepped),
        ]
        return self

    def __exit__(self, *error: object) -> None:
        self._remove()
        while self._handles:
            self._handles.pop().remove()

    def _remove(self) -> None:
        """Hooks on modules are wanted only until the model is found."""
        for handle in self._handles[:2]:
            handle.remove()
        del self._handles[:2]

    def _enter(self, module: nn.Module, args: Any) -> None:
        self._depth += 1
        if self._depth > 1 or self.session is not None or not is_grad_enabled():
            return
        self._calls += 1
        few = self._calls <= _ALWAYS_LOOKED or self._calls & (self._calls - 1) == 0
        if few and (mine := {id(p) for p in module.parameters()}) and any_alive(mine):  # looks at all objects: 50 ms
            self._watch(module, args)

    def _watch(self, module: nn.Module, args: Any) -> None:
        own = session_of(module)
        if own is None:
            self.session = instrument(module, writer=NoWriter(), every=_EVERY)
            enter(module, args)
        else:
            self.session = own
        self._remove()

    def _leave(self, module: nn.Module, args: Any, output: Any) -> None:
        self._depth = max(0, self._depth - 1)

    def _stepped(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        if self.session is not None and self.session.step >= self._steps:
            raise EnoughSteps
