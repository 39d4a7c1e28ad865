"""What a probe class has to say for itself: its source, its fields, how parts are merged, what it selects.

`REDUCTIONS` merge rows that are plain numbers: shape (..., fields), those of "mean" with one column more, last, the
number of elements of each part, so that the mean of parts of unequal size is that of all their elements. NaN in a part
is NaN in the whole, but for "last".
"""

from __future__ import annotations

from abc import ABCMeta
from collections.abc import Callable, Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any, Literal, TypeAlias, cast

import torch
from torch import Tensor

from torchprobe.arguments import check_callable, checked_patterns
from torchprobe.naming import with_parents

OF_MODULES = ("outputs", "output_gradients", "units", "routers")
OF_PARAMETERS = ("gradients", "parameters", "updates", "micro_gradients", "momenta", "second_moments")
OFFERED = ("outputs", "output_gradients", "gradients", "parameters", "updates", "micro_gradients")
"""The sources that a user's probe may name."""
BUILT_IN = (
    *("attention", "loss", "uncertainty", "calibration", "flow", "units", "routers", "optimizers", "diagnosis"),
    *("momenta", "second_moments", "performance"),
)
"""Those that are wired to one probe of ours each."""

Reduce: TypeAlias = Literal["sum", "mean", "max", "last"]
Select: TypeAlias = "str | Iterable[str] | Callable[[str, Any], bool]"

_registered: dict[str, None] = {}  # names of sources of a user's own, process-wide as classes are


def _weighted_mean(a: Tensor, b: Tensor) -> Tensor:
    """The means of both parts' elements, and how many these are; a part without an element counts for nothing."""
    weight_a, weight_b = a[..., -1:], b[..., -1:]
    total = weight_a + weight_b
    mean = a[..., :-1] * (weight_a / total) + b[..., :-1] * (weight_b / total)
    mean = torch.where(weight_a == 0, b[..., :-1], torch.where(weight_b == 0, a[..., :-1], mean))
    return torch.cat((mean, total), dim=-1)


def _last(a: Tensor, b: Tensor) -> Tensor:
    """The later part: the later micro-batch, and of several ranks the highest one."""
    return b


REDUCTIONS: Mapping[str, Callable[[Tensor, Tensor], Tensor]] = {
    "sum": torch.add,
    "mean": _weighted_mean,
    "max": torch.maximum,
    "last": _last,
}


class Frozen(ABCMeta):
    """Makes objects that cannot be changed once their constructors have returned."""

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        """Make one."""
        made = super().__call__(*args, **kwargs)
        made.__dict__["_made"] = True
        return made


def register(source: str) -> None:
    """Offer a source of a user's own to probes, by name. Raises for what is no name, or that of a source of ours."""
    if not isinstance(source, str) or not source:
        raise TypeError(f"name={source!r}: takes a name, such as 'inputs', not {type(source).__name__}")
    if source in (*OFFERED, *BUILT_IN):
        raise ValueError(f"name={source!r}: is a source of torchprobe's own; takes another name, such as 'my_{source}'")
    _registered[source] = None


def offered_sources() -> tuple[str, ...]:
    """The names that a user's probe may use now."""
    return (*OFFERED, *_registered)


def check_probe_class(cls: type[Any], offered: Iterable[str]) -> None:
    """Raise a TypeError or ValueError that says what a probe class lacks. offered: the sources it may name.

    A class that inherits its source from a probe of ours may name that one too.
    """
    source, offered = getattr(cls, "source", None), tuple(offered)
    allowed = (*offered, *BUILT_IN) if _is_ours(cls, "source") else offered
    sources = source if isinstance(source, tuple) else (source,)
    if not sources or any(name not in allowed for name in sources):
        known = ", ".join(map(repr, offered))
        raise TypeError(f"{cls.__name__}.source is {source!r}; takes one of {known}, or a tuple of these")
    fields = getattr(cls, "fields", None)
    if not isinstance(fields, tuple) or not fields or not all([isinstance(f, str) for f in fields]):  # noqa: C419
        raise TypeError(f"{cls.__name__}.fields is {fields!r}; takes a tuple of names, one per value of compute()")
    degrees = getattr(cls, "degrees", None)
    if degrees is not None and (not isinstance(degrees, tuple) or len(degrees) != len(fields)):
        raise TypeError(f"{cls.__name__}.degrees is {degrees!r}; takes a tuple of numbers, one per field")
    if cls.reduce not in (None, *REDUCTIONS):
        raise ValueError(f"{cls.__name__}.reduce is {cls.reduce!r}; takes one of {', '.join(map(repr, REDUCTIONS))}")


def checked_reduce(cls: type[Any], reduce: Any, combines: bool) -> Reduce:
    """A way to merge parts, as a constructor's argument. combines: whether the class has a `combine` of its own."""
    if reduce not in REDUCTIONS:
        raise ValueError(f"reduce={reduce!r}: takes one of {', '.join(map(repr, REDUCTIONS))}")
    if combines or (cls.reduce is not None and _is_ours(cls, "reduce")):
        raise TypeError(f"reduce={reduce!r}: {cls.__name__} merges its parts by a rule of its own")
    return cast("Reduce", reduce)


def check_merging(name: str, reduce: Reduce | None, combines: bool) -> None:
    """Raise a TypeError unless a probe says what two parts of a step are together."""
    if reduce is None and not combines:
        raise TypeError(
            f"{name} does not say how parts of a step are merged (micro-batches, ranks): give it a "
            "combine(self, a, b), or reduce = 'sum', 'mean', 'max' or 'last'"
        )


def checked_row(name: str, row: Any, width: int, by: str = "compute(tensor)") -> Tensor:
    """One value per field. A single number is a row of one; anything else raises a TypeError that names the probe."""
    if torch.compiler.is_compiling():  # which traces probes of torchprobe's own alone
        return row  # type: ignore[no-any-return]
    if isinstance(row, Tensor) and row.shape in ((width,), (1,) * (width == 1) * row.dim()) and not row.is_complex():
        return row.reshape(width)
    got = f"shape {tuple(row.shape)}, {row.dtype}" if isinstance(row, Tensor) else f"{type(row).__name__}"
    raise TypeError(f"{by} of {name} gave {got}; takes a real tensor of shape ({width},), one value per field")


def combined(probe: Any, a: Tensor, b: Tensor) -> Tensor:
    """The row of two parts. Raises what a user's `combine` raises, and for what is no row."""
    return checked_row(probe.name, probe.combine(a, b), probe.width, "combine(a, b)")


def checked_select(name: str, sources: Sequence[str], select: Select) -> tuple[str, ...] | Callable[[str, Any], bool]:
    """Patterns or a predicate. Raises TypeError for anything else, and where there is nothing to choose from."""
    if not {*OF_MODULES, *OF_PARAMETERS, *_registered}.intersection(sources):
        raise TypeError(f"select: {name} watches no modules or parameters to choose from")
    if not callable(select):
        return checked_patterns("select", select, "blocks.*.fc")
    check_callable("select", select, "patterns, or a function (name, module or parameter) -> bool", "name", "module")
    return select


def selects(select: tuple[str, ...] | Callable[[str, Any], bool], name: str, module_or_parameter: Any) -> bool:
    """Whether patterns or a predicate fit a module or parameter; a pattern also fits the parameters below a module."""
    if callable(select):
        return bool(select(name, module_or_parameter))
    names = with_parents(name) if isinstance(module_or_parameter, Tensor) else (name,)
    return any(fnmatchcase(part, pattern) for part in names for pattern in select)


def _is_ours(cls: type, attribute: str) -> bool:
    """Whether a class has an attribute from a probe of this package."""
    giver = next((c for c in cls.__mro__ if attribute in vars(c)), cls)
    return giver.__module__.partition(".")[0] == __name__.partition(".")[0]
