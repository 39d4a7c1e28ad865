"""The stack of torch function modes, on which the user's own may lie above and below ours."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor
from torch.overrides import TorchFunctionMode

from torchprobe.capture import compat
from torchprobe.capture.compat import pop_mode as pop_mode
from torchprobe.capture.compat import push_mode as push_mode

MISSING = compat.missing_for_modes()
"""What this version of torch does not have: then attention is not recorded, and nothing here is called."""

_OPERATORS = (compat.OpOverload, compat.OpOverloadPacket, compat.HigherOrderOperator)

FLEX = compat.flex_attention_operator()
"""The operator of `flex_attention`; something else where this torch has none."""


def is_operator(func: Any) -> bool:
    """Whether a function is an operator of the dispatcher, or one of higher order."""
    return isinstance(func, _OPERATORS)


def is_higher_order(func: Any, name: str) -> bool:
    """Whether a function is this operator of higher order."""
    return isinstance(func, compat.HigherOrderOperator) and func.name() == name


def schema(func: Any) -> Any:
    """What an operator of the dispatcher is called and takes; None for any other function."""
    overload = getattr(func, "default", None) if isinstance(func, compat.OpOverloadPacket) else func
    return getattr(overload, "_schema", None) if isinstance(overload, compat.OpOverload) else None


def can_index_by_scalars() -> bool:
    """Whether there is what `indexing_by_scalars` needs."""
    return compat.item_to_index() is not None


@contextmanager
def indexing_by_scalars() -> Iterator[None]:
    """`bias[head]` with a tensor for the head is a lookup, and not a read of its value, as `flex_attention` has it."""
    with emptied(), compat.enable_torch_function(), compat.item_to_index()():
        yield


@contextmanager
def unseen() -> Iterator[None]:
    """Within, no mode of the user's sees what is called."""
    with compat.no_torch_function(), compat.no_dispatch_modes():
        yield


def remove(mode: TorchFunctionMode) -> bool:
    """Take a mode out of the stack, wherever it is, and leave the others in order. False when it is not there."""
    with emptied() as modes:
        at = next((i for i, one in enumerate(modes) if one is mode), None)
        if at is not None:
            del modes[at]
    return at is not None


def is_shared() -> bool:
    """Whether the stack holds a mode of the user's that may want to see calls.

    A default device only looks at constructors.
    """
    with emptied() as modes:
        others = [type(mode) for mode in modes if not isinstance(mode, compat.DeviceContext)]
        return not all(kind.__module__.startswith(__package__) for kind in others)


@contextmanager
def emptied() -> Iterator[list[TorchFunctionMode]]:
    """Within, there is no mode. Gives those that there were, the innermost first."""
    modes = [pop_mode() for _ in range(compat.count_function_modes())]
    try:
        yield modes
    finally:
        for mode in reversed(modes):
            push_mode(mode)


def call(func: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """Call what a mode was asked about, while it is traced.

    `Tensor.unflatten` is Python, with a `super()` that Dynamo does not follow; it knows the method as such.
    """
    if func is Tensor.unflatten:
        return args[0].unflatten(*args[1:], **kwargs)
    return func(*args, **kwargs)
