"""What a pass was called with and on: whether two passes are of the same input, by the same model."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any
from weakref import ReferenceType, ref

import torch
from torch import Tensor, nn

from torchprobe.capture.outputs import tensors_in
from torchprobe.statistics.dtypes import GPUS

_SIMPLE = (str, int, float, bool, type(None))
_A_SIDE = 16  # elements along a dimension that stand for a tensor's values

UNDRAWN = (
    "the model was called more than once with one input and drew no random numbers of torch in between: such passes are"
    " not taken for members of one prediction, since what differs may be a state that the model keeps. Members that"
    " draw by numpy or by Python: draw by torch, or call session.log_predictions(probs, targets)"
)


class InputKey:
    """What a pass was called with, and the state of the model that it was called on; keeps nothing alive.

    Versions, places and simple attributes are compared on the host; what leaves no trace there (a numpy array beneath,
    `.data.copy_`), a few values of each tensor tell, on the device. draws: whether the pass drew random numbers; what
    differs without any is a state that the model keeps, such as a membrane's, and no other member.
    """

    def __init__(
        self, args: Sequence[Any], kwargs: Mapping[str, Any], model: nn.Module | None = None, draws: bool = True
    ) -> None:
        self._draws = draws
        tensors = input_tensors(args, kwargs)
        self._tensors = [(ref(tensor), version_of(tensor)) for tensor in tensors]
        self._others = [_remembered(part) for part in (*args, *kwargs.items()) if not _has_tensor(part)]
        parameters = [] if model is None else [p for p in model.parameters() if _is_plain(p)]
        places = [(p.data_ptr(), version_of(p)) for p in parameters]
        self._state = [] if model is None else [*_attributes(model), *places]
        self._values = [_some_values(x) for x in tensors if _is_plain(x)] + _one_of_each(parameters)

    def same_as(self, other: InputKey) -> bool:
        """Whether both are members of one prediction for one input, as far as the host can tell."""
        return self._draws and other._draws and self.has_input_of(other)

    def has_input_of(self, other: InputKey) -> bool:
        """Whether both are the same input, members or not; never so without a tensor in it."""
        if not self._tensors or len(self._tensors) != len(other._tensors) or self._state != other._state:
            return False
        pairs = zip(self._tensors, other._tensors, strict=True)
        same = all(a() is not None and a() is b() and n == m for (a, n), (b, m) in pairs)
        return same and len(self._others) == len(other._others) and all(map(_same, self._others, other._others))

    def unchanged_since(self, other: InputKey) -> Iterator[Tensor]:
        """Flags on the devices: whether values are what they were."""
        for a, b in zip(self._values, other._values, strict=True):
            yield ((a == b) | ((a != a) & (b != b))).all()


def input_tensors(args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Tensor]:
    """Every tensor that a module was called with."""
    return [*tensors_in(tuple(args)), *tensors_in(dict(kwargs))]


class Draws:
    """Whether random numbers of torch are drawn from `begin` on: by its own generators, or by one that the model keeps.
    Waits for no device, starts none; costs a few tens of µs.
    """

    def __init__(self) -> None:
        self._before: list[Tensor] | None = None
        self._kept: list[tuple[ReferenceType[nn.Module], str]] | None = None  # torch 2.11's take no weak one

    def begin(self, model: nn.Module | None) -> None:
        """A pass begins."""
        if self._kept is None:
            modules = () if model is None else model.modules()
            kept = ((ref(module), name, value) for module in modules for name, value in module.__dict__.items())
            self._kept = [(module, name) for module, name, value in kept if isinstance(value, torch.Generator)]
        self._before = self._states()

    def any(self, device: torch.device) -> bool:
        """Whether there were some; of a device whose generator cannot be looked at there may have been."""
        now = self._states() if device.type in ("cpu", *GPUS) else None
        if now is None or self._before is None or len(now) != len(self._before):
            return True
        return not all(map(torch.equal, now, self._before))

    def _states(self) -> list[Tensor] | None:
        """In host memory, all of them; None while a graph of CUDA is recorded."""
        used = [device for kind in GPUS if (device := getattr(torch, kind)).is_initialized()]
        generators = [torch.default_generator, *(g for device in used for g in device.default_generators)]
        kept = [module.__dict__.get(name) for one, name in self._kept or () if (module := one()) is not None]
        generators += [one for one in kept if isinstance(one, torch.Generator)]
        try:
            return [generator.get_state() for generator in generators]
        except RuntimeError:
            return None


def _is_plain(tensor: Tensor) -> bool:
    special = tensor.is_sparse or tensor.is_meta or tensor.is_quantized
    return tensor.numel() > 0 and tensor.layout is torch.strided and not special and not hasattr(tensor, "full_tensor")


def _some_values(tensor: Tensor) -> Tensor:
    steps = tuple(slice(None, None, max(1, n // _A_SIDE)) for n in tensor.shape)
    return tensor.detach()[steps].flatten()[: _A_SIDE**3].clone()


def _one_of_each(parameters: Iterable[Tensor]) -> list[Tensor]:
    """One element of each, by device and type: any average of weights changes it."""
    groups: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
    for p in parameters:
        middle = sum((n // 2) * stride for n, stride in zip(p.shape, p.stride(), strict=True))
        one = p.detach().as_strided((1,), (1,), p.storage_offset() + middle)
        groups.setdefault((p.device, p.dtype), []).append(one)
    return [torch.cat(ones) for ones in groups.values()]


def _attributes(model: nn.Module) -> Iterator[tuple[Any, ...]]:
    """Simple attributes of all modules, such as the mode, or the task that is chosen."""
    for module in model.modules():
        yield tuple(value for value in module.__dict__.values() if type(value) in _SIMPLE)


def _remembered(part: Any) -> object:
    """A simple value itself; of anything else a weak reference, or what is never equal where it takes none."""
    try:
        return part if _is_simple(part) else ref(part)
    except TypeError:
        return object()


def _same(x: object, y: object) -> bool:
    """Of simple values; anything else has to be the same living object."""
    if isinstance(x, ReferenceType) and isinstance(y, ReferenceType):
        return x() is not None and x() is y()
    return _is_simple(x) and _is_simple(y) and x == y


def _has_tensor(part: Any) -> bool:
    return next(tensors_in(part), None) is not None


def _is_simple(value: Any) -> bool:
    return all(map(_is_simple, value)) if isinstance(value, tuple) else type(value) in _SIMPLE


def version_of(tensor: Tensor) -> int:
    """How often a tensor was changed in place, where that is counted."""
    return 0 if tensor.is_inference() else tensor._version
