"""What a checkpoint holds of a model and its helpers, and how it is put back into them; checks of what a user passes.

Names do not depend on what wraps the model. Each error names the argument, what it got and what it takes.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from torch import Tensor, nn
from torch.optim import Optimizer

from torchprobe.checkpoint.sharded import load_sharded_states, own_rank, read_directory, sharded_states
from torchprobe.messages import log as _log
from torchprobe.naming import bare_keys, unwrapped
from torchprobe.random_state import set_random_states
from torchprobe.records import number_of
from torchprobe.session import Session
from torchprobe.state import differing_names

_SHAPES_SHOWN = 5


def model_state(model: nn.Module) -> OrderedDict[str, Any]:
    """`state_dict()` of the user's own module, with bare names, and the versions of its modules."""
    root = unwrapped(model)
    state = root.state_dict()
    return _renamed(state, bare_keys(root, _keys(state)))


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
    """Load everything. What can be checked is checked before anything is changed: torch stops half-way at an error.

    random: the states of this rank's generators, last so that nothing draws after them.
    """
    _check(checkpoint, target, sharded=sharded)
    if sharded:
        load_sharded_states(target.model, target.optimizer, checkpoint, target.session, strict=target.strict)
    else:
        root = unwrapped(target.model)
        names = {bare: key for key, bare in bare_keys(root, _keys(root.state_dict())).items()}
        root.load_state_dict(_renamed(checkpoint["model"], names), strict=target.strict)
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


# ---- what a user passes to `CheckpointManager`

Mode = Literal["min", "max"]


def check_best(metric: str | None, mode: Mode) -> None:
    """Raise for what `CheckpointManager` cannot judge by."""
    if metric is not None and not isinstance(metric, str):
        raise TypeError(f"metric={metric!r}: takes a metric's name, such as 'val_loss', not {type(metric).__name__}")
    if mode not in get_args(Mode):
        raise ValueError(f"mode={mode!r}: takes 'min' (a loss) or 'max' (an accuracy)")
    if metric is None and mode == "max":
        raise ValueError("mode='max' needs metric=, the name of what is to be large")


def chosen_metric(metric: str | None, metrics: Mapping[str, float]) -> str | None:
    """The metric to judge by: the named one, else a validation loss, else any loss; None when there is none.

    Raises ValueError when metrics are given and the named one is not among them.
    """
    if metric is not None:
        if metrics and metric not in metrics:
            raise ValueError(f"metrics have no {metric!r}, by which the best is judged; they have {sorted(metrics)}")
        return metric if metrics else None
    losses = [name for name in metrics if "loss" in name.lower()]
    return next((name for name in losses if "val" in name.lower()), losses[0] if losses else None)


def is_better(value: float, best: float | None, mode: Mode) -> bool:
    """Whether a value beats the best so far; NaN never does, and anything beats NaN."""
    if math.isnan(value):
        return False
    if best is None or math.isnan(best):
        return True
    return value < best if mode == "min" else value > best


def checked_metrics(metrics: Mapping[str, Any] | None) -> dict[str, float]:
    """Plain numbers by name. Reads tensors. Raises TypeError for what is no number."""
    if metrics is None:
        return {}
    if not isinstance(metrics, Mapping):
        raise TypeError(f"metrics={metrics!r}: takes a mapping of names to numbers, such as {{'val_loss': 0.3}}")
    numbers: dict[str, float] = {}
    for name, value in metrics.items():
        number = number_of(value)
        if not isinstance(name, str) or number is None:
            raise TypeError(f"metrics[{name!r}]={value!r}: takes a name and a number")
        numbers[name] = number
    return numbers


def checked_step(step: int | None, session: Session | None) -> int:
    """The step given, or the session's. Raises TypeError or ValueError for what is no number of steps."""
    if step is None and session is not None:
        return session.step
    if isinstance(step, bool) or not isinstance(step, int):
        raise TypeError(f"step={step!r}: takes a whole number of steps; a model with a session needs none")
    if step < 0:
        raise ValueError(f"step={step}: takes a whole number of steps, 0 or more")
    return step


def check_helpers(model: nn.Module, **helpers: Any) -> None:
    """Raise TypeError unless the model is one, and each helper has a state, is a list or dict of such, or is None."""
    unwrapped(model)
    for argument, helper in helpers.items():
        for one, _ in each_with(helper, helper):
            has_state = hasattr(one, "state_dict") and hasattr(one, "load_state_dict")
            if one is not None and (not has_state or (argument != "extras" and isinstance(one, nn.Module))):
                takes = "an object with state_dict() and load_state_dict() that is no model, or None"
                raise TypeError(f"{argument}={one!r}: takes {takes}")
