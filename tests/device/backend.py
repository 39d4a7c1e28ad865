"""Makes the device known to torch, once a process; a reason not to where this torch lacks the Python backend."""

from __future__ import annotations

import functools

import torch
from torch.library import Library

from tests.device import streams, tensors

try:
    from torch.utils.backend_registration import _DummyBackendModule, _DummyDeviceGuard
    from torch.utils.backend_registration import _setup_privateuseone_for_python_backend as _set_up
except ImportError:
    _set_up = None

MISSING = None if _set_up else f"torch {torch.__version__} has no Python backend for devices of one's own"


@functools.cache
def set_up() -> None:
    """Register the device: from now on `torch.device("fgpu")` is one that tensors can be made on."""

    class Module(_DummyBackendModule):
        """What `torch.get_device_module` gives, as far as users and we ask it."""

        Stream, Event = streams.Stream, streams.Event
        stream, current_stream, default_stream = map(
            staticmethod, (streams.stream, streams.current_stream, streams.default_stream)
        )
        is_current_stream_capturing = staticmethod(streams.is_current_stream_capturing)
        current_device = staticmethod(streams.current_device)

        def device_count(self) -> int:
            return tensors.DEVICES

        def get_amp_supported_dtype(self) -> list[torch.dtype]:
            return [torch.float16, torch.bfloat16]

    class Guard(_DummyDeviceGuard):
        """Without a body: the class of torch does all."""

    _set_up(tensors.NAME, Module(), device_guard=Guard())
    kernels = Library("_", "IMPL")
    kernels.fallback(lambda op, *args, **kwargs: tensors.run(op, args, kwargs), "PrivateUse1")
    set_up.kernels = kernels  # which lives as long as the process
