"""Where `fully_shard` and FullyShardedDataParallel keep parameters and gradients while the model holds others.

Both exchange a module's parameters during a pass, and say so in private attributes alone: asked with care, and missing
ones mean that nothing is sharded.
"""

from __future__ import annotations

import gc
import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import nn

from torchprobe.buffer.step import Share
from torchprobe.naming import all_modules, all_parameters


def is_fully_sharded(model: nn.Module) -> bool:
    """Whether any part of the model is, by either interface."""
    modules = all_modules(model)
    if any(hasattr(kind, "_get_fsdp_state") for kind in {type(module) for _, module in modules}):
        return True
    return any(map(is_flattened, all_parameters(model, modules)))


def lasting_parameters(model: nn.Module) -> Iterator[nn.Parameter]:
    """The parameters that an optimizer holds, also while whole ones are in their place."""
    managed = list(_managed(model))
    yield from (held.sharded_param for held in managed)
    known = {id(p) for held in managed for p in (held.sharded_param, getattr(held, "_unsharded_param", None))}
    yield from (p for p in all_parameters(model) if id(p) not in known)


def data_mesh(module: nn.Module) -> Any:
    """The mesh that a module was fully sharded over; None for another module."""
    return next((getattr(group.mesh_info, "mesh", None) for group in _groups(module)), None)


def is_flat_sharded(module: nn.Module) -> bool:
    """Whether it is a FullyShardedDataParallel wrapper."""
    return "FullyShardedDataParallel" in [cls.__name__ for cls in type(module).__mro__]


def is_flattened(parameter: nn.Parameter) -> bool:
    """Whether it is a view of a flat parameter, of which this rank has a part."""
    return getattr(parameter, "_fsdp_flattened", False)


def flat_shares(model: nn.Module) -> Mapping[int, Share]:
    """Shares of the parameters that are flattened, by identity.

    The model itself does not know of the wrapper around it: then all objects are looked at, for 50 ms.
    """
    flattened = {id(p) for p in all_parameters(model) if is_flattened(p)}
    if not flattened:
        return {}
    found = _shares_in(filter(is_flat_sharded, model.modules()))
    if not flattened <= found.keys():
        found |= _shares_in(o for o in gc.get_objects() if issubclass(type(o), nn.Module) and is_flat_sharded(o))
    return found


def _shares_in(wrappers: Iterable[Any]) -> dict[int, Share]:
    return {id(p): share for wrapper in wrappers for p, share in _flat_parameters(wrapper)}


def _flat_parameters(wrapper: Any) -> Iterator[tuple[nn.Parameter, Share]]:
    handle = getattr(wrapper, "_handle", None)
    if handle is None or not getattr(handle, "uses_sharded_strategy", False):
        return
    first = min(torch.distributed.get_process_group_ranks(handle.process_group))
    for parameter, shape in zip(handle.flat_param._params or (), handle.flat_param._shapes, strict=False):
        yield parameter, Share(math.prod(shape), parameter.numel(), first)


def _managed(model: nn.Module) -> Iterator[Any]:
    """What `fully_shard` keeps for each parameter."""
    for module in model.modules():
        for group in _groups(module):
            yield from group.fsdp_params


def _groups(module: nn.Module) -> list[Any]:
    get_state: Any = getattr(module, "_get_fsdp_state", None) if hasattr(type(module), "_get_fsdp_state") else None
    if get_state is None:
        return []
    state = get_state()
    group = getattr(state, "_fsdp_param_group", None) if not hasattr(state, "_fsdp_param_groups") else None
    return list(getattr(state, "_fsdp_param_groups", None) or ([] if group is None else [group]))
