"""One name for a module or parameter, whatever wraps the model."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from torch import Tensor, nn

ROOT = "root"  # what the model itself is called, whose name in `named_modules()` is empty

# Attribute names that only wrappers use.
_ALWAYS_WRAPPERS = frozenset({"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"})
# `module` is also an ordinary attribute name, so the parent's class decides.
_MODULE_WRAPPERS = frozenset({"DistributedDataParallel", "DataParallel", "AveragedModel"})
_RANK_WRAPPERS = frozenset({"DistributedDataParallel", "FullyShardedDataParallel"})


def _is_wrapper(parent: nn.Module, child: str) -> bool:
    if child in _ALWAYS_WRAPPERS:
        return True
    return child == "module" and any(c.__name__ in _MODULE_WRAPPERS for c in type(parent).__mro__)


def unwrapped(model: nn.Module) -> nn.Module:
    """The user's own module inside `torch.compile`, DDP, FSDP and checkpoint wrappers."""
    for name, child in model.named_children():
        if _is_wrapper(model, name):
            return unwrapped(child)
    return model


def without_ranks(model: nn.Module) -> nn.Module:
    """The module inside DDP and FSDP wrappers: what runs in every pass, also in one that goes round the wrapper."""
    for name, child in model.named_children():
        if _is_wrapper(model, name) and any(c.__name__ in _RANK_WRAPPERS for c in type(model).__mro__):
            return without_ranks(child)
    return model


def named_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """`model.named_modules()` with wrapper prefixes removed; the wrappers themselves are left out.

    The model itself is called `ROOT`. A shared module appears once, under its first name.
    """
    for name, module in _walk(unwrapped(model), "", set()):
        yield name or ROOT, module


def _walk(module: nn.Module, name: str, seen: set[nn.Module]) -> Iterator[tuple[str, nn.Module]]:
    if module in seen:
        return
    seen.add(module)
    yield name, module
    for child_name, child in module.named_children():
        full = f"{name}.{child_name}" if name else child_name
        yield from _walk(unwrapped(child), full, seen)


def named_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """`model.named_parameters()` with wrapper prefixes removed; a shared parameter has its first name."""
    seen: set[Tensor] = set()
    for module_name, module in _walk(unwrapped(model), "", set()):
        for name, parameter in module.named_parameters(recurse=False):
            if parameter not in seen:
                seen.add(parameter)
                yield (f"{module_name}.{name}" if module_name else name), parameter


def bare_keys(model: nn.Module, keys: Iterable[str]) -> dict[str, str]:
    """Names in `model.state_dict()`, of tensors or of modules, with wrapper prefixes removed: wrapped name -> bare.

    For a model whose outer wrappers are off already.
    """
    owned = {f"{_cleaned(name)}.module." for name, module in model.named_modules() if _is_wrapper(module, "module")}
    # Innermost first, so that the names of those around it still fit.
    prefixes = sorted((prefix.lstrip(".") for prefix in owned), key=len, reverse=True)
    return {key: _without(prefixes, _cleaned(key)) for key in keys}


def _cleaned(name: str) -> str:
    return ".".join(part for part in name.split(".") if part not in _ALWAYS_WRAPPERS)


def _without(prefixes: Iterable[str], name: str) -> str:
    for prefix in prefixes:
        if f"{name}.".startswith(prefix):
            name = f"{prefix.removesuffix('module.')}{name[len(prefix) :]}".rstrip(".")
    return name


def owner_of(parameter_name: str) -> str:
    """The module that owns a parameter: `blocks.0.fc.weight` -> `blocks.0.fc`."""
    return parameter_name.rpartition(".")[0] or ROOT


def with_parents(name: str) -> list[str]:
    """The modules around a module or parameter, outermost first, and itself: `a.b` -> `a`, `a.b`."""
    parts = name.split(".")
    return [".".join(parts[: i + 1]) for i in range(len(parts))]
