"""A model that was compiled, and called, before its hooks were there: its graphs know nothing of them."""

from __future__ import annotations

from types import CodeType
from weakref import ReferenceType

from torch import nn

from torchprobe.capture.attention.traced import OWNER, take_mode_off
from torchprobe.capture.compat import say_what_graphs_lose
from torchprobe.capture.compiled import graphs
from torchprobe.capture.sites import SITE, observe_output
from torchprobe.capture.source import Running
from torchprobe.messages import log as _log


class Retrace:
    """Has such graphs traced once more, when a step is to be sampled. Says so once.

    Other models of the same classes lose their graphs too, which costs them one more compilation.
    """

    def __init__(self, model: ReferenceType[nn.Module], running: Running, looks: bool) -> None:
        """looks: graphs are to be looked at even where no hook is in them."""
        self._model = model
        self._running = running
        self._guards = graphs.GraphGuards(model, {SITE: observe_output, OWNER: take_mode_off})
        self._others: set[CodeType] = set()  # of torch's own modules, which other models are
        self._said = self._gave_up = False
        self._looks = looks

    def before_pass(self) -> None:
        """A step to sample begins, or a pass of it. Graphs that exist, while no hook was traced, do not have them.

        An eager model may be of a class that is compiled elsewhere: its graphs are left alone.
        """
        self._guards.attach()
        model = self._model()
        if model is None or self._running.compiled:
            return
        if graphs.in_compiled_call():
            say_what_graphs_lose()
        if not self._guards.unguarded:
            return
        codes = graphs.compiled_codes(model) & self._guards.unguarded
        if codes and (graphs.in_compiled_call() or graphs.has_compiled_part(model) or self._is_wrapped(model, codes)):
            self._drop(codes)

    def after_step(self) -> None:
        """A sampled step is over. When modules were trained whose hooks never ran, a function around was compiled.

        To be called while the gradients are there.
        """
        if not (self._running.fired or self._running.compiled or self._gave_up) and self._has_gradients():
            self._gave_up = True
            self._drop(graphs.all_compiled_codes() & self._guards.unguarded)
        self._running.forget_fired()

    def detach(self) -> None:
        """What is compiled later is none of ours."""
        self._guards.detach()

    def _is_wrapped(self, model: nn.Module, codes: set[CodeType]) -> bool:
        """All models of torch's own classes share one code: whether some of its graphs are this model's."""
        if not graphs.is_torchs_own(model) or codes <= self._others:
            return False
        wrapped = graphs.is_wrapped(model)
        if not wrapped:
            self._others |= codes
        return wrapped

    def _has_gradients(self) -> bool:
        return any(p.grad is not None for module, _ in self._guards.watched() for p in module.parameters())

    def _drop(self, codes: set[CodeType]) -> None:
        if not self._guards.watching:
            codes = codes & self._guards.earlier if self._looks else set()
        if not codes:
            return
        if not self._said:
            _log.warning("the model was compiled before torchprobe watched it; it is compiled once more, with probes")
        self._said = True
        self._guards.unguarded.difference_update(codes)
        self._guards.earlier.difference_update(codes)
        graphs.drop(codes)
