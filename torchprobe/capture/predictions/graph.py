"""What the graph of a loss says of an output: which operation judges it, and what lies between the two.

Nodes tell their names, their successors and plain options at any time; what they saved only until a backward pass frees
it.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, TypeAlias

from torch import Tensor

from torchprobe.capture.compat import sequence_number, shape_of_result
from torchprobe.capture.predictions.forms import BINARY, IGNORED, LAST, SECOND, YES, Form

_MOST_NODES = 2000
_SHAPES = r"View|UnsafeView|ReshapeAlias|Transpose|Permute|Squeeze|Unsqueeze|Clone|ToCopy|T|Alias"
_CHOICES = r"Slice|Select|Index|IndexSelect|Unbind|Split|SplitWithSizes"
_IS_VIEW = re.compile(f"({_SHAPES}|{_CHOICES})Backward")
_IS_SHAPE = re.compile(f"({_SHAPES})Backward")
_LONGEST_WAY = 16
_SELECTS = {"TopkBackward", "SortBackward", "KthvalueBackward"}
_MIXES = {f"{name}Backward" for name in ("Logsumexp", "Log", "Log1P", "Log2", "LogSoftmax", "Softmax", "Exp")}
_MOVES = {"TransposeBackward", "PermuteBackward", "TBackward"}
_KINDS = {
    "NllLossBackward": "softmax",
    "NllLoss2DBackward": "softmax",
    "BinaryCrossEntropyWithLogitsBackward": "sigmoid",
    "BinaryCrossEntropyBackward": "yes",
}

Above: TypeAlias = "dict[tuple[Any, int], list[Any]]"
"""By node and number of its result: what uses it."""

Users: TypeAlias = "defaultdict[Any, list[Any]]"
"""By node: what uses any result of it."""


class Judge(NamedTuple):
    """Who judges an output.

    kind: "whole" where the root is a reduced cross-entropy, and perhaps more, of the output itself, reached in no other
    way; "each" where its examples are weighed, masked or chosen afterwards; "also" where its log-probabilities are used
    in other ways as well, or where several such losses judge it, as of each time step, and then without a node; ""
    where something else is reached from the output; "blind" where the graph does not tell.
    node: of the loss. moved: whether an axis was moved on the way. selected: whether examples are chosen by value.
    mixed: whether its classes weigh what else is learned, as the components of a mixture are.
    """

    kind: Literal["whole", "each", "also", "", "blind"]
    node: Any = None
    moved: bool = False
    selected: bool = False
    mixed: bool = False

    @property
    def judges(self) -> str:
        """The kind of form that its loss takes the output for, where it is known."""
        return "" if self.node is None else _KINDS[_name(self.node)]


UNKNOWN, BLIND, PARTS = Judge(""), Judge("blind"), Judge("also")


class Place(NamedTuple):
    """Where a tensor stands in its graph, which this does not keep alive: the number of its node, and of the result."""

    sequence: int
    result: int


def place_of(tensor: Tensor) -> Place | None:
    """None of a tensor without a graph."""
    sequence = None if tensor.grad_fn is None else sequence_number(tensor.grad_fn)
    return None if sequence is None else Place(sequence, tensor.output_nr)


def judge_of(roots: Sequence[Tensor], place: Place | None) -> Judge:
    """Which loss between an output and what backward is called on judges it. Costs about 1 µs a node."""
    above, node = _above(roots, place)
    if node is None or place is None:
        return BLIND
    users = _by_node(above)
    judges = [judge for user in above.get((node, place.result), []) for judge in _judges_at(user, users)]
    known = [judge for judge in judges if judge.kind]
    judge = known[0] if len(known) == 1 else PARTS if {judge.kind for judge in known} == {"whole"} else UNKNOWN
    if judge.kind == "whole":
        return judge if len(judges) == 1 else judge._replace(kind="also")
    later = _later(node, users)
    return judge._replace(selected=any(_name(n) in _SELECTS for n in later), mixed=_is_mixed(node, users, later))


def _judges_at(node: Any, users: Users, moved: bool = False) -> list[Judge]:
    """Of all ways on from an output, past views."""
    if not _IS_VIEW.fullmatch(_name(node)):
        return [_judged(node, users)._replace(moved=moved)]
    moved |= _name(node) in _MOVES
    return [judge for user in users[node] for judge in _judges_at(user, users, moved)]


class Link(NamedTuple):
    """An operation on the way from an output to the loss: its name, its node, whether its other operands are data, and
    the shape of what it gives.
    """

    name: str
    node: Any
    alone: bool
    shape: tuple[int, ...] | None


def way_to_loss(roots: Sequence[Tensor], place: Place | None) -> list[Link]:
    """The operations between an output and what backward is called on, as long as each result is used once."""
    above, start = _above(roots, place)
    at = start, 0 if place is None else place.result
    links: list[Link] = []
    while len(users := above.get(at, [])) == 1 and len(links) < _LONGEST_WAY:
        node = users[0]
        links.append(Link(_name(node), node, _operands(node) == 1, shape_of_result(node)))
        at = node, 0
    return links


def made_by(tensor: Tensor) -> str:
    """The operation that made a tensor, past changes of shape; "" of one without a graph."""
    node = tensor.grad_fn
    while node is not None and _IS_SHAPE.fullmatch(_name(node)) and node.next_functions:
        node = node.next_functions[0][0]
    return "" if node is None else _name(node)


def is_shape(name: str) -> bool:
    """Whether an operation only changes the shape, or chooses."""
    return _IS_VIEW.fullmatch(name) is not None


def between(roots: Sequence[Tensor], place: Place | None) -> list[tuple[str, int]]:
    """Names of the operations that lead from a place to roots, and how many operands with a graph each has."""
    above, start = _above(roots, place)
    return [(_name(node), _operands(node)) for node in _later(start, _by_node(above))]


def sums_before(roots: Sequence[Tensor], place: Place | None, names: set[str]) -> bool:
    """Whether a sum of what stands in a place, and of nothing else, goes into one of these operations."""
    above, start = _above(roots, place)
    users = _by_node(above)
    todo = [(user, False) for user in users[start]]
    seen = set(todo)
    while todo:
        node, summed = todo.pop()
        if summed and _name(node) in names:
            return True
        if not summed and _operands(node) > 1:
            continue
        new = {(user, summed or _name(node) == "SumBackward") for user in users[node]} - seen
        seen |= new
        todo += new
    return False


def _is_mixed(start: Any, users: Users, later: dict[Any, None]) -> bool:
    """Whether something else that has a graph joins all numbers of an output, before what is no linear operation."""
    size = _size(start)
    todo = [(user, False) for user in users[start]]
    seen = set(todo)
    while todo:
        node, joined = todo.pop()
        if joined and _name(node) in _MIXES:
            return True
        others = [used for used, _ in node.next_functions if used not in (None, start) and used not in later]
        new = {(user, joined or (bool(others) and _size(node) >= size > 0)) for user in users[node]} - seen
        seen |= new
        todo += new
    return False


def judged_by(judge: Judge, output: Tensor) -> tuple[Form, Tensor, Tensor] | None:
    """Form of the output, rows that a loss judged, (n, classes) log-probabilities or (n, 1) of the form, and their
    targets. None where the graph is freed, or was changed since.
    """
    node = judge.node
    try:
        rows, targets = node._saved_self.detach(), node._saved_target.detach()
    except (AttributeError, RuntimeError):  # freed, or changed in place
        return None
    if judge.judges != "softmax":
        return BINARY if judge.judges == "sigmoid" else YES, rows.reshape(-1, 1), targets.reshape(-1)
    if rows.dim() > 2:
        rows = rows.movedim(1, -1)
    form = _axis(judge, output, rows.shape[-1])
    ignored = ignored_by(judge)
    targets = targets.reshape(-1)
    return form, rows.reshape(-1, rows.shape[-1]), targets.where(targets != ignored, IGNORED)


def ignored_by(judge: Judge) -> int:
    """The class number that a cross-entropy leaves out."""
    number = int(getattr(judge.node, "_saved_ignore_index", IGNORED))
    return number if number < 2**63 else number - 2**64  # older ones show it unsigned


def _axis(judge: Judge, output: Tensor, classes: int) -> Form:
    last, second = output.shape[-1] == classes, output.dim() > 1 and output.shape[1] == classes
    flat = _name(judge.node) == "NllLossBackward"
    return SECOND if second and not (last and flat != judge.moved) else LAST


def _judged(node: Any, users: Users) -> Judge:
    if _name(node) in _KINDS:
        return _reduced(node, "whole")
    ways = _past_views(node, users) if _name(node) == "LogSoftmaxBackward" else []
    losses = [_reduced(way, "whole" if len(ways) == 1 else "also") for way in ways if _name(way) in _KINDS]
    if len(losses) == 1:
        return losses[0]
    return PARTS if len(losses) == len(ways) and {loss.kind for loss in losses} == {"also"} else UNKNOWN


def _reduced(loss: Any, kind: Literal["whole", "also"]) -> Judge:
    return Judge(kind if int(getattr(loss, "_saved_reduction", 0)) else "each", loss)


def _past_views(node: Any, users: Users) -> list[Any]:
    """What uses a node's results, past changes of shape alone: a choice is another part of them."""
    return [x for user in users[node] for x in (_past_views(user, users) if is_shape(_name(user)) else [user])]


def _above(roots: Sequence[Tensor], place: Place | None) -> tuple[Above, Any]:
    """By node and number of its result what uses it, between roots and a place: later nodes have higher numbers; and
    the node of the place. Empty, and None, where that is not to be seen.
    """
    above: defaultdict[tuple[Any, int], list[Any]] = defaultdict(list)
    todo: list[Any] = [root.grad_fn for root in roots if isinstance(root, Tensor) and root.grad_fn is not None]
    seen, least, found = set(todo), 0 if place is None else place.sequence, None
    while todo and place is not None:
        node = todo.pop()
        for used, number in node.next_functions:
            at = None if used is None else sequence_number(used)
            if at is None or at < least:
                continue
            above[used, number].append(node)
            found = used if at == least else found
            if used not in seen:
                seen.add(used)
                todo += [used] if at > least else []
        if len(seen) > _MOST_NODES:
            return {}, None
    return ({}, None) if found is None else (above, found)


def _by_node(above: Above) -> Users:
    users: Users = defaultdict(list)
    for (node, _), some in above.items():
        users[node] += some
    return users


def _later(start: Any, users: Users) -> dict[Any, None]:
    """All that a node leads to, in order."""
    found, todo = dict.fromkeys(users[start]), [*users[start]]
    while todo:
        new = [user for user in users[todo.pop()] if user not in found]
        found |= dict.fromkeys(new)
        todo += new
    return found


def _size(node: Any) -> int:
    """How many numbers a node gives, 0 where that is not to be seen."""
    shape = shape_of_result(node)
    return 0 if shape is None else math.prod(shape)


def _operands(node: Any) -> int:
    """How many have a graph."""
    return sum(used is not None for used, _ in node.next_functions)


def _name(node: Any) -> str:
    return str(node.name()).rstrip("0123456789") if hasattr(node, "name") else type(node).__name__
