"""In which ways a plain tensor can hold class predictions, and the rows of it that are read."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

MAX_ELEMENTS = 2**22
"""Numbers read of one output: 16 MiB. A language model's (8, 1024, 50 k) logits give 83 rows."""

MAX_ROWS = 2**14
FEW_CLASSES = 3
"""So few that a gradient at one prediction alone can be that of any loss: it takes as many as `FEW_ROWS` of them."""

FEW_ROWS = 4
_LARGE = 2**20
_NEAR_ONE = 1e-3


class Form(NamedTuple):
    """Rows of class scores along an axis ("softmax"), or elements that are each a yes or no ("sigmoid")."""

    kind: Literal["softmax", "sigmoid"]
    axis: int = -1

    @property
    def key(self) -> str:
        """Its name in rows that leave the device."""
        return f"{self.kind}{self.axis}"


LAST = Form("softmax", -1)
SECOND = Form("softmax", 1)
BINARY = Form("sigmoid")


def possible_forms(tensor: Tensor, inputs: Sequence[Tensor]) -> list[Form]:
    """The ways to read a plain output; none of them says that it is one.

    (batch, classes); (batch, time, classes) when the input is (batch, time, ...), for otherwise the first dimension
    may be samples; (batch, classes, ...); single numbers.
    """
    shape = tensor.shape
    if tensor.numel() == 0 or tensor.dim() == 0:
        return []
    if tensor.dim() == 1 or shape[-1] == 1:
        return [BINARY]
    if tensor.dim() == 2:
        return [LAST, BINARY]
    forms = [LAST] if is_sequence(tensor, inputs) else []
    if forms and tensor.numel() > _LARGE:  # a language model's: no other way is worth its time
        return forms
    return [*forms, SECOND] if shape[1] > 1 else [*forms, BINARY]


def is_usable(tensor: Tensor) -> bool:
    """A strided tensor of ordinary floats with all of its values here."""
    return (
        tensor.is_floating_point()
        and tensor.layout is torch.strided
        and not hasattr(tensor, "full_tensor")
        and tensor.numel() > 0
    )


def is_one_of(member: Tensor, output: Tensor) -> bool:
    """Whether an output is of a member's shape, or of that with one dimension more, of the members."""
    shape, own = list(output.shape), list(member.shape)
    return is_usable(member) and (own == shape or any(shape[:i] + shape[i + 1 :] == own for i in range(len(shape))))


def is_sequence(tensor: Tensor, inputs: Sequence[Tensor]) -> bool:
    """Whether a 3-D output's first two dimensions are those of an input: batch and time, not samples."""
    return tensor.dim() == 3 and any(x.shape[:2] == tensor.shape[:2] for x in inputs)


def row_count(tensor: Tensor, form: Form) -> int:
    """How many predictions there are."""
    return tensor.numel() if form.kind == "sigmoid" else tensor.numel() // max(1, tensor.shape[form.axis])


def pick(tensor: Tensor, form: Form, generators: Generators) -> Tensor | None:
    """Indices of the rows to read, spread over all of them; None when all are. Draws from a private generator."""
    count = row_count(tensor, form)
    classes = 1 if form.kind == "sigmoid" else tensor.shape[form.axis]
    room = max(1, min(MAX_ROWS, MAX_ELEMENTS // max(1, classes)))
    if count <= room:
        return None
    strata = torch.arange(room, device=tensor.device, dtype=torch.float64 if tensor.device.type != "mps" else None)
    jitter = torch.rand(room, device=tensor.device, generator=generators.of(tensor.device))
    return ((strata + jitter) * (count / room)).long().clamp_(max=count - 1)


def rows_of(tensor: Tensor, form: Form, index: Tensor | None) -> Tensor:
    """The chosen rows, (n, classes) or (n, 1), in float32 or wider: never of more than was picked; perhaps a view."""
    tensor = tensor.detach()
    view = tensor.unsqueeze(-1) if form.kind == "sigmoid" else tensor.movedim(form.axis, -1)
    chosen = () if index is None else torch.unravel_index(index, view.shape[:-1])
    rows = view[chosen] if chosen else view.reshape(-1, view.shape[-1])
    return rows.to(torch.promote_types(rows.dtype, torch.float32))


def stacked(members: Sequence[Tensor]) -> Tensor:
    """(members, n, classes); of one member no copy."""
    return members[0][None] if len(members) == 1 else torch.stack(list(members))


def are_distributions(rows: Tensor) -> Tensor:
    """Whether all rows add up to 1 and none has a negative element: one flag on the device."""
    return (((rows.sum(-1) - 1).abs() < _NEAR_ONE) & (rows.amin(-1) >= 0)).all()


class Generators:
    """A random generator of our own for each device, so that the user's draws stay what they are."""

    def __init__(self) -> None:
        self._of: dict[torch.device, torch.Generator] = {}

    def of(self, device: torch.device) -> torch.Generator:
        """The generator for a device."""
        if device not in self._of:
            self._of[device] = torch.Generator(device).manual_seed(0)
        return self._of[device]
