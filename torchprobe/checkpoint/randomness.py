"""The states of the random number generators that training draws from."""

from __future__ import annotations

import logging
import random
from collections.abc import Iterator, Mapping
from types import ModuleType
from typing import Any

import numpy as np
import torch

_log = logging.getLogger("torchprobe")

_DEVICES = ("cuda", "xpu")


def random_states() -> dict[str, Any]:
    """Of Python, numpy (the global ones), torch's CPU and every device that was used. No device is started."""
    kind, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    numpy_state = (str(kind), np.asarray(keys).tolist(), int(position), int(has_gauss), float(cached))
    devices = {name: list(module.get_rng_state_all()) for name, module in _used_devices()}
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


def _used_devices() -> Iterator[tuple[str, ModuleType]]:
    for name in _DEVICES:
        module = getattr(torch, name, None)
        if module is not None and module.is_available() and module.is_initialized():
            yield name, module


def _set_device_states(name: str, states: list[torch.Tensor]) -> None:
    module = getattr(torch, name, None)
    if name == "mps" and torch.backends.mps.is_available():
        torch.mps.set_rng_state(states[0])
    elif name in _DEVICES and module is not None and module.device_count() == len(states):
        module.set_rng_state_all(states)
    else:
        _log.warning("the random state of %d %s devices is not restored: this machine has others", len(states), name)
