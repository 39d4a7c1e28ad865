"""What hangs on the user's modules while they are watched, and how it stays out of copies and pickles of them.

A pickle of a watched module is that of the module itself: the state that `copy` and `pickle` ask it for is without our
marks and hooks, so that it loads where torchprobe is not installed.
"""

from __future__ import annotations

import itertools
from collections import OrderedDict
from collections.abc import Callable
from typing import Any
from weakref import ReferenceType, ref

from torch import nn

ROOT_KEY = "_torchprobe_root"  # key in the model's __dict__; the copy of a model finds None there
_STATE = "__getstate__"
_PREFIX = "_torchprobe"
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_load_state_dict_pre_hooks")
_OF_HOOKS = ("_forward_hooks_with_kwargs", "_forward_hooks_always_called", "_forward_pre_hooks_with_kwargs")
_keys: set[str] = set()  # of all marks that were ever made
_numbers = itertools.count(-1, -1)  # those of torch's handles are positive


class Inert:
    """Means nothing to anybody else: copies and pickles become None."""

    def __deepcopy__(self, memo: dict[int, Any]) -> None:
        return None

    def __reduce__(self) -> tuple[type, tuple[()]]:
        return (type(None), ())


def mark(module: nn.Module, key: str, value: Any) -> None:
    """Put something of ours under a key that begins with `_torchprobe` into a module's `__dict__`."""
    attributes = module.__dict__
    attributes[key] = value
    _keys.add(key)
    if _STATE not in attributes:
        attributes[_STATE] = CleanState(module)


def unmark(module: nn.Module, key: str) -> None:
    """Take it off."""
    own = module.__dict__
    own.pop(key, None)
    if own.keys().isdisjoint(_keys) and isinstance(own.get(_STATE), CleanState):
        del own[_STATE]


class SharedHook:
    """A function on many modules, under one number: a handle for each, as torch makes them, takes ten times as long."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = function
        self._number = next(_numbers)

    def put_before(self, module: nn.Module) -> None:
        """`module.register_forward_pre_hook(function, with_kwargs=True)`."""
        module._forward_pre_hooks[self._number] = self._function
        module._forward_pre_hooks_with_kwargs[self._number] = True

    def put_after(self, module: nn.Module) -> None:
        """`module.register_forward_hook(function)`; on the root ahead of the one that is there, which ends its pass."""
        hooks: Any = module._forward_hooks
        hooks[self._number] = self._function
        if ROOT_KEY in module.__dict__:
            hooks.move_to_end(self._number, last=False)

    def take_off(self, module: nn.Module) -> None:
        """Safe to call twice."""
        for hooks in (module._forward_hooks, module._forward_pre_hooks, module._forward_pre_hooks_with_kwargs):
            hooks.pop(self._number, None)


class CleanState:
    """A module's own `__getstate__`, without what is ours."""

    def __init__(self, module: nn.Module) -> None:
        self._module: ReferenceType[nn.Module] = ref(module)

    def __call__(self) -> Any:
        """The state of the module as if it were not watched."""
        module = self._module()
        if module is None:
            return None
        own: Callable[[Any], Any] | None = getattr(type(module), _STATE, None)
        state = module.__dict__.copy() if own is None else own(module)
        return _cleaned(state) if isinstance(state, dict) else state


def _cleaned(state: dict[str, Any]) -> dict[str, Any]:
    clean = {
        key: value
        for key, value in state.items()
        if not (isinstance(key, str) and key.startswith(_PREFIX)) and not isinstance(value, CleanState)
    }
    for name in _HOOKS:
        hooks = clean.get(name)
        if isinstance(hooks, OrderedDict) and any(map(_is_ours, hooks.values())):
            clean[name] = OrderedDict((key, hook) for key, hook in hooks.items() if not _is_ours(hook))
            ours = [key for key, hook in hooks.items() if _is_ours(hook)]
            for other in _OF_HOOKS:
                if isinstance(clean.get(other), OrderedDict) and other.startswith(name):
                    clean[other] = OrderedDict((k, v) for k, v in clean[other].items() if k not in ours)
    return clean


def _is_ours(hook: Any) -> bool:
    return str(getattr(hook, "__module__", "")).startswith("torchprobe.")
