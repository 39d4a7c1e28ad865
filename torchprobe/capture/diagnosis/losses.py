"""What lies between the model's output and the loss: operations that do not belong there, and targets by the gradient.

The graph says which operations these are, exactly; nothing is guessed from names or shapes alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from torchprobe.capture.backward import roots
from torchprobe.capture.compat import no_torch_function
from torchprobe.capture.compiled.operators import listen
from torchprobe.capture.diagnosis.evidence import Evidence
from torchprobe.capture.gate import Gate, no_autocast
from torchprobe.capture.outputs import tensors_in
from torchprobe.capture.predictions.forms import is_usable
from torchprobe.capture.predictions.graph import Link, Place, is_shape, made_by, place_of, way_to_loss
from torchprobe.capture.predictions.targets import labels_in
from torchprobe.capture.sharding import is_distributed
from torchprobe.statistics.dtypes import row_dtype
from torchprobe.statistics.scoring import class_counts, entropy, judged, same_class

_MOST_OUTPUTS = 4
_MOST_NUMBERS = 2**22  # of logits that are read
_MOST_ROWS = 4096
_EXAMPLES = 64  # that are compared
_MOST_FEATURES = 2**20  # of all examples
_FEWEST = 16  # examples for a correlation
_MOST_CLASSES = 2**17
_OFTEN = 3  # targets of a class; where all classes that occur have as many, others hardly occur at all
_REGRESSIONS = frozenset({"MseLossBackward", "SmoothL1LossBackward", "HuberLossBackward"})
_ABSOLUTE = ["SubBackward", "AbsBackward"]  # what `l1_loss` is made of
_NLL = frozenset({"NllLossBackward", "NllLoss2DBackward"})
_BINARY = "BinaryCrossEntropyWithLogitsBackward"
_RAW = frozenset({"SoftmaxBackward", "AddmmBackward", "MmBackward", "ConvolutionBackward", "ReluBackward"})


class _Output(NamedTuple):
    """An output of a pass: where it stands, what made it, its values, and the inputs of two dimensions."""

    place: Place | None
    maker: str
    values: Tensor
    version: int
    inputs: tuple[Tensor, ...]
    evaluates: bool  # the pass ran in evaluation mode, which makes a difference
    softmax_over: int | None


class OutputFacts:
    """Follows the outputs of sampled training passes until a gradient reaches them."""

    def __init__(self, evidence: Evidence, gate: Gate) -> None:
        self._evidence = evidence
        self._gate = gate
        self._counts: Tensor | None = None  # of the targets of the run so far, by class
        self._sums: Tensor | None = None  # of features and targets of the run so far

    def on_output(
        self, module: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any], output: Any, evaluates: bool
    ) -> None:
        """A pass has returned."""
        there = [x for x in tensors_in([*args, *kwargs.values()]) if not (x.is_complex() or is_distributed(x))]
        labels = labels_in(module, args, kwargs)  # for the loss inside: no input that may tell the targets
        flat = [x for x in there if x.dim() == 2 and x.layout is torch.strided]
        given = [x.detach() for x in flat if not (labels and x is labels.values)]
        self._varies([x.detach() for x in there if x.dim() > 0])
        some = [x for x in tensors_in(output) if x.grad_fn is not None and x.dim() > 0 and is_usable(x)]
        for tensor in some[:_MOST_OUTPUTS]:
            values = tensor.detach()
            inputs, over = tuple(given[:_MOST_OUTPUTS]), _softmax_over(tensor.grad_fn)
            one = _Output(place_of(tensor), made_by(tensor), values, values._version, inputs, evaluates, over)
            listen(tensor, partial(self._on_gradient, one))

    def _varies(self, given: Sequence[Tensor]) -> None:
        """By how much at most the examples differ, in any tensor that the model is called with; and a sum of them."""
        some = [x[:_EXAMPLES].float() for x in given if x.shape[0] > 3 and x.numel() and x.layout is torch.strided]
        if any(x.dim() > 1 for x in some):
            spread = [(x.amax(0) - x.amin(0)).amax() for x in some if x.dim() > 1]
            self._evidence.put("input_varies", torch.stack([one.to(spread[0].device) for one in spread]).amax())
            sums = [_sum(x) for x in some]
            self._evidence.put("input_sum", torch.stack([one.to(sums[0].device) for one in sums]).sum())

    def _on_gradient(self, output: _Output, gradient: Tensor) -> None:
        if self._gate.failed:
            return
        with self._gate.boundary(), torch.no_grad(), no_autocast(gradient.device), no_torch_function():
            self._evidence.put("evaluates", output.evaluates)
            links = way_to_loss(roots().tensors, output.place)
            way = [link for link in links if not is_shape(link.name)]
            if way and output.values._version == output.version:
                self._misplaced([output.maker, *(link.name for link in way[:4])])
                self._over_the_batch(output, links)
                self._broadcast(output, links)
                self._rectified(output, way[0], gradient)
                self._targets(output, links, way, gradient)
                if way[0].name == _BINARY and output.values.numel() == len(output.values):
                    self._leaks(output, (gradient < 0).reshape(-1), (gradient != 0).reshape(-1))

    def _misplaced(self, names: Sequence[str]) -> None:
        pairs = set(pairwise(names))
        put = self._evidence.put
        put("double_softmax", float(("SoftmaxBackward", "LogSoftmaxBackward") in pairs))
        put("sigmoid_before_softmax", float(("SigmoidBackward", "LogSoftmaxBackward") in pairs))
        put("double_sigmoid", float(("SigmoidBackward", _BINARY) in pairs))
        put("nll_without_log", float(any(a in _RAW and b in _NLL for a, b in pairs)))

    def _over_the_batch(self, output: _Output, links: Sequence[Link]) -> None:
        """A log-softmax over the examples of a batch, (N, C), in place of the classes; of (N, N) it pairs them."""
        pairs = zip([output.softmax_over, *(_softmax_over(link.node) for link in links)], links, strict=False)
        ill = any(over == 0 and judge.name == "NllLossBackward" for over, judge in pairs)
        if ill and output.values.dim() == 2 and output.values.shape[0] != output.values.shape[1]:
            self._evidence.put("nll_without_log", 1.0)

    def _broadcast(self, output: _Output, links: Sequence[Link]) -> None:
        count = output.values.numel()
        if count < 2 or output.values.dim() > 2 or max(output.values.shape) != count:
            return
        names = [link.name for link in links]
        for at, link in enumerate(links, 1):
            if link.name == "UnsqueezeBackward":  # written down, so meant
                return
            judged_next = {*names[at : at + 1]} & _REGRESSIONS or names[at : at + 2] == _ABSOLUTE
            is_loss = link.name == "ExpandBackward" and judged_next
            if link.shape == (count, count) and (is_loss or (link.name == "SubBackward" and link.alone)):
                self._evidence.put("broadcast", count)
                return
            if not is_shape(link.name):
                break
        self._evidence.put("broadcast", 0.0)

    def _rectified(self, output: _Output, first: Link, gradient: Tensor) -> None:
        judges = first.name in (*_REGRESSIONS, "LogSoftmaxBackward", _BINARY)
        if output.maker == "ReluBackward" and (judges or (first.name == "SubBackward" and first.alone)):
            self._evidence.put("rectified", ((output.values == 0) & (gradient > 0)).float().mean())

    # ---- classes

    def _targets(self, output: _Output, links: Sequence[Link], way: Sequence[Link], gradient: Tensor) -> None:
        axis = _class_axis(output, links, way)
        if axis is None or output.values.shape[axis] > _MOST_CLASSES:
            return
        classes = output.values.shape[axis]
        logits, gradients = (x.movedim(axis, -1).reshape(-1, classes) for x in (output.values, gradient))
        stride = 1 + max(logits.shape[0] // _MOST_ROWS, logits.numel() // _MOST_NUMBERS)
        targets, counted, nll = judged(logits[::stride], gradients[::stride])
        put = self._evidence.put
        put("cross_entropy", (nll * counted).sum() / counted.sum())
        put("counted", counted.float().mean())  # a row that is right beyond doubt has no gradient either
        put("classes", classes)
        put("scaled", output.maker in ("MulBackward", "DivBackward"))
        put("softmax_rows", _are_distributions(logits[::stride]))
        self._spread(class_counts(targets, counted, classes))
        if stride == 1 and axis == -1:
            self._copied(output, targets, counted)

    def _spread(self, counts: Tensor) -> None:
        total = self._counts
        self._counts = total = counts if total is None or total.shape != counts.shape else total + counts
        put = self._evidence.put
        put("target_entropy", entropy(total))
        put("targets", total.sum())
        put("classes_unseen", (total == 0).sum())
        put("classes_rare", ((total > 0) & (total < _OFTEN)).sum())
        put("same_class", same_class(counts))
        put("same_class_in_all", same_class(total))
        put("batch", counts.sum())

    def _copied(self, output: _Output, targets: Tensor, counted: Tensor) -> None:
        """Whether targets are the inputs of their own position, or of the next one, or a feature but for its scale."""
        where = output.values.shape[:-1]
        self._leaks(output, targets, counted)
        for numbers in output.inputs:
            if not numbers.is_floating_point() and numbers.shape == where and len(where) == 2 and where[1] > 1:
                self._evidence.put("tokens", where[1])
                same = (numbers.reshape(-1) == targets) & counted
                self._evidence.put("targets_are_inputs", same.sum() / counted.sum())
                ours, theirs, both = targets.view(where)[:, :-1], numbers[:, 1:], counted.view(where)[:, :-1]
                self._evidence.put("targets_are_next", ((ours == theirs) & both).sum() / both.sum())
                return

    def _leaks(self, output: _Output, targets: Tensor, counted: Tensor) -> None:
        """How well a feature tells the class numbers, over all samples: few rare ones may agree by chance."""
        for numbers in output.inputs:
            if numbers.is_floating_point() and len(numbers) == len(targets) and numbers.numel() <= _MOST_FEATURES:
                sums, total = _products(numbers, targets, counted), self._sums
                self._sums = sums if total is None or total.shape != sums.shape else sums + total
                self._evidence.put("feature_tells_target", _closest(self._sums))
                return


def _class_axis(output: _Output, links: Sequence[Link], way: Sequence[Link]) -> int | None:
    """Where the classes of a cross-entropy lie that judges the output as a whole, or its log-probabilities."""
    names = [link.name for link in way]
    at = names.index("LogSoftmaxBackward") + 1 if names[0] == "LogSoftmaxBackward" else 0
    if output.values.dim() < 2 or at >= len(way) or names[at] not in _NLL:
        return None
    if at == 0 and output.maker != "LogSoftmaxBackward":
        return None
    if not int(getattr(way[at].node, "_saved_reduction", 0)):  # weighed afterwards, as a policy's
        return None
    moved = any(link.name in ("TransposeBackward", "PermuteBackward") for link in links)
    return 1 if names[at] == "NllLoss2DBackward" and output.values.dim() > 2 and not moved else -1


def _softmax_over(node: Any) -> int | None:
    """The dimension of a log-softmax; None of any other operation."""
    return getattr(node, "_saved_dim", None) if type(node).__name__.startswith("LogSoftmaxBackward") else None


def _sum(x: Tensor) -> Tensor:
    """Of all elements, each with a weight of its own: the same for the same batch in the same order."""
    rows = x.reshape(len(x), -1)
    across, down = (torch.linspace(1, 2, n, dtype=x.dtype, device=x.device) for n in reversed(rows.shape))
    return down @ (rows @ across)


def _are_distributions(rows: Tensor) -> Tensor:
    """Whether the rows that a loss took for logits add up to 1 and have no negative element."""
    wide = rows.to(torch.promote_types(rows.dtype, torch.float32))
    return (((wide.sum(-1) - 1).abs() < 1e-3) & (wide.amin(-1) >= 0)).all().float()


def _products(features: Tensor, targets: Tensor, counted: Tensor) -> Tensor:
    """Sums over the examples that count, (6, features): of 1, x, y, x x, y y and x y."""
    x, y, weight = (one.to(row_dtype(one.device)) for one in (features, targets, counted))
    parts = (torch.ones_like(x), x, y[:, None].expand_as(x), x * x, (y * y)[:, None].expand_as(x), x * y[:, None])
    return torch.stack([weight @ part for part in parts])


def _closest(sums: Tensor) -> Tensor:
    """The largest correlation, by magnitude, of a feature with the class numbers; 0 of too few examples."""
    n, x, y, xx, yy, xy = sums
    sizes, least = ((xx - x * x / n).clamp(min=0) * (yy - y * y / n).clamp(min=0)).sqrt(), 1e-9 * (xx * yy).sqrt()
    known = torch.where(sizes > least, (xy - x * y / n).abs() / sizes, 0.0)
    return torch.where(n[0] >= _FEWEST, known.amax(), 0.0)
