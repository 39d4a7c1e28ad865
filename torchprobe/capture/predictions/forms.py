"""In which ways a plain tensor can hold class predictions, the rows of it that are read, and what they predict."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

MAX_ELEMENTS = 2**22
"""Numbers read of one output: 16 MiB. A language model's (8, 1024, 50 k) logits give 83 rows."""

FEW_CLASSES = 3
"""So few that a gradient at one prediction alone can be that of any loss: it takes as many as `FEW_ROWS` of them."""

FEW_ROWS = 4
IGNORED = -100
"""In place of a target that does not count."""

_MAX_ROWS = 2**14
_LARGE = 2**20
_NEAR_ONE = 0.02  # probabilities that were rounded or clamped


class Form(NamedTuple):
    """Rows of class scores along an axis ("softmax"), or elements that are each a yes or no: log-odds ("sigmoid"), or
    the probability of yes already ("yes").
    """

    kind: Literal["softmax", "sigmoid", "yes"]
    axis: int = -1

    @property
    def key(self) -> str:
        """Its name in rows that leave the device."""
        return f"{self.kind}{self.axis}"


LAST = Form("softmax", -1)
SECOND = Form("softmax", 1)
BINARY = Form("sigmoid")
YES = Form("yes")


# ---- what a plain output may be


def possible_forms(tensor: Tensor, inputs: Sequence[Tensor]) -> list[Form]:
    """The ways to read a plain output; none of them says that it is one.

    (batch, classes); (batch, ..., classes) where the dimensions before are the input's places, or where there are two,
    of which one might be samples; (batch, classes, ...); single numbers.
    """
    shape = tensor.shape
    if tensor.numel() == 0 or tensor.dim() == 0:
        return []
    answers = [BINARY] if decided(are_shares(tensor)) is False else [BINARY, YES]
    if tensor.dim() == 1 or shape[-1] == 1:
        return answers
    if tensor.dim() == 2:
        return [LAST, *answers]
    by_place, large = are_places(shape, inputs), tensor.numel() > _LARGE
    if by_place and large and tensor.dim() == 3:  # a language model's: no other way is worth its time
        return [LAST]
    by_example = tensor.dim() == 3 and any(x.dim() > 0 and len(x) == shape[0] for x in inputs)
    forms = [LAST] if by_place or (by_example and not large) else []
    return [*forms, *([SECOND] if shape[1] > 1 else []), *(answers if shape[1] == 1 or not large else [])]


def are_places(shape: torch.Size, inputs: Sequence[Tensor]) -> bool:
    """Whether the dimensions before the last are an input's: its examples, and the tokens or pixels of each."""
    before = shape[:-1]
    return any(
        x.shape[: len(before)] == before or (x.dim() == len(shape) and x.shape[:1] + x.shape[2:] == before)
        for x in inputs
    )


def are_shares(tensor: Tensor) -> Tensor:
    """Whether all elements lie in [0, 1]: one flag on the device."""
    x = tensor.detach()
    return (x.amin() >= 0) & (x.amax() <= 1)


def is_usable(tensor: Tensor) -> bool:
    """A strided tensor of ordinary floats with all of its values here."""
    strided = tensor.layout is torch.strided and not hasattr(tensor, "full_tensor")
    return strided and tensor.is_floating_point() and tensor.numel() > 0


def members_of(tensor: Tensor, sample_dim: int | None) -> Sequence[Tensor]:
    """The samples along a dimension; the tensor itself when there is none."""
    if sample_dim is None or not -tensor.dim() <= sample_dim < tensor.dim():
        return (tensor,)
    return tensor.unbind(sample_dim)


# ---- its rows


def row_count(shape: torch.Size, form: Form) -> int:
    """How many predictions there are."""
    return shape.numel() // max(1, class_count(shape, form))


def class_count(shape: torch.Size, form: Form) -> int:
    """How many scores a prediction has."""
    return 1 if form.kind != "softmax" else shape[form.axis]


def pick(tensor: Tensor, form: Form, generators: Generators) -> Tensor | None:
    """Indices of the rows to read, spread over all of them; None when all are. Draws from a private generator."""
    count = row_count(tensor.shape, form)
    room = max(1, min(_MAX_ROWS, MAX_ELEMENTS // max(1, class_count(tensor.shape, form))))
    if count <= room:
        return None
    strata = torch.arange(room, device=tensor.device, dtype=torch.float64 if tensor.device.type != "mps" else None)
    jitter = torch.rand(room, device=tensor.device, generator=generators.of(tensor.device))
    return ((strata + jitter) * (count / room)).long().clamp_(max=count - 1)


def by_row(tensor: Tensor, form: Form) -> Tensor:
    """A view, (..., classes) or (..., 1)."""
    return tensor.unsqueeze(-1) if form.kind != "softmax" else tensor.movedim(form.axis, -1)


def rows_of(tensor: Tensor, form: Form, index: Tensor | None) -> Tensor:
    """The chosen rows, (n, classes) or (n, 1), in float32 or wider: never of more than was picked; perhaps a view."""
    view = by_row(tensor.detach(), form)
    chosen = () if index is None else _unraveled(index, view.shape[:-1])
    rows = view[chosen] if chosen else view.reshape(-1, view.shape[-1])
    return rows.to(torch.promote_types(rows.dtype, torch.float32))


def _unraveled(index: Tensor, shape: Sequence[int]) -> tuple[Tensor, ...]:
    """`torch.unravel_index`, which copies the shape to the device and waits for it."""
    places: list[Tensor] = []
    for size in reversed(shape):
        places.insert(0, index % size)
        index = index.div(size, rounding_mode="floor")
    return tuple(places)


def same_memory(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors have the same rows, (..., classes), in the same order, by where these lie: no value is read.

    Both are alive, so that nothing else can lie there.
    """
    if a.data_ptr() != b.data_ptr() or (a.dtype, a.numel(), a.shape[-1:]) != (b.dtype, b.numel(), b.shape[-1:]):
        return False
    return (a.shape, a.stride()) == (b.shape, b.stride()) or (a.is_contiguous() and b.is_contiguous())


def stacked(members: Sequence[Tensor]) -> Tensor:
    """(members, n, classes); of one member no copy."""
    return members[0][None] if len(members) == 1 else torch.stack(list(members))


class Generators:
    """A random generator of our own for each device, so that the user's draws stay what they are."""

    def __init__(self) -> None:
        self._of: dict[torch.device, torch.Generator] = {}

    def of(self, device: torch.device) -> torch.Generator:
        """The generator for a device."""
        if device not in self._of:
            try:
                generator = torch.Generator(device)
            except RuntimeError:  # not every backend has generators of its own
                generator = torch.Generator()
            self._of[device] = generator.manual_seed(0)  # so that a run can be repeated
        return self._of[device]


# ---- what they predict


class Predicted(NamedTuple):
    """(samples, n, classes) in all, two classes for yes and no; nothing of it shares memory that the user may write to.

    probabilities: as predicted. softmax: of the rows as logits, of which a loss's gradient tells; mostly the same
    tensor. largest: (samples, n), of each row. already: (samples, n), whether all rows were probabilities.
    """

    probabilities: Tensor
    softmax: Tensor
    largest: Tensor
    already: Tensor

    @classmethod
    def of(cls, members: Sequence[Tensor], form: Form) -> Predicted:
        """From each sample's rows, (n, classes) or (n, 1)."""
        return cls(*map(stacked, zip(*(_of_member(rows, form) for rows in members), strict=True)))

    @property
    def mean(self) -> Tensor:
        """(n, classes): the samples' mean prediction."""
        return self.probabilities[0] if len(self.probabilities) == 1 else self.probabilities.mean(0)


def probabilities_of(rows: Tensor, form: Form) -> Tensor:
    """(n, classes) probabilities; rows that are such already stay."""
    return _of_member(rows, form)[0]


def known(flags: Tensor) -> bool:
    """Whether all flags are certainly set."""
    return decided(flags) is True


def decided(flags: Tensor) -> bool | None:
    """Whether all flags are set, where looking waits for nothing: on the CPU. Elsewhere nobody knows: None."""
    in_host_memory = type(flags) is Tensor and flags.is_cpu and not torch.compiler.is_compiling()
    return bool(flags.numpy().all()) if in_host_memory else None  # just computed there


def are_counts(g: Tensor, rate: Tensor, side: Tensor, p: Tensor) -> Tensor:
    """Whether gradients are those of a count of 0 at a logarithm of its rate, a Poisson loss's, more than of a no.

    Where all are small, p and the rate p / (1 - p) are nearly the same; that which was meant misses by rounding alone.
    """
    misses = []
    for x in (rate.nan_to_num(0.0, 0.0, 0.0) * side, p * side):
        slope = (x * g).sum() / x.square().sum()
        misses.append(((g - slope * x) * side).square().sum())
    rounding = 1e-12 * (g * side).square().sum()  # all that there is of one row
    return misses[0] + rounding < misses[1] / 4


def line_of(g: Tensor, distance: Tensor, side: Tensor, tolerance: float) -> tuple[Tensor, Tensor, Tensor]:
    """What gradients of one class of two are of their distances, and whether these differ: else any equal ones do."""
    d = distance * side
    spread = d.abs().amax() - torch.where(side, d.abs(), torch.inf).amin()
    return side, (d * g).sum() / d.square().sum(), spread > tolerance * d.abs().amax()


def _of_member(rows: Tensor, form: Form) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    already = _are_distributions(rows[:1])
    if form.kind == "yes":
        yes_or_no = torch.cat((1 - rows, rows), -1)
        return yes_or_no, yes_or_no, yes_or_no[:, 0], are_shares(rows).expand(len(rows))
    if form.kind == "sigmoid":
        yes_or_no = torch.cat((rows.neg().sigmoid(), rows.sigmoid()), -1)
        return yes_or_no, yes_or_no, yes_or_no[:, 0], already.expand(len(rows))
    softmax = probabilities = rows.softmax(-1)
    if not known(~already):  # the first row may be one
        already = _are_distributions(rows)
        probabilities = torch.where(already, rows / rows.sum(-1, keepdim=True), softmax)
    return probabilities, softmax, rows.amax(-1), already.expand(len(rows))


def _are_distributions(rows: Tensor) -> Tensor:
    """Whether all rows add up to 1 and none has a negative element: one flag on the device."""
    return (((rows.sum(-1) - 1).abs() < _NEAR_ONE) & (rows.amin(-1) >= 0)).all()
