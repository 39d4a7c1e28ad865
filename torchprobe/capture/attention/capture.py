"""The capture of attention: on for one forward pass of the model at a time."""

from __future__ import annotations

import threading
from collections import Counter
from typing import Literal
from weakref import ReferenceType

import torch
from torch import nn

from torchprobe.capture.attention import stack
from torchprobe.capture.attention.fast_path import FastPaths
from torchprobe.capture.attention.mode import AttentionMode
from torchprobe.capture.attention.observer import Observer
from torchprobe.capture.attention.owner import Owners
from torchprobe.capture.attention.reading import OnSource, Reader
from torchprobe.capture.attention.sites import Found, Sites
from torchprobe.capture.attention.traced import TracedAttention
from torchprobe.capture.attention.uncovered import Uncovered
from torchprobe.capture.compat import in_backward, under_transform
from torchprobe.capture.compiled.graphs import in_compiled_call
from torchprobe.capture.gate import Gate
from torchprobe.capture.sites import Pass


class AttentionCapture:
    """Statistics of every attention in a forward pass of a model, each under the name of the module that owns it.

    Between `enter` and `leave` a `TorchFunctionMode` is on the stack; otherwise there is nothing anywhere.

    rows: query rows a head to read at each call, or "all".
    on_source: called at each attention with the module's name, what its statistics are computed from, and a private
        generator; what it returns is kept for `Found.kept`. Nothing else of a source is kept.
    """

    def __init__(
        self,
        model: ReferenceType[nn.Module],
        gate: Gate,
        rows: int | Literal["all"] = 512,
        on_source: OnSource | None = None,
        current: Pass | None = None,
    ) -> None:
        self._model = model
        self._uncovered = Uncovered()
        self._sites = Sites()
        self._owners = Owners(model)
        self._observer = Observer(gate, self._owners, Reader(rows, on_source), self._sites, self._uncovered)
        self._mode = AttentionMode(self._observer)
        self._fast_paths = FastPaths(self._suspend, lambda: stack.push(self._mode))
        self._thread: threading.Thread | None = None
        self._traced = None if current is None else TracedAttention(model, self._observer, current)

    @property
    def uncovered(self) -> Counter[str]:
        """How often each reason not to record an attention was met."""
        return self._uncovered.counts

    def arm(self) -> None:
        """A step begins that is to be recorded: have the graphs that are compiled from now on do so."""
        if self._traced is not None:
            self._traced.arm()

    def disarm(self) -> None:
        """A step begins that is not."""
        if self._traced is not None:
            self._traced.disarm()

    def detach(self) -> None:
        """Take everything off the model."""
        self.leave()
        if self._traced is not None:
            self._traced.detach()

    def enter(
        self, module: nn.Module, training: bool = True, grad_enabled: bool | None = None, off: bool = False
    ) -> None:
        """A forward pass begins that is to be recorded, as training or as validation.

        module: what is called, the model or a part of it. grad_enabled: whether the pass runs with gradients, if
        that is not so where this is called. off: follow the pass and record nothing, so that graphs that were compiled
        with our mode on the stack find it there. Does nothing while something traces, or recomputes, the pass, nor for
        a module that is compiled as a whole; a pass that cannot be recorded is counted.
        """
        if torch.compiler.is_compiling() or under_transform() or in_backward() or self._observer.gate.failed:
            return
        model = self._model()
        if model is None or not self._may_enter(model):
            return
        self.leave()  # a pass that was interrupted did not
        self._thread = threading.current_thread()
        self._observer.training, self._observer.off = training, off
        self._owners.begin_pass()
        if in_compiled_call():
            return
        self._fast_paths.arm(model)
        grad_enabled = torch.is_grad_enabled() if grad_enabled is None else grad_enabled
        if not self._fast_paths.suspended_by(module, (), grad_enabled):
            stack.push(self._mode)

    def leave(self) -> None:
        """The pass has ended, with or without an exception. Safe to call at any time; costs nothing after the first."""
        if self._thread is not threading.current_thread():
            return
        self._thread = None
        stack.remove(self._mode)
        self._fast_paths.disarm()
        self._mode.forget()
        if self._traced is not None:
            self._traced.interrupted()

    def note_uncovered(self, reason: str) -> None:
        """Count a pass that was not recorded; each reason is logged once."""
        self._uncovered.add(reason)

    def collect(self, training: bool = True) -> list[Found]:
        """What the passes since the last call add up to, in the order in which sites were first called."""
        return self._sites.collect(training)

    def _may_enter(self, model: nn.Module) -> bool:
        reason = None
        if self._thread is not None and self._thread is not threading.current_thread() and self._thread.is_alive():
            reason = "a forward pass beside another one, in a second thread"
        elif any(isinstance(module, torch.jit.ScriptModule) for module in model.modules()):
            self._uncovered.add("parts of the model that torch.jit has compiled")  # the others are
        if reason is None and torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
            reason = "passes that are captured into a CUDA graph"
        if reason is not None:
            self._uncovered.add(reason)
        return reason is None

    def _suspend(self, reason: str) -> None:
        stack.remove(self._mode)
        self._uncovered.add(reason)
