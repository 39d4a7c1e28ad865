"""What an optimizer keeps for a parameter: the momentum and the second moment, by the names that torch has for them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from torch import Tensor, nn
from torch.optim import Optimizer

from torchprobe.statistics.dtypes import measurable

KNOWN: Mapping[str, frozenset[str]] = {
    "momenta": frozenset({"exp_avg", "momentum_buffer"}),
    "second_moments": frozenset({"exp_avg_sq", "square_avg"}),
}
_NEITHER = frozenset({"max_exp_avg_sq", "exp_inf", "sum", "acc_delta", "grad_avg", "ax", "prev", "step_size", "step"})
_OF_LBFGS = frozenset({"d", "t", "al", "ro", "H_diag", "old_dirs", "old_stps", "prev_flat_grad", "prev_loss"})
_OTHERS = _NEITHER | _OF_LBFGS  # that torch's optimizers keep


def kept(optimizer: Optimizer, parameter: nn.Parameter, source: str) -> Tensor | None:
    """The momentum or the second moment of a parameter; None where the optimizer keeps none that is known."""
    state = _state(optimizer, parameter)
    for name in KNOWN[source]:
        value = state.get(name)
        if isinstance(value, Tensor) and value.shape == parameter.shape and measurable(value):
            return value
    return None


def unknown(optimizer: Optimizer, parameter: nn.Parameter) -> Iterator[str]:
    """What else it keeps, as far as that may be one of them: a line for each name."""
    for name, value in _state(optimizer, parameter).items():
        of_its_own = name not in _OTHERS and kept_under(optimizer, parameter, name) is None
        if isinstance(value, Tensor) and value.numel() > 1 and of_its_own:
            kind = type(optimizer).__name__
            yield f"{name!r} of {kind}'s state: whether it is a momentum or a second moment is not known"


def kept_under(optimizer: Optimizer, parameter: nn.Parameter, name: str) -> Tensor | None:
    """The same under one name."""
    source = next((source for source, names in KNOWN.items() if name in names), None)
    return None if source is None else kept(optimizer, parameter, source)


def _state(optimizer: Optimizer, parameter: nn.Parameter) -> Mapping[str, object]:
    state = optimizer.state.get(parameter)  # which `[]` would make
    return state if isinstance(state, dict) else {}
