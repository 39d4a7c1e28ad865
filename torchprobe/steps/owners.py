"""Which optimizers use which parameters' gradients, as far as they are known."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from weakref import ReferenceType

from torch import nn
from torch.optim import Optimizer

from torchprobe.capture.gradient_state import EarlyGradients, GradientState
from torchprobe.capture.optimizers import trained
from torchprobe.capture.sharding import is_fully_sharded
from torchprobe.steps.backward import Backward


class Owners:
    """The optimizers that have stepped, each with the state of its parameters' gradients.

    states: theirs. others: that of the parameters that none of them holds. early: what is learnt of gradients that are
    there before a backward pass is heard of.
    """

    def __init__(self, model: ReferenceType[nn.Module]) -> None:
        self.states: list[GradientState] = []
        self.others: GradientState | None = None
        self.early = EarlyGradients()
        self._model = model
        self._unknown: GradientState | None = None  # of all parameters, while no optimizer is known

    def living(self) -> list[GradientState]:
        """The states of the optimizers that exist; while none is known, that of all parameters."""
        states = [state for state in self.states if state.of() is not None]
        gone, self.states = len(states) < len(self.states), states
        if gone:
            self._tell_others()
        if states:
            return states
        if self._unknown is None:
            self._unknown = GradientState(self.parameters())
            self._unknown.learn(self.early)
        return [self._unknown]

    def look(self, living: list[GradientState]) -> None:
        """Remember the gradients as a backward pass finds them."""
        if self.early.learns:
            self.early.begin(self.parameters())
        for state in living if self.others is None else [*living, self.others]:
            state.look()

    def add(self, optimizer: Optimizer, waiting: Iterable[Backward]) -> GradientState:
        """One becomes known; backward passes that came before may be for it too."""
        state = GradientState(trained(optimizer), optimizer)
        state.learn(self.early)
        self.states.append(state)
        state.choose()
        self._tell_others()
        self.early.more(self.others is not None)
        others = None if self.others is None or self.others.zeroed(thorough=True) else self.others
        for backward in waiting:
            backward.join(state, others)
        return state

    def learn(self, compiled: bool) -> frozenset[int] | None:
        """A backward pass has ended, with all gradients looked at: ids of the parameters that it reached, if known."""
        if self.early.end():
            for state in [*self.living(), *filter(None, [self.others])]:
                state.learn(self.early)
        return None if compiled or self.hides() else self.early.grown or None

    def parameters(self) -> Iterator[nn.Parameter]:
        """Those of the model that are trained."""
        model = self._model()
        return iter(()) if model is None else (p for p in model.parameters() if p.requires_grad)

    def hides(self) -> bool:
        """Whether a wrapper may keep gradients out of sight, as `fully_shard` does until it reduces them."""
        model = self._model()
        return model is not None and is_fully_sharded(model)

    def forget(self) -> None:
        """The run is over."""
        self.states, self.others, self._unknown = [], None, None

    def _tell_others(self) -> None:
        held = {id(p) for state in self.states if (one := state.of()) is not None for p in trained(one)}
        others = [p for p in self.parameters() if id(p) not in held]
        self.others = GradientState(others) if others else None
        if self.others is not None:
            self.others.learn(self.early)
            self.others.choose()
