"""What a pass was called with and on: whether two passes are of the same input, by the same model."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from types import FunctionType
from typing import Any
from weakref import ReferenceType, ref

import torch
from torch import Tensor, nn

from torchprobe.capture.outputs import given_tensors, tensors_in
from torchprobe.naming import all_modules, all_parameters
from torchprobe.statistics.dtypes import GPUS, PLAIN

_SIMPLE = (str, int, float, bool, type(None))
_A_SIDE = 16  # elements along a dimension that stand for a tensor's values
_MOST_KEPT = 64
_OF_TORCH = {*nn.Module().__dict__} - {"training"}
_RUNNING = {"running_mean", "running_var", "num_batches_tracked"}  # read in evaluation alone, which leaves them alone

UNDRAWN = (
    "the model was called more than once with one input and drew no random numbers of torch in between: such passes are"
    " not taken for members of one prediction, since what differs may be a state that the model keeps. Members that"
    " draw by numpy or by Python: draw by torch, or call session.log_predictions(probs, targets)"
)
KEPT = (
    "the model was called more than once with one input, and what it keeps was another each time ({}): such passes are "
    "not taken for members of one prediction, since that may be a state that they differ by. Where no pass reads what "
    "the one before has kept, keep it outside of the model"
)


class InputKey:
    """What a pass was called with, and the state of the model that it was called on; keeps nothing alive.

    Versions, places and simple attributes are compared on the host; what leaves no trace there (a numpy array beneath,
    `.data.copy_`), a few values of each tensor tell, on the device. draws: whether the pass drew random numbers; what
    differs without any is a state that the model keeps, such as a membrane's, and no other member. Nor is one before
    which an attribute or a buffer was another, or a tensor in it.
    """

    def __init__(
        self, args: Sequence[Any], kwargs: Mapping[str, Any], model: nn.Module | None = None, draws: bool = True
    ) -> None:
        self._draws = draws
        tensors = given_tensors(args, kwargs)
        self._tensors = [_identity(tensor) for tensor in tensors]
        self._others = [
            _remembered(part) for part in (*args, *kwargs.items()) if not any(True for _ in tensors_in(part))
        ]
        modules = [] if model is None else all_modules(model)
        parameters = [] if model is None else [p for p in all_parameters(model, modules) if _is_plain(p)]
        self._weights = [(p.data_ptr(), version_of(p)) for p in parameters]
        self._kept = dict(_attributes(modules))
        self._values = [_some_values(x) for x in tensors if _is_plain(x)] + _one_of_each(parameters)

    def same_as(self, other: InputKey) -> bool:
        """Whether both are members of one prediction for one input, as far as the host can tell."""
        return self._draws and other._draws and self.has_input_of(other) and not self.kept_else(other)

    def why_apart(self, other: InputKey) -> str:
        """Of a pass with the same input: why both are no members of one prediction."""
        return KEPT.format(", ".join(self.kept_else(other)[:3])) if self._draws and other._draws else UNDRAWN

    def kept_else(self, other: InputKey) -> list[str]:
        """Names of what the model keeps, where it is not the same."""
        names = self._kept.keys() | other._kept.keys() if self._kept != other._kept else ()
        return sorted(name for name in names if self._kept.get(name) != other._kept.get(name))

    def has_input_of(self, other: InputKey) -> bool:
        """Whether both are the same input and weights, members or not; never so without a tensor in it."""
        if not self._tensors or len(self._tensors) != len(other._tensors) or self._weights != other._weights:
            return False
        pairs = zip(self._tensors, other._tensors, strict=True)
        same = all(a() is not None and a() is b() and n == m for (a, *n), (b, *m) in pairs)
        return same and len(self._others) == len(other._others) and all(map(_same, self._others, other._others))

    def unchanged_since(self, other: InputKey) -> Iterator[Tensor]:
        """Flags on the devices: whether values are what they were."""
        for a, b in zip(self._values, other._values, strict=True):
            yield ((a == b) | ((a != a) & (b != b))).all()


class Draws:
    """Whether random numbers of torch are drawn in a pass, or after one: by its own generators, or by one that the
    model keeps. Waits for no device, starts none; costs a few tens of µs.
    """

    def __init__(self) -> None:
        self._before: list[Tensor] | None = None
        self._after: list[Tensor] | None = None
        self._kept: list[tuple[ReferenceType[nn.Module], str]] | None = None  # torch 2.11's take no weak one

    def begin(self, model: nn.Module | None) -> bool | None:
        """A pass begins: whether some were drawn since the one before, None where that is not known."""
        if self._kept is None:
            modules = () if model is None else model.modules()
            kept = ((ref(module), name, value) for module in modules for name, value in module.__dict__.items())
            self._kept = [(module, name) for module, name, value in kept if isinstance(value, torch.Generator)]
        self._before = self._states()
        return _differ(self._after, self._before)

    def end(self, device: torch.device | None) -> bool:
        """It has returned: whether there were some; of a device whose generator is not to be seen there may be."""
        self._after = self._states() if device is not None and device.type in ("cpu", *GPUS) else None
        return _differ(self._before, self._after) is not False

    def since(self) -> bool:
        """Whether some were certainly drawn since it has."""
        return self._after is not None and _differ(self._after, self._states()) is True

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


def _differ(a: list[Tensor] | None, b: list[Tensor] | None) -> bool | None:
    """Whether states are not the same; None where that is not known, as with a device that began in between."""
    return None if a is None or b is None or len(a) != len(b) else not all(map(torch.equal, a, b))


def _is_plain(tensor: Tensor) -> bool:
    special = tensor.is_sparse or tensor.is_meta or tensor.is_quantized or tensor.layout is not torch.strided
    whole = type(tensor) in PLAIN or not hasattr(tensor, "full_tensor")
    return not special and whole and tensor.numel() > 0


def _identity(tensor: Tensor) -> tuple[ReferenceType[Tensor], int, object]:
    """Of a view the tensor that it shows, and which part: one that is made anew for each pass is the same input."""
    base = tensor._base if _is_plain(tensor) else None
    place = None if base is None else (tensor.storage_offset(), tensor.shape, tensor.stride(), tensor.dtype)
    return ref(tensor if base is None else base), version_of(tensor), place


def _some_values(tensor: Tensor) -> Tensor:
    steps = tuple(slice(None, None, max(1, n // _A_SIDE)) for n in tensor.shape)
    return tensor.detach()[steps].flatten()[: _A_SIDE**3].clone()


def _one_of_each(parameters: Iterable[Tensor]) -> list[Tensor]:
    """One element of each, by device and type: any average of weights changes it."""
    groups: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
    for p in parameters:
        dense = p.is_contiguous()
        middle = p.numel() // 2 if dense else sum(n // 2 * step for n, step in zip(p.shape, p.stride(), strict=True))
        one = p.detach().as_strided((1,), (1,), p.storage_offset() + middle)
        groups.setdefault((p.device, p.dtype), []).append(one)
    return [torch.cat(ones) for ones in groups.values()]


def _attributes(modules: Iterable[tuple[str, nn.Module]]) -> Iterator[tuple[str, Any]]:
    """What all modules keep, such as the mode, the task that is chosen, or a membrane: simple values, which tensors,
    and what is in a list, tuple, dict or namespace.
    """
    for path, module in modules:
        kept = module.__dict__ | module._buffers if module._buffers else module.__dict__
        for name, value in kept.items():
            if value is None or name in _OF_TORCH or name in _RUNNING or name.startswith("_torchprobe"):
                continue
            found = (type(value), value) if type(value) in _SIMPLE else _fingerprint(value)
            if found is not None:
                yield f"{path}.{name}" if path else name, found


def _fingerprint(value: Any) -> Any:
    if type(value) in _SIMPLE:
        return None if value is None else (type(value), value)
    if isinstance(value, Tensor):
        return id(value), value.data_ptr() if _is_plain(value) else 0, version_of(value)
    if type(value) not in (list, tuple, dict) and not issubclass(type(value), (nn.Module, type, FunctionType)):
        value = getattr(value, "__dict__", None)  # a namespace, or any plain object that keeps a state
    if not isinstance(value, list | tuple | dict) or len(value) > _MOST_KEPT:
        return None
    parts = value.items() if isinstance(value, dict) else enumerate(value)
    return [(key, _fingerprint(one)) for key, one in parts if type(one) in _SIMPLE or isinstance(one, Tensor)] or None


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


def _is_simple(value: Any) -> bool:
    return all(map(_is_simple, value)) if isinstance(value, tuple) else type(value) in _SIMPLE


def version_of(tensor: Tensor) -> int:
    """How often a tensor was changed in place, where that is counted."""
    return 0 if tensor.is_inference() else tensor._version
