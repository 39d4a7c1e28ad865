"""Puts a checkpoint into what the user trains with."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from torchprobe.checkpoint.models import check_groups, check_model, load_model, load_states
from torchprobe.checkpoint.ranks import own_rank
from torchprobe.checkpoint.sharded import load_sharded_states, read_directory, saved_names, sharded_states
from torchprobe.random_state import set_random_states
from torchprobe.session import Session

_log = logging.getLogger("torchprobe")


@dataclass(frozen=True, slots=True)
class Target:
    """The objects that a checkpoint is restored into; None for what is not wanted."""

    model: nn.Module
    optimizer: Any
    scheduler: Any
    extras: Any
    session: Session | None
    strict: bool


def read_sharded(path: Path, target: Target) -> dict[str, Any]:
    """Read a directory into the target's own tensors, once the names are known to fit.

    Raises ValueError for another model's, and what torch raises for a damaged one.
    """
    into = sharded_states(target.model, target.optimizer, target.session)
    if not target.strict:
        names = saved_names(path)
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


def _check(checkpoint: Mapping[str, Any], target: Target, *, sharded: bool) -> None:
    if not sharded:
        check_model(target.model, checkpoint["model"], strict=target.strict)
    for part in ("optimizer", "scheduler", "extras"):
        if getattr(target, part) is not None and checkpoint[part] is None:
            raise ValueError(f"the checkpoint holds no {part}: it was saved without one; restore without {part}= too")
    if not sharded and target.optimizer is not None:
        check_groups(target.optimizer, checkpoint["optimizer"])


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
