"""What this rank holds of a tensor that is spread over several: its own part, and what that part is to the whole.

Nothing here communicates. Wrappers are known by their attributes, so that models without them import nothing.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from torchprobe.buffer.step import WHOLE, Share
from torchprobe.capture.fully_sharded import data_mesh
from torchprobe.naming import all_parameters
from torchprobe.statistics.dtypes import PLAIN


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
    data = next((found for found in map(data_mesh, model.modules()) if found is not None), None)
    if data is None:
        return set()
    if data.ndim == mesh.ndim:
        return set(range(mesh.ndim))
    names = data.mesh_dim_names or ()
    return {i for i, name in enumerate(mesh.mesh_dim_names or ()) if name in names}
