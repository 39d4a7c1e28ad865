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
_SOURCES = {name: source for source, names in KNOWN.items() for name in names}
_NEITHER = frozenset({"max_exp_avg_sq", "exp_inf", "sum", "acc_delta", "grad_avg", "ax", "prev", "step_size", "step"})
_OF_LBFGS = frozenset({"d", "t", "al", "ro", "H_diag", "old_dirs", "old_stps", "prev_flat_grad", "prev_loss"})
_OTHERS = _NEITHER | _OF_LBFGS  # that torch's optimizers keep


class State:
    """What an optimizer keeps for one parameter."""

    def __init__(self, optimizer: Optimizer, parameter: nn.Parameter) -> None:
        state = optimizer.state.get(parameter)  # which `[]` would make
        self._values: Mapping[str, object] = state if isinstance(state, dict) else {}
        self.known = {source: self._first(names, parameter) for source, names in KNOWN.items()}
        """The momentum and the second moment; None where it keeps none that is known."""

    def _first(self, names: frozenset[str], parameter: nn.Parameter) -> Tensor | None:
        for name in names:
            if name in self._values:
                value = self._values[name]
                if isinstance(value, Tensor) and value.shape == parameter.shape and measurable(value):
                    return value
        return None

    def unknown(self) -> Iterator[str]:
        """What else it keeps, as far as that may be one of them: names."""
        for name in self._values:
            if name in _OTHERS or (name in _SOURCES and self.known[_SOURCES[name]] is not None):
                continue
            value = self._values[name]
            if isinstance(value, Tensor) and value.numel() > 1:
                yield name
