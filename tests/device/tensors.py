"""Tensors on a device that is not there: they hold values, but nobody on the host may look at them without waiting.

`torch.device("fgpu:0")` and `("fgpu:1")` come from torch's Python backend for PrivateUse1, with autograd's own threads.
Each operation computes on the CPU, so that numbers are right; what a GPU would refuse raises here too, and
what would make the host wait is a `waits.WaitError` (see there). Operations are ordered by streams: see `streams`.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor

from tests.device import operations, streams, waits

NAME = "fgpu"
DEVICES = 2

# Where operands may lie on two devices.
_ANYWHERE = {"copy_", "_to_copy", "_foreach_copy_", "index", "index_put", "index_put_", "_index_put_impl_", "set_"}


class DeviceTensor(Tensor):
    """A tensor of the device, whose elements are in `inner`, which is in host memory in truth."""

    inner: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor, device: torch.device) -> DeviceTensor:
        strided = inner.layout is torch.strided
        made = Tensor._make_wrapper_subclass(
            cls,
            inner.size(),
            strides=inner.stride() if strided else None,
            storage_offset=inner.storage_offset() if strided else None,
            dtype=inner.dtype,
            layout=inner.layout,
            device=device,
        )
        made.inner = inner
        return made

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return run(function, args, kwargs or {})

    def __repr__(self, **_: Any) -> str:
        return f"tensor({self.inner.tolist()}, device={self.device})"

    def __deepcopy__(self, memo: Any) -> Tensor:
        made = DeviceTensor(copy.deepcopy(self.inner.detach(), memo), self.device)
        if isinstance(self, torch.nn.Parameter):
            made = torch.nn.Parameter(made, self.requires_grad)
        if self.grad is not None:
            made.grad = copy.deepcopy(self.grad, memo)
        return memo.setdefault(id(self), made.requires_grad_(self.requires_grad))

    # What torch reads from a storage, which such a tensor has not.

    def data_ptr(self) -> int:
        return self.inner.data_ptr()

    def untyped_storage(self) -> Any:
        return self.inner.untyped_storage()

    def as_subclass(self, cls: type) -> Tensor:
        return self if cls is Tensor else super().as_subclass(cls)

    def record_stream(self, stream: streams.Stream) -> None:
        streams.memory.record_stream(self.inner, stream)

    def is_pinned(self, device: Any = None) -> bool:
        return False

    @property
    def data(self) -> Tensor:
        return DeviceTensor(self.inner.detach(), self.device)

    @data.setter
    def data(self, value: Tensor) -> None:
        Tensor.data.__set__(self, value)
        self.inner = value.inner

    # What looks at elements.

    def numpy(self, **_: Any) -> Any:
        raise TypeError(f"can't convert {self.device} device type tensor to numpy. Use Tensor.cpu() first")

    def tolist(self) -> Any:
        waits.host_reads("tolist")
        return self.inner.tolist()

    def __array__(self, dtype: Any = None) -> Any:
        raise TypeError(f"can't convert {self.device} device type tensor to numpy. Use Tensor.cpu() first")


def run(function: Any, args: Any, kwargs: Any) -> Any:
    """An operation with such a tensor among its operands, or that makes one."""
    operands = [*_tensors(args), *_tensors(kwargs.values())]
    device = _device(function, operands, kwargs)
    waits.look_at(function, args, kwargs, operands)
    inside = {id(one.inner): one for one in operands if isinstance(one, DeviceTensor)}
    inner_args = _unwrapped(args)
    inner_kwargs = {name: _unwrapped((value,))[0] for name, value in kwargs.items()} if kwargs else {}
    if kwargs and _on_device(inner_kwargs.get("device")):
        inner_kwargs["device"] = "cpu"
    if streams.copies_out(function, inner_args, operands):
        return streams.copy_out(args[0], args[1].inner, args[1].device)
    now = operations.order(function, inner_args, inner_kwargs, inside, device)
    out = function(*inner_args, **inner_kwargs)
    if device is not None and now is not None:
        operations.wrote(out, [t.inner for t in inside.values()], now)
    return _wrapped(out, inside, device)


def _unwrapped(values: Any) -> Any:
    """What is computed with, in the place of what stands for it. values: a list or a tuple."""
    found = [
        value.inner
        if isinstance(value, DeviceTensor)
        else _unwrapped(value)
        if isinstance(value, (list, tuple))
        else value
        for value in values
    ]
    return found if type(values) is list else type(values)(found)


def _wrapped(leaf: Any, inside: dict[int, Tensor], device: torch.device | None) -> Any:
    if isinstance(leaf, Tensor):
        known = inside.get(id(leaf))
        if known is None:
            return leaf if device is None else DeviceTensor(leaf, device)
        if known.shape != leaf.shape:  # an `out` that was made larger
            Tensor.data.__set__(known, DeviceTensor(leaf, known.device))
        return known
    if isinstance(leaf, (list, tuple)):
        return type(leaf)([_wrapped(one, inside, device) for one in leaf])
    return leaf


def _tensors(values: Any) -> list[Tensor]:
    found = []
    for value in values:
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, (list, tuple)):
            found += _tensors(value)
    return found


def _on_device(device: Any) -> bool:
    return device is not None and torch.device(device).type == NAME


def _device(function: Any, operands: list[Tensor], kwargs: Any) -> torch.device | None:
    """Where the result is; None: on the CPU. Raises what a GPU raises for operands on two devices."""
    if kwargs.get("device") is not None:
        target = torch.device(kwargs["device"])
        return _numbered(target) if target.type == NAME else None
    places = {tensor.device for tensor in operands}
    if len(places) == 1:
        (only,) = places
        return only if only.type == NAME else None
    name = waits.short_name(function)
    if len(places) > 1:  # numbers of no dimension may lie on the CPU
        places = {tensor.device for tensor in operands if tensor.dim() or tensor.device.type != "cpu"} or places
    if len(places) > 1 and name not in _ANYWHERE:
        raise RuntimeError(
            f"Expected all tensors to be on the same device, but {name} found {sorted(map(str, places))}"
        )
    first = operands[0].device if name in _ANYWHERE and operands else next(iter(places), torch.device(NAME, 0))
    return first if first.type == NAME else None


def _numbered(device: torch.device) -> torch.device:
    return device if device.index is not None else torch.device(device.type, streams.current_device())


_tensor = torch.tensor


def tensor(data: Any, *, device: Any = None, **options: Any) -> Tensor:
    """In place of `torch.tensor`, which does not know such devices: made in host memory and copied, as that does."""
    device = torch.get_default_device() if device is None else torch.device(device)
    if device.type != NAME:
        return _tensor(data, device=device, **options)
    requires_grad = options.pop("requires_grad", False)
    made = data.detach().clone() if isinstance(data, Tensor) else _tensor(data, device="cpu", **options).to(device)
    return made.requires_grad_(requires_grad)
