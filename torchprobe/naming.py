"""One name for a module or parameter, whatever wraps the model."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import accumulate
from typing import TypeAlias

from torch import nn

_Inside: TypeAlias = Callable[[nn.Module], nn.Module] | None
_Parts: TypeAlias = Mapping[str, nn.Module | None]
Modules: TypeAlias = Sequence[tuple[str, nn.Module]]

ROOT = "root"  # what the model itself is called, whose name in `named_modules()` is empty

# Attribute names that only wrappers use.
_ALWAYS_WRAPPERS = frozenset({"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"})
# Others are also a user's own, so the parent's class decides. Fabric keeps the model twice; the first of the two runs.
_WRAPPERS_BY_CLASS = {
    "DistributedDataParallel": ("module",),
    "DataParallel": ("module",),
    "AveragedModel": ("module",),
    "DeepSpeedEngine": ("module",),
    "_FabricModule": ("_forward_module", "_original_module"),
}
_SOMETIMES_WRAPPERS = frozenset(name for names in _WRAPPERS_BY_CLASS.values() for name in names)
_PERHAPS_WRAPPERS = _ALWAYS_WRAPPERS | _SOMETIMES_WRAPPERS
_AROUND_EAGER = frozenset({"DistributedDataParallel", "FullyShardedDataParallel", "DeepSpeedEngine", "_FabricModule"})


def _is_wrapper(parent: nn.Module | None, child: str) -> bool:
    if child not in _SOMETIMES_WRAPPERS:
        return child in _ALWAYS_WRAPPERS
    return any(child in _WRAPPERS_BY_CLASS.get(name, ()) for name in _classes(parent))


def _classes(module: nn.Module | None) -> list[str]:
    return [c.__name__ for c in type(module).__mro__]


def unwrapped(model: nn.Module) -> nn.Module:
    """The user's own module inside the wrappers of `torch.compile`, DDP, FSDP, checkpointing, DeepSpeed and Fabric.

    Raises TypeError for what is no module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model={model!r}: takes a torch.nn.Module, not {type(model).__name__}")
    if _PERHAPS_WRAPPERS.isdisjoint(model._modules.keys()):  # most; those of a ScriptModule have no iterator
        return model
    for name, child in model.named_children():
        if _is_wrapper(model, name):
            return unwrapped(child)
    return model


def without_ranks(model: nn.Module) -> nn.Module:
    """The module inside DDP, FSDP, DeepSpeed and Fabric: what runs in every pass, also in one round the wrapper."""
    for name, child in () if _AROUND_EAGER.isdisjoint(_classes(model)) else model.named_children():
        if _is_wrapper(model, name):
            return without_ranks(child)
    return model


def named_modules(model: nn.Module | None) -> list[tuple[str, nn.Module]]:
    """`model.named_modules()` with wrapper prefixes removed; the wrappers themselves are left out.

    The model itself is called `ROOT`. A shared module appears once, under its first name. Of None: none.
    """
    modules = [] if model is None else all_modules(unwrapped(model), unwrapped)
    return [(name or ROOT, module) for name, module in modules]


def named_parameters(model: nn.Module | None) -> Iterator[tuple[str, nn.Parameter]]:
    """`model.named_parameters()` without wrapper prefixes; a shared parameter has its first name. Of None: none."""
    found: dict[int, tuple[str, nn.Parameter]] = {}
    for module_name, module in () if model is None else all_modules(unwrapped(model), unwrapped):
        prefix = f"{module_name}." if module_name else ""
        for name, parameter in module._parameters.items():
            if parameter is not None and (key := id(parameter)) not in found:
                found[key] = prefix + name, parameter
    return iter(found.values())


def all_parameters(model: nn.Module | None, modules: Modules | None = None) -> list[nn.Parameter]:
    """`model.parameters()` at a third of its cost. modules: those of the model, where they are known. Of None: none."""
    modules = all_modules(model) if modules is None and model is not None else modules or ()
    given = [p for _, module in modules if module._parameters for p in module._parameters.values()]
    return [*{id(parameter): parameter for parameter in given if parameter is not None}.values()]


def all_modules(model: nn.Module, inside: _Inside = None) -> list[tuple[str, nn.Module]]:
    """`model.named_modules()` at a third of its cost. inside: what to see in place of a module that has parts."""
    found: dict[int, tuple[str, nn.Module]] = {id(model): ("", model)}
    _take(found, "", model._modules, inside)
    return [*found.values()]


def _take(found: dict[int, tuple[str, nn.Module]], prefix: str, parts: _Parts, inside: _Inside) -> None:
    for name, part in parts.items():
        if part is not None:
            module = inside(part) if part._modules and inside is not None else part
            if (key := id(module)) not in found:
                found[key] = prefix + name, module
                if module._modules:
                    _take(found, f"{prefix}{name}.", module._modules, inside)


def bare_keys(model: nn.Module, keys: Iterable[str]) -> dict[str, str]:
    """Names in `model.state_dict()`, of tensors or of modules, with wrapper prefixes removed: wrapped name -> bare.

    For a model whose outer wrappers are off already.
    """
    return {key: _bare(model, key) for key in keys}


def _bare(model: nn.Module, key: str) -> str:
    parts: list[str] = []
    module: nn.Module | None = model
    for part in key.split("."):
        if not _is_wrapper(module, part):
            parts.append(part)
        module = _child(module, part)
    return ".".join(parts)


def _child(module: nn.Module | None, name: str) -> nn.Module | None:
    """Also one inside wrappers: those of FSDP and checkpointing leave themselves out of the keys."""
    for parent in () if module is None else (module, unwrapped(module)):
        if isinstance(child := getattr(parent, name, None), nn.Module):
            return child
    return None


def owner_of(parameter_name: str) -> str:
    """The module that owns a parameter: `blocks.0.fc.weight` -> `blocks.0.fc`."""
    return parameter_name.rpartition(".")[0] or ROOT


def layer_of(module_name: str) -> str:
    """The layer whose weights a module makes of other parameters, or itself: `fc.parametrizations.weight` -> `fc`."""
    return f".{module_name}".partition(".parametrizations.")[0].lstrip(".") or ROOT


def with_parents(name: str) -> list[str]:
    """The modules around a module or parameter, outermost first, and itself: `a.b` -> `a`, `a.b`."""
    return list(accumulate(name.split("."), "{}.{}".format))
