"""The stack of torch function modes, on which the user's own may lie above and below ours.

All private names of torch that finding attention needs stand here, each looked up once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from importlib import import_module
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode


def _look_up(path: str) -> Any:
    module, _, name = path.rpartition(".")
    try:
        return getattr(import_module(module), name, None)
    except ImportError:
        return None


_PRIVATE = {
    path: _look_up(path)
    for path in (
        *("torch._C._len_torch_function_stack", "torch.overrides._push_mode", "torch.overrides._pop_mode"),
        *("torch._C.DisableTorchFunction", "torch.utils._python_dispatch._disable_current_modes"),
        "torch._ops.HigherOrderOperator",
    )
}
_depth, push_mode, pop_mode, _no_functions, _no_dispatch, _HigherOrder = _PRIVATE.values()

MISSING = next((path for path, found in _PRIVATE.items() if found is None), None)
"""What this version of torch does not have: then attention is not recorded, and nothing here is called."""

_dispatch_depth = _look_up("torch._C._len_torch_dispatch_stack") or (lambda: 1)  # leaving no mode takes longer
_enable_functions = _look_up("torch.overrides._enable_torch_function")
_Overload = type(torch.ops.aten.mm.default)
_Packet = type(torch.ops.aten.mm)
_DefaultDevice = _look_up("torch.utils._device.DeviceContext") or ()  # without it, one counts as a mode of the user's


def is_operator(func: Any) -> bool:
    """Whether a function is an operator of the dispatcher, or one of higher order."""
    return isinstance(func, (_Overload, _Packet, _HigherOrder))


def is_higher_order(func: Any, name: str) -> bool:
    """Whether a function is this operator of higher order."""
    return isinstance(func, _HigherOrder) and func.name() == name


def schema(func: Any) -> Any:
    """What an operator of the dispatcher is called and takes; None for any other function."""
    overload = getattr(func, "default", None) if isinstance(func, _Packet) else func
    return getattr(overload, "_schema", None) if isinstance(overload, _Overload) else None


def _item_to_index() -> Any:
    return _look_up("torch._dynamo._trace_wrapped_higher_order_op.TransformGetItemToIndex")  # comes with flex_attention


def can_index_by_scalars() -> bool:
    """Whether there is what `indexing_by_scalars` needs."""
    return _enable_functions is not None and _item_to_index() is not None


@contextmanager
def indexing_by_scalars() -> Iterator[None]:
    """`bias[head]` with a tensor for the head is a lookup, and not a read of its value, as `flex_attention` has it."""
    with emptied(), _enable_functions(), _item_to_index()():
        yield


@contextmanager
def unseen() -> Iterator[None]:
    """Within, no mode of the user's sees what is called."""
    dispatch = _no_dispatch() if _dispatch_depth() else nullcontext()
    with _no_functions(), dispatch:
        yield


def remove(mode: TorchFunctionMode) -> bool:
    """Take a mode out of the stack, wherever it is, and leave the others in order. False when it is not there."""
    above = []
    found = False
    while _depth() and not found:
        top = pop_mode()
        found = top is mode
        if not found:
            above.append(top)
    for other in reversed(above):
        push_mode(other)
    return found


def is_shared() -> bool:
    """Whether the stack holds a mode of the user's that may want to see calls.

    A default device only looks at constructors.
    """
    with emptied() as modes:
        return any(
            not isinstance(mode, _DefaultDevice) and not type(mode).__module__.startswith(__package__) for mode in modes
        )


@contextmanager
def emptied() -> Iterator[list[TorchFunctionMode]]:
    """Within, there is no mode. Gives those that there were, the innermost first."""
    modes = [pop_mode() for _ in range(_depth())]
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
