"""Checkpoints of a training run: whole or not there at all, the newest and the best kept, resumed in one call."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, Literal
from zipfile import BadZipFile

from torch import nn

from torchprobe.arguments import check_count
from torchprobe.checkpoint import files, states
from torchprobe.checkpoint.files import Stored, plain, write_file
from torchprobe.checkpoint.sharded import (
    agreed,
    is_sharded,
    own_rank,
    read_directory,
    saved_names,
    sharded_states,
    write_directory,
)
from torchprobe.checkpoint.states import Target, apply, check_names, model_state, read_sharded, states_of
from torchprobe.messages import log as _log
from torchprobe.random_state import random_states
from torchprobe.session import Session, session_of
from torchprobe.writers.files import check_path, located

Checkpoint = dict[str, Any]
_DAMAGE = (OSError, RuntimeError, EOFError, ValueError, LookupError, TypeError, UnpicklingError, BadZipFile)
_VERSION = 1
_KEYS = {"epoch", "extras", "metrics", "model", "optimizer", "random", "scheduler", "session", "step"}


class CheckpointManager:
    """Saves a run's checkpoints in a directory, and finds the newest and the best again.

    A checkpoint holds the model under its bare names (whatever wraps it), optimizer, scheduler, the state of the
    torchprobe session and of all random number generators: a run that is restored goes on bitwise as if it had not
    stopped. It is written to a temporary file, synced and renamed, so that a kill at any instant leaves the one before;
    files that are damaged all the same are skipped with a warning. Loading never runs code (`weights_only=True`).

    A model whose parameters are sharded over ranks goes through `torch.distributed.checkpoint`: every rank calls
    these methods. Otherwise rank 0 alone writes, and the other ranks, where they call too, their random state.

    Args:
        directory: where to save; made when it is missing.
        max_keep: how many of the newest to keep. The best is kept besides.
        metric: by which of the metrics to judge the best; by default a validation loss, else any loss.
        mode: "min" when a small value is good, "max" when a large one is.
        session: the torchprobe session whose state to save; by default the model's own, if there is one.

    Raises TypeError, ValueError for an argument that does not fit; OSError when `directory` cannot be made.
    """

    def __init__(
        self,
        directory: str | os.PathLike[str],
        max_keep: int = 3,
        metric: str | None = None,
        mode: states.Mode = "min",
        session: Session | None = None,
    ) -> None:
        if not isinstance(directory, str | os.PathLike):
            kind = type(directory).__name__
            raise TypeError(f"directory={directory!r}: takes a path, such as 'checkpoints', not {kind}")
        if isinstance(located(directory), str):
            raise ValueError(
                f"directory={directory!r}: takes a local path, such as 'checkpoints', and no URL of a store"
            )
        check_path("directory", directory)
        check_count("max_keep", max_keep, "checkpoints")
        states.check_best(metric, mode)
        if session is not None and not isinstance(session, Session):
            raise TypeError(f"session={session!r}: takes what torchprobe.instrument returned, or None")
        self.directory = Path(located(directory))
        self._max_keep = max_keep
        self._metric = metric
        self._mode = mode
        self._session = session
        self._best: dict[str, float] | None = None  # metrics of the best so far, once they were looked up
        self.directory.mkdir(parents=True, exist_ok=True)

    def save_checkpoint(
        self,
        model: nn.Module,
        optimizer: Any = None,
        scheduler: Any = None,
        epoch: int = 0,
        step: int | None = None,
        metrics: Mapping[str, Any] | None = None,
        is_best: bool | None = None,
        *,
        extras: Mapping[str, Any] | None = None,
    ) -> Path | None:
        """Save everything that the run needs to go on; None on ranks that save no model.

        Waits for the disk. A new best shows in TensorBoard under `best/<metric>`.

        Args:
            optimizer, scheduler: objects with `state_dict()`, or lists or dicts of such.
            step: by default that of the session.
            metrics: numbers, or tensors of one element; by one of them the best is judged.
            is_best: the caller's own judgement.
            extras: what else has a state, such as `{"scaler": scaler, "ema": ema}`.

        Raises:
            OSError: when it does not fit; earlier checkpoints are as they were, and nothing is left of this one.
            TypeError, ValueError: for an argument that does not fit, or a state that could not be loaded again.
        """
        numbers = states.checked_metrics(metrics)
        states.check_helpers(model, optimizer=optimizer, scheduler=scheduler, extras=extras)
        session = self._session or session_of(model)
        step = states.checked_step(step, session)
        sharded = is_sharded(model)
        if own_rank() and not sharded:
            write_file(self._rank_file(step), plain(random_states(), "random states"))
            return None
        best = self._judged(numbers, is_best)
        best = agreed(best) if sharded else best
        if best and session is not None:
            session.log_metrics(numbers, prefix="best")
        rest = {
            "version": _VERSION,
            "epoch": epoch,
            "step": step,
            "metrics": numbers,
            "scheduler": plain(states_of(scheduler), "scheduler.state_dict()"),
            "extras": plain(states_of(extras), "the state of extras"),
            "session": session.state_dict() if session is not None and session.attached else None,
            "random": random_states(),
        }
        payload = {**plain(rest, "checkpoint"), **self._states(model, optimizer, session, sharded=sharded)}
        path = self._write(payload, best=best, sharded=sharded)
        self._best = numbers if best else self._best
        return path

    def load_latest(self, map_location: Any = "cpu") -> Checkpoint | None:
        """The newest checkpoint that can be loaded, as a dict; None where none was saved yet.

        Its keys: `model`, `optimizer`, `scheduler`, `extras`, `session`, `random` (states), `epoch`, `step`,
        `metrics`. The tensors of a sharded model come whole, on the CPU.

        Raises RuntimeError when there are checkpoints and none of them can be loaded; the message names them.
        """
        return self._newest(files.stored(self.directory), lambda one: _read(one.path, map_location))

    def load_best(self, map_location: Any = "cpu") -> Checkpoint | None:
        """The checkpoint that was the best when it was saved and is not beaten since; else like `load_latest`."""
        found = [one for one in files.stored(self.directory) if one.best]
        return self._newest(found, lambda one: _read(one.path, map_location))

    def restore(
        self,
        model: nn.Module,
        optimizer: Any = None,
        scheduler: Any = None,
        *,
        extras: Mapping[str, Any] | None = None,
        which: Literal["latest", "best"] = "latest",
        strict: bool = True,
    ) -> Checkpoint | None:
        """Load a checkpoint into these objects, the random number generators and the model's session.

        Call it after `torchprobe.instrument` and before the first step. Returns `epoch`, `step` and `metrics`, or
        None, with nothing changed, where no checkpoint was saved yet: a first run and a resumed one are one script.

        Args:
            which: the newest, or the best.
            strict: whether the model's names must be the saved ones; without it those in common are loaded.

        Raises:
            ValueError: for a checkpoint of another model; the message lists the names that differ.
            RuntimeError: when there are checkpoints and none of them can be loaded.
        """
        if which not in ("latest", "best"):
            raise ValueError(f"which={which!r}: takes 'latest' or 'best'")
        states.check_helpers(model, optimizer=optimizer, scheduler=scheduler, extras=extras)
        target = Target(model, optimizer, scheduler, extras, self._session or session_of(model), strict)
        found = [one for one in files.stored(self.directory) if one.best or which == "latest"]
        found = agreed(found) if is_sharded(model) else found
        checkpoint = self._newest(found, lambda one: self._restored(one, target))
        return checkpoint and {key: checkpoint[key] for key in ("epoch", "step", "metrics")}

    def _states(self, model: nn.Module, optimizer: Any, session: Session | None, *, sharded: bool) -> dict[str, Any]:
        if sharded:
            return sharded_states(model, optimizer, session)
        return {
            "model": plain(model_state(model), "model.state_dict()"),
            "optimizer": plain(states_of(optimizer), "optimizer.state_dict()"),
        }

    def _judged(self, numbers: Mapping[str, float], is_best: bool | None) -> bool:
        name = states.chosen_metric(self._metric, numbers)
        if is_best is not None or name is None:
            return bool(is_best)
        if self._best is None:
            self._best = {}
            with suppress(RuntimeError):  # none can be read, as the log says: this one may be the best
                self._best = (self.load_best() or {"metrics": {}})["metrics"]
        return states.is_better(numbers[name], self._best.get(name), self._mode)

    def _write(self, payload: dict[str, Any], *, best: bool, sharded: bool) -> Path:
        step = payload["step"]
        path = self.directory / files.next_name(self.directory, step, best, files.SHARDED if sharded else files.WHOLE)
        path = agreed(path) if sharded else path
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            if sharded:
                write_directory(path, payload)
            else:
                write_file(path, payload)
            if own_rank():  # last: a rank that failed alone before would leave the others waiting
                write_file(self._rank_file(step), payload["random"])
        except OSError as error:
            where = f"{str(self.directory)!r} ({error.strerror or error})"
            message = f"the checkpoint of step {step} could not be written to {where}; earlier ones are as they were"
            raise OSError(error.errno, message) from error
        if not own_rank():
            for one in files.stored(self.directory):
                if one.step == step and one.path != path:  # saved twice, and judged otherwise
                    files.remove(one.path)
            files.prune(self.directory, self._max_keep)
        return path

    def _rank_file(self, step: int) -> Path:
        return self.directory / f"step_{step:010d}.rank{own_rank()}.pt"

    def _newest(self, found: list[Stored], load: Callable[[Stored], Checkpoint]) -> Checkpoint | None:
        """The newest that can be loaded, None when there are none. Raises RuntimeError when none of them can be."""
        unreadable: dict[str, str] = {}
        for one in reversed(found):
            try:
                return load(one)
            except _UnreadableError as error:  # noqa: PERF203
                unreadable[one.path.name] = error.kind
        if not found:
            return None
        kinds = " or ".join(sorted(set(unreadable.values())))
        names = ", ".join(f"{name} ({kind})" for name, kind in unreadable.items())
        raise RuntimeError(
            f"all {len(found)} checkpoints in {str(self.directory)!r} are {kinds}: {names}. The log says why; "
            "to begin anew, move them away"
        )

    def _restored(self, one: Stored, target: Target) -> Checkpoint:
        if not one.path.is_dir():
            checkpoint = _read(one.path)
        else:
            with _readable(one.path):
                names = saved_names(one.path)
            check_names(names, sharded_states(target.model, None, None)["model"], strict=target.strict)
            with _readable(one.path):
                checkpoint = _checked(read_sharded(one.path, target, names))
        apply(checkpoint, target, self._own_random_states(one, checkpoint), sharded=one.path.is_dir())
        return checkpoint

    def _own_random_states(self, one: Stored, checkpoint: Checkpoint) -> Any:
        if not own_rank():
            return checkpoint["random"]
        path = self._rank_file(one.step)
        with suppress(_UnreadableError), _readable(path):
            return files.read_file(path, "cpu") if path.exists() else None
        return None


class _UnreadableError(Exception):
    """A checkpoint that is "damaged" or "refused"."""

    def __init__(self, kind: str) -> None:
        super().__init__(kind)
        self.kind = kind


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    """Says what is wrong with a file or directory that is read inside; raises `_UnreadableError` then."""
    try:
        yield
    except _DAMAGE as error:
        kind = "refused" if isinstance(error, files.RefusedError) else "damaged"
        reason = next(iter(str(error).splitlines()), "") or type(error).__name__
        _log.warning("checkpoint %s is %s and skipped: %s", path.name, kind, reason)
        raise _UnreadableError(kind) from error


def _read(path: Path, map_location: Any = "cpu") -> Checkpoint:
    with _readable(path):
        return _checked(read_directory(path, None) if path.is_dir() else files.read_file(path, map_location))


def _checked(checkpoint: Any) -> Checkpoint:
    if not isinstance(checkpoint, dict) or not checkpoint.keys() >= _KEYS:
        raise ValueError("it was not written by CheckpointManager")
    return checkpoint
