"""Models whose parameters are spread over ranks (DTensor), through `torch.distributed.checkpoint`.

Every rank calls these together. Tensors alone go through it; everything else is in a file of its own, which
`weights_only=True` loads. (Its own index file, `.metadata`, is a pickle that torch reads as such.)
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from torchprobe.checkpoint.files import held, make_anew, plain, publish, read_file, remove, temporary, write_file
from torchprobe.distributed.world import is_connected
from torchprobe.session import Session

_REST = "rest.pt"
_SHARDED_PARTS = {"model", "optimizer"}
_SEPARATOR = "::"
_T = TypeVar("_T")


def own_rank() -> int:
    """The rank; 0 without ranks."""
    return dist.get_rank() if is_connected() else 0


def agreed(value: _T) -> _T:
    """Rank 0's value, on every rank, all together; without ranks the value itself."""
    if not is_connected():
        return value
    values = [value]
    dist.broadcast_object_list(values, src=0)
    return values[0]


def is_sharded(model: nn.Module) -> bool:
    """Whether any parameter is spread over ranks."""
    kinds = {cls.__name__ for module in model.modules() for cls in type(module).__mro__}
    return "FullyShardedDataParallel" in kinds or any(hasattr(p, "full_tensor") for p in model.parameters())


def sharded_states(model: nn.Module, optimizer: Any, session: Session | None) -> dict[str, Any]:
    """States by parameter name, each rank with its own part of every tensor. For a session see `_paused`."""
    from torch.distributed.checkpoint import state_dict as states

    options = states.StateDictOptions(flatten_optimizer_state_dict=True)
    found: dict[str, Any] = {"model": states.get_model_state_dict(model, options=options), "optimizer": None}
    if optimizer is not None:
        with _paused(session):
            found["optimizer"] = states.get_optimizer_state_dict(model, _optimizers(optimizer), options=options)
    return found


def load_sharded_states(
    model: nn.Module, optimizer: Any, found: Mapping[str, Any], session: Session | None, *, strict: bool
) -> None:
    """The inverse of `sharded_states`."""
    from torch.distributed.checkpoint import state_dict as states

    options = states.StateDictOptions(flatten_optimizer_state_dict=True, strict=strict)
    states.set_model_state_dict(model, found["model"], options=options)
    if optimizer is not None:
        with _paused(session):
            states.set_optimizer_state_dict(
                model, _optimizers(optimizer), optim_state_dict=found["optimizer"], options=options
            )


def write_directory(path: Path, payload: Mapping[str, Any]) -> None:
    """Write `payload`, whose `model` and `optimizer` are `sharded_states`; there as a whole or not at all.

    Raises OSError on every rank when it does not fit, with nothing left of it.
    """
    from torch.distributed.checkpoint.api import CheckpointException
    from torch.distributed.checkpoint.state_dict_saver import save

    unfinished = Path(agreed(str(temporary(path))))  # it names the process
    tensors, rest = _split(payload)
    error = None
    with nullcontext() if own_rank() else held(unfinished, make_anew):
        try:
            save(tensors, checkpoint_id=unfinished)
            if own_rank() == 0:
                write_file(unfinished / _REST, plain(rest, "checkpoint"))
                publish(unfinished, path)
        except (OSError, RuntimeError, CheckpointException) as failure:
            error = _reason(failure)
    error = agreed(error)
    if error is not None:
        if own_rank() == 0:
            remove(unfinished)
        raise OSError(error)


def read_directory(path: Path, into: Mapping[str, Any] | None) -> dict[str, Any]:
    """What `write_directory` wrote. The tensors go into those of `into`, sharded as these are, or into new whole ones.

    Raises what a damaged directory makes torch raise, or OSError.
    """
    from torch.distributed.checkpoint.api import CheckpointException
    from torch.distributed.checkpoint.state_dict_loader import load

    rest: dict[str, Any] = read_file(path / _REST, "cpu")
    if into is None:
        flat = {at: torch.empty(one.size, dtype=one.properties.dtype) for at, one in _metadata(path).items()}
    else:
        flat = _split(into)[0]
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.distributed is")  # of one process alone: as is meant
            load(flat, checkpoint_id=path, no_dist=not is_connected())
    except CheckpointException as error:
        raise OSError(_reason(error)) from error
    for place, value in flat.items():
        part, _, name = place.partition(_SEPARATOR)
        rest[part][name] = value
    return rest


def saved_names(path: Path) -> dict[str, Any]:
    """The names and sizes of a saved model's tensors, without reading them: name -> tensor on the meta device."""
    start = f"model{_SEPARATOR}"
    found = {place.removeprefix(start): one for place, one in _metadata(path).items() if place.startswith(start)}
    return {name: torch.empty(entry.size, device="meta") for name, entry in found.items()}


def _reason(error: BaseException) -> str:
    """What went wrong, of the first rank where it did; torch's own message has every rank's traceback."""
    failures = getattr(error, "failures", None)
    cause = next(iter(failures.values()))[0] if failures else error
    return str(cause).strip() or type(cause).__name__


def _paused(session: Session | None) -> AbstractContextManager[None]:
    """Torch makes an optimizer's state by a step at a learning rate of 0, which is no step of the run."""
    return nullcontext() if session is None else session.paused()


def _optimizers(optimizer: Any) -> list[Optimizer]:
    several = optimizer.values() if isinstance(optimizer, Mapping) else optimizer
    return list(several) if isinstance(several, Iterable) else [several]


def _split(payload: Mapping[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors of model and optimizer by place, and the payload without them."""
    tensors: dict[str, Tensor] = {}
    rest = dict(payload)
    for part in _SHARDED_PARTS & payload.keys():
        named = payload[part] or {}
        tensors.update({f"{part}{_SEPARATOR}{name}": v for name, v in named.items() if isinstance(v, Tensor)})
        if payload[part] is not None:
            rest[part] = {name: value for name, value in named.items() if not isinstance(value, Tensor)}
    return tensors, rest


def _metadata(path: Path) -> Mapping[str, Any]:
    from torch.distributed.checkpoint.filesystem import FileSystemReader

    entries: Mapping[str, Any] = FileSystemReader(path).read_metadata().state_dict_metadata
    return entries
