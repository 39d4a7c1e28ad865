"""The frames that Dynamo has compiled: what runs beside them, and which of a model's there are."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterator
from types import CodeType, FrameType
from typing import Any

import torch
from torch import nn

from torchprobe.capture.compat import running


def keep_out(*hooks: Callable[..., Any]) -> None:
    """Have hooks run as they are where Dynamo calls them beside a compiled module's frame.

    It would make frames of them too. Where they are part of a larger frame they are traced as ever.
    """
    from torch._dynamo.eval_frame import skip_code

    _untraced()
    for function in (beside, *hooks):
        skip_code(function.__code__)


def beside(function: Callable[..., Any], *args: Any) -> None:
    """Call a function from such a hook, with nothing in it traced. Costs 1 µs."""
    _untraced()(function, *args)


@functools.cache
def _untraced() -> Callable[..., Any]:
    return torch.compiler.disable(lambda function, *args: function(*args))  # type: ignore[no-any-return]


def in_compiled_call() -> bool:
    """Whether a callable that `torch.compile` returned is among the callers."""
    if "torch._dynamo.eval_frame" not in sys.modules:
        return False
    frame: FrameType | None = sys._getframe()
    while frame is not None:
        if frame.f_code.co_name == "compile_wrapper" and frame.f_globals.get("__name__") == "torch._dynamo.eval_frame":
            return True
        frame = frame.f_back
    return False


def in_wrapper_call() -> bool:
    """Whether a module that `torch.compile` returned is among the callers. It warns of process-wide hooks."""
    module = sys.modules.get("torch._dynamo.eval_frame")
    # Before torch 2.8 it has none of its own, and gives no warning.
    call = None if module is None else vars(module.OptimizedModule).get("__call__")
    return call is not None and bool(running(call.__code__))


def hides_hooks(module: nn.Module) -> bool:
    """Whether `torch.compile` returned this module and traces the inner one's hooks, as it does for torch's own."""
    if type(module).__name__ != "OptimizedModule":
        return False
    compiled = getattr(module.forward, "_torchdynamo_orig_callable", None)
    return getattr(compiled, "__self__", None) is not module._orig_mod


def has_compiled_part(model: nn.Module) -> bool:
    """Whether a module of the model says that it is compiled. Costs 0.2 µs a module."""
    return any(_says_compiled(module) for module in model.modules())


def _says_compiled(module: nn.Module) -> bool:
    if getattr(module, "_compiled_call_impl", None) is not None or type(module).__name__ == "OptimizedModule":
        return True
    return hasattr(module.__dict__.get("forward"), "_torchdynamo_orig_callable")


def is_torchs_own(model: nn.Module) -> bool:
    """Whether a class of torch's says what calling the model does: torch.compile then traces the call, with hooks."""
    return type(model).forward.__module__.startswith("torch.nn.")


def compiled_codes(model: nn.Module) -> set[CodeType]:
    """The code of the model's modules that Dynamo holds graphs of. Costs a microsecond for each class of module."""
    if "torch._dynamo" not in sys.modules:
        return set()
    from torch._dynamo.eval_frame import _debug_get_cache_entry_list

    return {code for code in set(_codes(model)) if _debug_get_cache_entry_list(code)}


def all_compiled_codes() -> set[CodeType]:
    """The code of every frame that Dynamo holds graphs of."""
    if "torch._dynamo" not in sys.modules:
        return set()
    from torch._dynamo.convert_frame import input_codes
    from torch._dynamo.eval_frame import _debug_get_cache_entry_list

    codes = [weak() for weak in input_codes.seen]
    return {code for code in codes if code is not None and _debug_get_cache_entry_list(code)}


def drop(codes: set[CodeType]) -> None:
    """Forget the graphs of this code: its next call is traced anew."""
    from torch._C._dynamo.eval_frame import reset_code

    for code in codes:
        reset_code(code)


def _codes(model: nn.Module) -> Iterator[CodeType]:
    for module in model.modules():
        for function in (module.forward, type(module).forward, module._compiled_call_impl):
            function = getattr(function, "_torchdynamo_orig_callable", function)
            code = getattr(getattr(function, "__func__", function), "__code__", None)
            if isinstance(code, CodeType):
                yield code
    if is_torchs_own(model):
        yield from _code_around_torchs_own()


def _code_around_torchs_own() -> Iterator[CodeType]:
    from torch._dynamo.external_utils import wrap_inline

    return (const for const in wrap_inline.__code__.co_consts if isinstance(const, CodeType))
