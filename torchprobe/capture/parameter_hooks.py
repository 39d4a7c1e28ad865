"""Hooks on parameters, which hear backward passes that run through no output of the model."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from threading import Thread
from weakref import WeakMethod

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.utils.hooks import RemovableHandle, unserializable_hook

from torchprobe.capture.compat import no_torch_function, plain_state

_HEARD = 3  # steps in which backward passes are listened for at all parameters
_PERIOD = 256  # steps from one penalty to the next
_MOST_FOUND = 8  # parameters that such passes reach
_MOST_GAPS = 16  # kinds of backward passes in between that are known to be of no concern


class ParameterHooks:
    """Such passes are those of a penalty's own `backward()`, and of a model that is called past its hooks.

    They are on all parameters in the first steps, until an optimizer steps, and again when torch's numbers of backward
    passes, which go up by one in a plain loop, tell of some that nobody heard; then on a few for as long as a penalty
    may take to come again; and on those that one has reached. A plain loop has none after its first steps. Each costs
    10 µs to put on, and is no guard of Dynamo's. One on the node that adds up a gradient would keep the node, whose
    shape a parameter may outgrow.

    hear: called with a parameter that a backward pass is about to reach. wanted: whether the next step has hooks.
    hooked: where they are, in this one.
    """

    def __init__(self, hear: Callable[[nn.Parameter], None]) -> None:
        self.wanted = True
        self._hear = WeakMethod(hear)
        self._ahead = _HEARD  # steps yet with hooks on all parameters
        self._ahead_few = 0  # steps yet with hooks on a few
        self._retries = _MOST_FOUND
        self._all = False  # they are on all parameters
        self._wide = False  # they are on parameters at which a new kind of backward pass would be heard of, too
        self._on_since = False  # so since the backward pass that was heard of last
        self._harmless: set[int] = set()
        self._found: list[nn.Parameter] = []
        self._few: list[nn.Parameter] = []
        self.hooked: dict[int, tuple[nn.Parameter, RemovableHandle]] = {}

    def begin_step(self, parameters: Callable[[], list[nn.Parameter]], elsewhere: bool) -> None:
        """Listen in a step. What is listened at already costs nothing more. parameters: gives those of the model.
        elsewhere: in this step backward passes are heard at outputs of parts.
        """
        chosen, self._all = self._found, self._ahead > 0
        self._wide = self._all or self._ahead_few > 0
        self._on_since &= self._wide
        if self._all:
            kept = [one for one, _ in self.hooked.values()]  # frozen for now, perhaps
            self._ahead, chosen = self._ahead - (not elsewhere), [*kept, *parameters()]
        elif self._ahead_few:
            self._few = self._few or _spread(parameters())
            self._ahead_few, chosen = self._ahead_few - 1, [*chosen, *self._few]
        self.wanted, ids = bool(chosen), {*map(id, chosen)}
        if self.hooked.keys() != ids:
            self._take_off(self.hooked.keys() - ids)
            self._put_on([parameter for parameter in chosen if id(parameter) not in self.hooked])

    def _put_on(self, chosen: list[nn.Parameter]) -> None:
        hook: WeakMethod[Callable[[int], None]] = WeakMethod(self._hook)
        with no_torch_function():
            for parameter in chosen:  # of a functional call they may be another's tensors, gone with its graph
                if parameter.requires_grad and parameter.is_leaf and isinstance(parameter, nn.Parameter):
                    handle = parameter.register_hook(unserializable_hook(partial(_hear, hook, id(parameter))))
                    self.hooked[id(parameter)] = parameter, handle

    def heard(self, skipped: int) -> bool:
        """A backward pass has begun. Whether others may have reached parameters before it, and nobody heard of them.

        skipped: how many have run since the last one, or took numbers.
        """
        on_since, self._on_since = self._on_since, self._wide and bool(self.hooked)
        if not skipped or skipped in self._harmless or len(self._harmless) >= _MOST_GAPS:
            return False
        if on_since:
            self._harmless.add(skipped)
            self._ahead_few = 0
        else:
            self._ahead, self._ahead_few, self._few, self.wanted = max(self._ahead, 2), _PERIOD, [], True
        return not on_since

    def listen_again(self) -> None:
        """One was missed: listen at all parameters in the next steps, if that was not in vain too often."""
        if self._retries:
            self._retries -= 1
            self._ahead, self.wanted = max(self._ahead, 2), True

    def found(self, parameter: nn.Parameter) -> bool:
        """A backward pass that ran through no output was heard of at this one. Whether that is where it began."""
        known = any(parameter is other for other in self._found)
        if not known and len(self._found) < _MOST_FOUND:
            self._found.append(parameter)
            self._ahead = self._ahead if self._all else max(self._ahead, 2)
        return known or self._all

    def step_ends(self, unowned: bool) -> None:
        """An optimizer steps: hooks stay on only where backward passes may come before the next forward pass.

        unowned: there are parameters that no known optimizer holds.
        """
        if not (unowned or self._ahead_few or self._found):
            self.release()

    def release(self) -> None:
        """Take the hooks off."""
        self._take_off(set(self.hooked))
        self._on_since = False

    def forget(self) -> None:
        """The run is over: no parameter is held."""
        self.release()
        self._found, self._few, self.wanted = [], [], False

    def _take_off(self, ids: set[int]) -> None:
        for parameter, handle in [self.hooked.pop(one) for one in ids]:
            handle.remove()
            if parameter._backward_hooks is not None and not parameter._backward_hooks:
                parameter._backward_hooks = None  # no trace is left

    def _hook(self, key: int) -> None:
        if (hear := self._hear()) is not None and key in self.hooked:
            hear(self.hooked[key][0])


def _spread(parameters: list[nn.Parameter]) -> list[nn.Parameter]:
    weights = [p for p in parameters if not is_lazy(p) and p.dim() > 1] or parameters
    return weights[:: max(1, len(weights) // 3)]


def _hear(hook: WeakMethod[Callable[[int], None]], key: int, _: Tensor) -> None:
    if not torch.compiler.is_compiling() and (heard := hook()) is not None:
        heard(key)


def number_of_backward() -> int | None:
    """The number of a backward pass that runs now, of nothing; None where the next one's is not one more.

    In a thread of its own: what asks may be an operator that a compiled graph runs below autograd, or be under a mode
    of the user's. Costs 300 µs.
    """
    numbers: list[int] = []
    thread = Thread(target=_two_backward_passes, args=(numbers,), daemon=True)
    thread.start()
    thread.join()
    return numbers[1] if len(numbers) == 2 and numbers[1] == numbers[0] + 1 else None


def _two_backward_passes(numbers: list[int]) -> None:
    for _ in range(2):
        start = torch.ones((), requires_grad=True, device="cpu")
        end = start.clone()
        end.register_hook(lambda _: numbers.append(plain_state()[0]()))
        torch.autograd.grad(end, start)
