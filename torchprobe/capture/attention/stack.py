"""The stack of torch function modes, on which the user's own may lie above and below ours."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor
from torch.overrides import TorchFunctionMode

from torchprobe.capture.compat import (
    DeviceContext,
)
from torchprobe.capture.compat import (
    count_function_modes as _len_torch_function_stack,
)
from torchprobe.capture.compat import (
    function_modes as _get_current_function_mode_stack,
)
from torchprobe.capture.compat import (
    pop_mode as _pop_mode,
)
from torchprobe.capture.compat import (
    push_mode as _push_mode,
)


def push(mode: TorchFunctionMode) -> None:
    """Put a mode on top: it is the first to see a call."""
    _push_mode(mode)


def remove(mode: TorchFunctionMode) -> bool:
    """Take a mode out of the stack, wherever it is, and leave the others in order. False when it is not there."""
    above = []
    found = False
    while _len_torch_function_stack() and not found:
        top = _pop_mode()
        found = top is mode
        if not found:
            above.append(top)
    for other in reversed(above):
        _push_mode(other)
    return found


def is_shared() -> bool:
    """Whether the stack holds a mode of the user's that may want to see calls.

    A default device only looks at constructors.
    """
    return any(
        not isinstance(mode, DeviceContext) and not type(mode).__module__.startswith(__package__)
        for mode in _get_current_function_mode_stack()
    )


@contextmanager
def emptied() -> Iterator[None]:
    """Within, there is no mode."""
    modes = [_pop_mode() for _ in range(_len_torch_function_stack())]
    try:
        yield
    finally:
        for mode in reversed(modes):
            _push_mode(mode)


def call(func: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """Call what a mode was asked about, while it is traced.

    `Tensor.unflatten` is Python, with a `super()` that Dynamo does not follow; it knows the method as such.
    """
    if func is Tensor.unflatten:
        return args[0].unflatten(*args[1:], **kwargs)
    return func(*args, **kwargs)
