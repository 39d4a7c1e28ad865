"""What a run needs to go on in another process as if it had not stopped: `Session.state_dict` and its inverse."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Protocol

from torch import nn

from torchprobe.naming import named_parameters

_VERSION = 1
_NAMES_SHOWN = 5
_KINDS = (("version", int), ("parameters", list | tuple), ("parts", Mapping))


class Stateful(Protocol):
    """A part of a session whose state goes into its `state_dict`.

    A state is made of dict, list, tuple, str, int, float, bool, None and tensors, so that
    `torch.load(weights_only=True)` takes it.
    """

    def state_dict(self) -> dict[str, Any]:
        """The state as it is now; later changes do not reach it."""

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a state that `state_dict` gave."""


class RunState:
    """The stateful parts of a session, by name. `parts` may grow until the state is loaded."""

    def __init__(self, parts: Mapping[str, Stateful]) -> None:
        self.parts = dict(parts)

    def state_dict(self, model: nn.Module) -> dict[str, Any]:
        """The state of every part, and by which parameters to know the model again."""
        parts = {name: part.state_dict() for name, part in self.parts.items()}
        return {"version": _VERSION, "parameters": _names(model), "parts": parts}

    def load_state_dict(self, state: Mapping[str, Any], model: nn.Module) -> None:
        """Every part that the state knows goes on from there.

        Raises TypeError or ValueError, with nothing changed, for what is no state, one of a later version, and one
        of another model; then the message lists the parameters that differ.
        """
        if not isinstance(state, Mapping) or any(not isinstance(state.get(key), kind) for key, kind in _KINDS):
            raise TypeError(
                "state: takes what session.state_dict() returned; a model's or optimizer's is another thing"
            )
        if state["version"] > _VERSION:
            raise ValueError(
                f"state is of version {state['version']}, and this torchprobe reads {_VERSION}: upgrade it"
            )
        different = differing_names(map(str, state["parameters"]), _names(model))
        if different:
            raise ValueError(f"state is of another model: {different}")
        self._load({name: state["parts"][name] for name in self.parts if name in state["parts"]})

    def _load(self, states: Mapping[str, Any]) -> None:
        """All or none."""
        before = {name: self.parts[name].state_dict() for name in states}
        try:
            for name, state in states.items():
                self.parts[name].load_state_dict(state)
        except Exception as error:  # whatever a damaged file or a rule of the user's holds
            for part, own in before.items():
                self.parts[part].load_state_dict(own)
            raise ValueError(f"state['parts'][{name!r}] is damaged ({error!r}); take an earlier one") from error


def differing_names(saved: Iterable[str], own: Iterable[str]) -> str:
    """Which names are on one side only, for a message; empty when they are the same."""
    before, now = set(saved), set(own)
    sides = (("only in the saved one", before - now), ("only in this one", now - before))
    return "; ".join(f"{side}: {_listed(names)}" for side, names in sides if names)


def _listed(names: set[str]) -> str:
    shown = ", ".join(sorted(names)[:_NAMES_SHOWN])
    return f"{shown} and {len(names) - _NAMES_SHOWN} more" if len(names) > _NAMES_SHOWN else shown


def _names(model: nn.Module) -> list[str]:
    return [name for name, _ in named_parameters(model)]
