"""What this rank holds of a tensor that is spread over several: its own part, and what that part is to the whole.

Nothing here communicates. Wrappers are known by their attributes, so that models without them import nothing.
"""

from __future__ import annotations

import gc
import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from torchprobe.buffer.step import WHOLE, Share
from torchprobe.naming import all_modules, all_parameters
from torchprobe.statistics.dtypes import PLAIN

# ---- `fully_shard` and FullyShardedDataParallel
# Both exchange a module's parameters during a pass, and say so in private attributes alone: asked with care; where they
# are missing nothing is sharded.


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


# ---- DTensors


class Named(NamedTuple):
    """What this rank holds of a parameter or its gradient, under the parameter's name."""

    name: str
    parameter: nn.Parameter
    tensor: Tensor
    share: Share = WHOLE


def by_device(tensors: Sequence[Named]) -> Iterable[list[Named]]:
    """Those of each device."""
    if len({named.tensor.device for named in tensors}) == 1:
        return [[*tensors]]
    groups: defaultdict[torch.device, list[Named]] = defaultdict(list)
    for named in tensors:
        groups[named.tensor.device].append(named)
    return groups.values()


def is_distributed(tensor: Tensor) -> bool:
    """Whether it is a DTensor."""
    return type(tensor) not in PLAIN and hasattr(tensor, "placements") and hasattr(tensor, "to_local")


def local_part(tensor: Tensor) -> Tensor:
    """What this rank holds of a DTensor, detached; any other tensor as it is."""
    if type(tensor) in PLAIN or not is_distributed(tensor):
        return tensor
    local: Any = tensor.detach().to_local()  # type: ignore[attr-defined]
    whole: Tensor = local.wait() if hasattr(local, "wait") else local  # a gradient can still be under way
    return whole


def is_unreduced(tensor: Tensor) -> bool:
    """Whether the ranks' parts have yet to be added up element by element, so that each alone says nothing."""
    return type(tensor) not in PLAIN and is_distributed(tensor) and any(p.is_partial() for p in tensor.placements)  # type: ignore[attr-defined]


def share_of(tensor: Tensor) -> Share:
    """The share of this rank's part: sharded over some dimensions of the mesh, and a copy along the others."""
    if not is_distributed(tensor):
        return WHOLE
    mesh: Any = tensor.device_mesh  # type: ignore[attr-defined]
    placements: Any = tensor.placements  # type: ignore[attr-defined]
    coordinate = mesh.get_coordinate()
    if coordinate is None:  # this rank is outside the mesh
        return Share(tensor.numel(), 0, -1)
    own = tuple(at if place.is_replicate() else slice(None) for at, place in zip(coordinate, placements, strict=True))
    return Share(tensor.numel(), local_part(tensor).numel(), int(mesh.mesh[own].min()))


def share_like(tensor: Tensor, share: Share) -> Share:
    """That of a gradient or a state, which may lie otherwise than its parameter, whose share this is: whole on each
    rank, as that of an embedding that is split by rows.
    """
    return share_of(tensor) if type(tensor) not in PLAIN and is_distributed(tensor) else share


def ranks_on_same_data(model: nn.Module) -> tuple[int, ...]:
    """The ranks that compute on the same examples as this one, itself included: those of tensor parallelism.

    Empty when every rank has examples of its own: no DTensor, or only those of `fully_shard`.
    """
    meshes = [p.device_mesh for p in all_parameters(model) if type(p) not in PLAIN and is_distributed(p)]  # type: ignore[attr-defined]
    if not meshes:
        return ()
    mesh: Any = max(meshes, key=lambda mesh: int(mesh.ndim))  # what is only fully sharded has fewer dimensions
    data, coordinate = _data_dimensions(model, mesh), mesh.get_coordinate()
    if coordinate is None or len(data) == mesh.ndim:
        return ()
    own = tuple(coordinate[i] if i in data else slice(None) for i in range(mesh.ndim))
    return tuple(int(rank) for rank in mesh.mesh[own].flatten().tolist())  # a mesh's ranks are in host memory


def _data_dimensions(model: nn.Module, mesh: Any) -> set[int]:
    """The dimensions of the parameters' mesh over which `fully_shard` spreads the batch."""
    meshes = (getattr(group.mesh_info, "mesh", None) for module in model.modules() for group in _groups(module))
    data = next((mesh for mesh in meshes if mesh is not None), None)
    if data is None:
        return set()
    if data.ndim == mesh.ndim:
        return set(range(mesh.ndim))
    names = data.mesh_dim_names or ()
    return {i for i, name in enumerate(mesh.mesh_dim_names or ()) if name in names}


def dense(gradient: Tensor) -> Tensor:
    """The stored values of a sparse gradient, duplicates summed as the optimizer will; else itself."""
    gradient = gradient.detach() if gradient.requires_grad else gradient
    return gradient.coalesce().values() if gradient.is_sparse else gradient


def unscaled(tensors: list[Named], optimizer: Optimizer) -> list[Named]:
    """A fused optimizer gets gradients that GradScaler has not divided yet, and the scale beside them."""
    scale = getattr(optimizer, "grad_scale", None)
    if not isinstance(scale, Tensor):
        return tensors
    return [named._replace(tensor=_wide(named.tensor) / scale.to(named.tensor.device)) for named in tensors]


def _wide(tensor: Tensor) -> Tensor:
    """At least float32: what is far above the smallest fp16 number while scaled may lie below it unscaled."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))
