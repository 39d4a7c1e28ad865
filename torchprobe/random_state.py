"""The states of the random number generators that training draws from: values for a checkpoint, text for JSON."""

from __future__ import annotations

import base64
import random
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from torchprobe.messages import log as _log

_DEVICES = ("cuda", "xpu")


def random_states() -> dict[str, Any]:
    """Of Python, numpy (the global ones), torch's CPU and every device that was used. No device is started."""
    kind, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    numpy_state = (str(kind), np.asarray(keys).tolist(), int(position), int(has_gauss), float(cached))
    kinds = {name: getattr(torch, name) for name in _DEVICES if hasattr(torch, name)}
    used = {name: kind for name, kind in kinds.items() if kind.is_available() and kind.is_initialized()}
    devices = {name: list(kind.get_rng_state_all()) for name, kind in used.items()}
    if torch.backends.mps.is_available():
        devices["mps"] = [torch.mps.get_rng_state()]
    return {"python": random.getstate(), "numpy": numpy_state, "torch": torch.get_rng_state(), "devices": devices}


def set_random_states(states: Mapping[str, Any]) -> None:
    """Draw on from there. A device that this machine lacks is left out, with a warning."""
    version, internal, gauss = states["python"]
    random.setstate((version, tuple(internal), gauss))
    kind, keys, *rest = states["numpy"]
    np.random.set_state((kind, np.array(keys, np.uint32), *rest))
    torch.set_rng_state(states["torch"])
    for name, saved in states["devices"].items():
        _set_device_states(name, saved)


def random_state() -> dict[str, Any]:
    """The same, ready for JSON; costs about 0.1 ms.

    `torch` and each of `devices` are base64 of bytes, as `torch.set_rng_state` and its kin take them; `python` holds
    the version, the base64 of its uint32 words and the next Gaussian, as `random.setstate` takes them; `numpy` the
    legacy state, as `numpy.random.set_state` takes it, its keys as base64 of uint32.
    """
    states = random_states()
    version, words, gauss = states["python"]
    kind, keys, *rest = states["numpy"]
    return {
        "torch": _text(states["torch"], np.uint8),
        "python": [version, _text(words, np.uint32), gauss],
        "numpy": [kind, _text(keys, np.uint32), *rest],
        "devices": {name: [_text(one, np.uint8) for one in several] for name, several in states["devices"].items()},
    }


def set_random_state(state: Mapping[str, Any]) -> None:
    """Set the generators to what `random_state` gave."""
    version, words, gauss = state["python"]
    kind, keys, *rest = state["numpy"]
    devices = {name: [_bytes(one) for one in several] for name, several in state["devices"].items()}
    set_random_states(
        {
            "python": (version, _array(words, np.uint32).tolist(), gauss),
            "numpy": (kind, _array(keys, np.uint32), *rest),
            "torch": _bytes(state["torch"]),
            "devices": devices,
        }
    )


def _set_device_states(name: str, states: list[torch.Tensor]) -> None:
    module = getattr(torch, name, None)
    if name == "mps" and torch.backends.mps.is_available():
        torch.mps.set_rng_state(states[0])
    elif name in _DEVICES and module is not None and module.device_count() == len(states):
        module.set_rng_state_all(states)
    else:
        _log.warning("the random state of %d %s devices is not restored: this machine has others", len(states), name)


def _text(values: Any, dtype: Any) -> str:
    return base64.b64encode(np.asarray(values, dtype=dtype).tobytes()).decode()


def _array(text: str, dtype: Any) -> Any:
    return np.frombuffer(base64.b64decode(text), dtype=dtype).copy()


def _bytes(text: str) -> torch.Tensor:
    return torch.from_numpy(_array(text, np.uint8))
