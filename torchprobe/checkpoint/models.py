"""A model's and its helpers' states, under names that do not depend on what wraps the model."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from torchprobe.naming import bare_keys, unwrapped
from torchprobe.state import differing_names

_SHAPES_SHOWN = 5


def model_state(model: nn.Module) -> OrderedDict[str, Any]:
    """`state_dict()` of the user's own module, with bare names, and the versions of its modules."""
    root = unwrapped(model)
    state = root.state_dict()
    names = bare_keys(root, state)
    bare = OrderedDict((names[key], value) for key, value in state.items())
    versions = getattr(state, "_metadata", {})
    prefixes = bare_keys(root, versions)
    bare._metadata = {prefixes[key]: value for key, value in versions.items()}  # type: ignore[attr-defined]
    return bare


def load_model(model: nn.Module, state: Mapping[str, Any], *, strict: bool) -> None:
    """Load a `model_state` into a model, whatever wraps it. Check first: torch stops half-way at an error."""
    root = unwrapped(model)
    own = root.state_dict()
    names = {bare: key for key, bare in bare_keys(root, [*own, *getattr(own, "_metadata", {})]).items()}
    wrapped = OrderedDict((names.get(name, name), value) for name, value in state.items())
    versions = getattr(state, "_metadata", {})
    wrapped._metadata = {names.get(key, key): value for key, value in versions.items()}  # type: ignore[attr-defined]
    root.load_state_dict(wrapped, strict=strict)


def check_model(model: nn.Module, saved: Mapping[str, Any], *, strict: bool) -> None:
    """Raise ValueError when a `model_state` is another model's; the message lists the names that differ.

    Without `strict`, names may be missing on either side, and only shapes are compared.
    """
    check_state_names(saved, model_state(model), strict=strict)


def check_state_names(saved: Mapping[str, Any], own: Mapping[str, Any], *, strict: bool) -> None:
    """The same for two states."""
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


def check_groups(optimizer: Any, saved: Any) -> None:
    """Raise ValueError when an optimizer's state is of other parameter groups; likewise for several."""
    if isinstance(optimizer, Mapping):
        optimizer, saved = list(optimizer.values()), [saved.get(name) for name in optimizer]
    if isinstance(optimizer, list | tuple):
        for one, state in zip(optimizer, saved, strict=True):
            check_groups(one, state)
    elif isinstance(optimizer, Optimizer):
        own, before = (
            [len(group["params"]) for group in groups] for groups in (optimizer.param_groups, saved["param_groups"])
        )
        if own != before:
            raise ValueError(
                f"the checkpoint's {type(optimizer).__name__} has groups of {before} parameters, and this one "
                f"of {own}: make the optimizer as it was made for the saved run"
            )


def states_of(helper: Any) -> Any:
    """The state of an optimizer, a scheduler or the like, or of several in a list or a dict; None for None."""
    if helper is None:
        return None
    if isinstance(helper, Mapping):
        return {name: states_of(one) for name, one in helper.items()}
    if isinstance(helper, list | tuple):
        return [states_of(one) for one in helper]
    return helper.state_dict()


def load_states(helper: Any, state: Any) -> None:
    """The inverse of `states_of`, into objects of the same arrangement."""
    if isinstance(helper, Mapping):
        for name, one in helper.items():
            load_states(one, state[name])
    elif isinstance(helper, list | tuple):
        for one, saved in zip(helper, state, strict=True):
            load_states(one, saved)
    else:
        helper.load_state_dict(state)
