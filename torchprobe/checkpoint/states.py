"""What a checkpoint holds of a model and its helpers, and how it is put back into them.

Names do not depend on what wraps the model.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from torchprobe.checkpoint.sharded import load_sharded_states, own_rank, read_directory, sharded_states
from torchprobe.messages import log as _log
from torchprobe.naming import bare_keys, unwrapped
from torchprobe.random_state import set_random_states
from torchprobe.session import Session
from torchprobe.state import differing_names

_SHAPES_SHOWN = 5


def model_state(model: nn.Module) -> OrderedDict[str, Any]:
    """`state_dict()` of the user's own module, with bare names, and the versions of its modules."""
    root = unwrapped(model)
    state = root.state_dict()
    return _renamed(state, bare_keys(root, _keys(state)))


def load_model(model: nn.Module, state: Mapping[str, Any], *, strict: bool) -> None:
    """Load a `model_state` into a model, whatever wraps it. Check first: torch stops half-way at an error."""
    root = unwrapped(model)
    names = {bare: key for key, bare in bare_keys(root, _keys(root.state_dict())).items()}
    root.load_state_dict(_renamed(state, names), strict=strict)


def states_of(helper: Any) -> Any:
    """The state of an optimizer, a scheduler or the like, or of several in a list or a dict; None for None."""
    if helper is None:
        return None
    if isinstance(helper, Mapping):
        return {name: states_of(one) for name, one in helper.items()}
    if isinstance(helper, list | tuple):
        return [states_of(one) for one in helper]
    return helper.state_dict()


def each_with(helper: Any, state: Any) -> Iterator[tuple[Any, Any]]:
    """Each of several helpers in a list or a dict, or the one, with its part of a state of the same arrangement."""
    if isinstance(helper, Mapping):
        for name, one in helper.items():
            yield from each_with(one, state[name])
    elif isinstance(helper, list | tuple):
        for one, part in zip(helper, state, strict=True):
            yield from each_with(one, part)
    else:
        yield helper, state


def load_states(helper: Any, state: Any) -> None:
    """The inverse of `states_of`, into objects of the same arrangement."""
    for one, part in each_with(helper, state):
        one.load_state_dict(part)


@dataclass(frozen=True, slots=True)
class Target:
    """The objects that a checkpoint is restored into; None for what is not wanted."""

    model: nn.Module
    optimizer: Any
    scheduler: Any
    extras: Any
    session: Session | None
    strict: bool


def read_sharded(path: Path, target: Target, names: Mapping[str, Any]) -> dict[str, Any]:
    """Read a directory, whose `saved_names` are known to fit, into the target's own tensors.

    Raises what torch raises for a damaged one.
    """
    into = sharded_states(target.model, target.optimizer, target.session)
    if not target.strict:
        into["model"] = {name: value for name, value in into["model"].items() if name in names}
    return read_directory(path, into)


def apply(checkpoint: Mapping[str, Any], target: Target, random: Mapping[str, Any] | None, *, sharded: bool) -> None:
    """Load everything. What can be checked is checked before anything is changed.

    random: the states of this rank's generators, last so that nothing draws after them.
    """
    _check(checkpoint, target, sharded=sharded)
    if sharded:
        load_sharded_states(target.model, target.optimizer, checkpoint, target.session, strict=target.strict)
    else:
        load_model(target.model, checkpoint["model"], strict=target.strict)
        if target.optimizer is not None:
            load_states(target.optimizer, checkpoint["optimizer"])
    for part in ("scheduler", "extras"):
        if getattr(target, part) is not None:
            load_states(getattr(target, part), checkpoint[part])
    _resume_session(checkpoint["session"], target)
    if random is None:
        _log.warning("rank %d saved no random state: its random numbers are other ones from here on", own_rank())
    else:
        set_random_states(random)


def check_names(saved: Mapping[str, Any], own: Mapping[str, Any], *, strict: bool) -> None:
    """Raise ValueError when a model's state is another model's; the message lists the names that differ.

    Without `strict`, names may be missing on either side, and only shapes are compared.
    """
    different = differing_names(saved, own) if strict else ""
    if different:
        raise ValueError(f"the checkpoint is of another model: {different}")
    shapes = [
        f"{name} {tuple(value.shape)} against {tuple(own[name].shape)}"
        for name, value in saved.items()
        if isinstance(value, Tensor) and isinstance(own.get(name), Tensor) and value.shape != own[name].shape
    ]
    if shapes:
        raise ValueError(
            f"the checkpoint is of another model; saved shapes differ: {', '.join(shapes[:_SHAPES_SHOWN])}"
        )


def _keys(state: Mapping[str, Any]) -> list[str]:
    return [*state, *getattr(state, "_metadata", {})]


def _renamed(state: Mapping[str, Any], names: Mapping[str, str]) -> OrderedDict[str, Any]:
    """A state under other names, with the versions of its modules."""
    renamed = OrderedDict((names.get(key, key), value) for key, value in state.items())
    versions = getattr(state, "_metadata", {})
    vars(renamed).update(_metadata={names.get(key, key): value for key, value in versions.items()})
    return renamed


def _check(checkpoint: Mapping[str, Any], target: Target, *, sharded: bool) -> None:
    if not sharded:
        check_names(checkpoint["model"], model_state(target.model), strict=target.strict)
    for part in ("optimizer", "scheduler", "extras"):
        if getattr(target, part) is not None and checkpoint[part] is None:
            raise ValueError(f"the checkpoint holds no {part}: it was saved without one; restore without {part}= too")
    if not sharded and target.optimizer is not None:
        _check_groups(target.optimizer, checkpoint["optimizer"])


def _resume_session(state: Mapping[str, Any] | None, target: Target) -> None:
    if target.session is None:
        return
    if state is None:
        _log.warning("the checkpoint holds no session's state: steps are counted from %d", target.session.step)
        return
    try:
        target.session.load_state_dict(state)
    except RuntimeError as error:  # restored in the middle of a run
        _log.info("the session goes on counting from its own step: %s", error)
    except ValueError as error:  # another model's, by permission
        _log.warning("the session counts from step %d: %s", target.session.step, error)


def _check_groups(optimizer: Any, saved: Any) -> None:
    """Raise ValueError when an optimizer's state is of other parameter groups; likewise for several."""
    for one, state in each_with(optimizer, saved):
        if isinstance(one, Optimizer):
            own, before = ([len(g["params"]) for g in groups] for groups in (one.param_groups, state["param_groups"]))
            if own != before:
                raise ValueError(
                    f"the checkpoint's {type(one).__name__} has groups of {before} parameters, and this one "
                    f"of {own}: make the optimizer as it was made for the saved run"
                )
