"""Recognises an iteration that ends without an optimizer step, as when GradScaler finds inf."""

from __future__ import annotations

from weakref import ReferenceType

from torch import nn
from torch.nn.parameter import is_lazy

from torchprobe.capture.compat import backward_id
from torchprobe.capture.fully_sharded import has_gradients, is_flattened, is_fully_sharded, lasting_parameters
from torchprobe.capture.loss import backward_call


class SkipDetector:
    """A skipped step: a backward pass ran, and its gradients are gone without a change of the weights.

    FullyShardedDataParallel lets gradients come and go with its flat parameters: there, nothing is recognised.
    """

    def __init__(self, model: ReferenceType[nn.Module]) -> None:
        self._model = model
        self._backward_id: int | None = None
        self._weights_used: int | None = None  # version of the weights in a backward that no step has followed yet
        self._sharded: bool | None = None  # asked at the first backward pass, when the model is wrapped
        self.in_closure = False  # the optimizer evaluates the model itself, and drops gradients as it likes

    def begins_backward(self) -> bool:
        """Whether a backward pass that gives parameters gradients has just begun; asked at an output of the model."""
        running = backward_id()
        if running is not None and running == self._backward_id:
            return False  # another output of the same backward pass
        self._backward_id = running
        return backward_call() is not None

    def backward_ran(self) -> None:
        """Gradients of this backward pass await a step."""
        if self._sharded is None:
            model = self._model()
            self._sharded = model is not None and is_fully_sharded(model)
        self._weights_used = self._weights_version()

    @property
    def gradients_await_step(self) -> bool:
        """Whether a backward pass ran that no step has followed yet."""
        return self._weights_used is not None

    def settled(self) -> None:
        """A step used the gradients, or they were given up."""
        self._weights_used = None

    def gradients_were_dropped(self) -> bool:
        """Whether the gradients that awaited a step are gone."""
        if self._weights_used is None or self.in_closure or self._has_gradients():
            return False
        return self._weights_used == self._weights_version()

    def _has_gradients(self) -> bool:
        model = self._model()
        if model is None or not self._sharded:
            return model is not None and any(p.grad is not None for p in model.parameters())
        return has_gradients(model) or any(map(is_flattened, model.parameters()))

    def _weights_version(self) -> int:
        model = self._model()
        if model is None:
            return 0
        parameters = lasting_parameters(model) if self._sharded else model.parameters()
        for parameter in parameters:
            if parameter.requires_grad:
                return parameter._version
        return 0


def first_trained(model: nn.Module | None) -> nn.Parameter | None:
    """The first parameter that needs a gradient, of those that have a shape already."""
    parameters = () if model is None else model.parameters()
    return next((p for p in parameters if p.requires_grad and not is_lazy(p)), None)
