"""How modules are called in a sampled training pass: in which order, on what, and what becomes of their outputs."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import takewhile
from typing import Any, NamedTuple
from weakref import ReferenceType, ref

import torch
from torch import Tensor, nn

from torchprobe.capture.compat import in_backward
from torchprobe.capture.diagnosis.evidence import Evidence
from torchprobe.capture.outputs import given_tensors, main_tensor, tensors_in
from torchprobe.capture.sharding import is_distributed
from torchprobe.capture.source import Pass
from torchprobe.naming import Modules
from torchprobe.probes.base import Reporter
from torchprobe.statistics.dtypes import measurable

NOT_CALLED, BESIDE, NO_GRAD, DETACHED = 1.0, 2.0, 3.0, 4.0
"""Why a parameter that is held has no gradient: its module did not run; its output is not used for the loss, as far as
is known; it ran under `no_grad`; its output was detached."""

_WEIGHTED = (nn.Linear, nn.Bilinear, nn.modules.conv._ConvNd, nn.RNNBase)
_SQUASHING = (nn.Tanh, nn.Sigmoid)
_NORMALISING = (nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm, nn.LocalResponseNorm)
_MANY = 2**18  # elements of an input that are looked at
_MOST_ROWS = 2**22  # of an embedding
_COLUMNS = 4  # of a gradient that are looked at
_OFTEN = 3  # look-ups of a row; where all rows that are used have had as many, others are hardly used at all
_BEYOND = 0.97  # of a tanh; a sigmoid is one of half its input


class _Calls:
    """Of one pass: no tensor is kept, only where they lie."""

    def __init__(self, passing: Pass | None) -> None:
        self.of: ReferenceType[Pass] | None = None if passing is None else ref(passing)
        self.order: dict[str, int] = {}  # the first call of each module
        self.without_graph: set[str] = set()
        self.outputs: dict[int, tuple[str, torch.Size, int]] = {}  # by address: with a graph, the newest last
        self.asked: dict[tuple[int, torch.Size], int] = {}  # up to which call, by elements and beginning of a shape
        self.detached: set[str] = set()  # their output is an input without a graph
        self.perhaps: set[str] = set()  # something of its output's shape is
        self.saturated: dict[str, tuple[int, Tensor]] = {}
        self.kinds: set[str] = set()  # whether a layer with weights, and a recurrent network, was called
        self.padding: list[Tensor] = []  # flags (batch, tokens) of each table that has a row for padding


class ModuleCalls:
    """A watcher of eager modules (`capture.module_hooks`) that own parameters, squash, or normalise."""

    in_validation = False

    def __init__(self, evidence: Evidence, reporter: Reporter | None) -> None:
        self.reporter: Any = reporter
        self._evidence = evidence
        self._now = _Calls(None)
        self._kinds: dict[str, type[nn.Module]] = {}
        self.tables = Tables(evidence)

    def chosen(self, modules: Modules) -> Iterable[tuple[str, nn.Module]]:
        """Modules that own parameters, and those that squash."""
        found = [
            (name, module)
            for name, module in modules
            if isinstance(module, _SQUASHING)
            or (module._parameters and any([p is not None for p in module._parameters.values()]))  # noqa: C419
        ]
        self._kinds = {name: type(module) for name, module in found}
        return found

    def before(
        self, passing: Pass, name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        """A chosen module is called."""
        if in_backward():
            return
        if self._now.of is None or self._now.of() is not passing:
            self._now = _Calls(passing)
        calls = self._now
        calls.order.setdefault(name, len(calls.order))
        for tensor in given_tensors(args, kwargs):
            if not tensor.requires_grad and _has_address(tensor):
                self._cut(tensor)
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            self._normalised(name, module, args)
        if isinstance(module, nn.Embedding) and type(module).forward is nn.Embedding.forward and _are_ids(*args[:1]):
            self.tables.look_up(name, module, args[0])
            if module.padding_idx is not None and args[0].dim() == 2:
                calls.padding.append(args[0] == module.padding_idx)
        if isinstance(module, nn.RNNBase | nn.RNNCellBase):
            calls.kinds.add("recurrent")
        if "weighted" not in calls.kinds and isinstance(module, (*_WEIGHTED, *_NORMALISING)):
            calls.kinds.add("weighted")
            weight = next(module.parameters(recurse=False), None)
            if isinstance(module, _WEIGHTED) and args and weight is not None and weight.requires_grad:
                self._first_input(args[0])

    def after(self, passing: Pass, name: str, output: Any) -> None:
        """It has returned."""
        tensor = main_tensor(output)
        if tensor is None or in_backward() or not _has_address(tensor):
            return
        calls = self._now
        if tensor.requires_grad:
            calls.outputs.pop(tensor.data_ptr(), None)
            calls.outputs[tensor.data_ptr()] = name, tensor.shape, len(calls.order)
        else:
            calls.without_graph.add(name)
        kind = self._kinds.get(name, nn.Module)
        if issubclass(kind, _SQUASHING):
            away = tensor if issubclass(kind, nn.Tanh) else 2 * tensor - 1
            calls.saturated[name] = tensor.data_ptr(), (away.abs() > _BEYOND).float().mean()

    def unseen(self, reason: str) -> None:
        """Inside a graph nothing is seen, and nothing is said."""

    def returned(self, output: Any) -> None:
        """The pass is over. What is the model's own output is no hidden layer."""
        ends = {t.data_ptr() for t in tensors_in(output) if _has_address(t)}
        for name, (address, share) in self._now.saturated.items():
            if address not in ends:
                self._evidence.put(f"saturated/{name}", share)
        flags, self._now.padding = self._now.padding, []
        if flags and len({one.shape for one in flags}) == 1 and "recurrent" not in self._now.kinds:
            self._padded(flags)

    def _padded(self, flags: list[Tensor]) -> None:
        """Which share of the tokens is padding, and which one tokens that are none meet; 0 unless all tables agree."""
        shares = torch.stack([one.float() for one in flags]).mean(2)
        agree = torch.stack([(one == flags[0]).all() & _is_at_ends(one) for one in flags]).all()
        real = 1 - shares[0]
        self._evidence.put("padding", shares[0].mean() * agree)
        self._evidence.put("padding_met", (real * shares[0]).sum() / real.sum() * agree)
        self._evidence.put("padding_tokens", flags[0].shape[1])

    def why_without_gradient(self, module: str, with_gradient: Iterable[str]) -> float:
        """Of the last pass: why a module's parameters have no gradient while those of others have. 0: not known."""
        calls = self._now
        if not calls.order:
            return 0.0
        at = calls.order.get(module)
        if at is None:
            return NOT_CALLED
        if module in calls.without_graph:
            return NO_GRAD
        first = min((calls.order[name] for name in with_gradient if name in calls.order), default=None)
        before_all = first is not None and at < first
        return DETACHED if module in calls.detached or (before_all and module in calls.perhaps) else BESIDE

    def _cut(self, given: Tensor) -> None:
        """A module is called with a tensor that has no graph: which outputs it may come from."""
        calls = self._now
        source = calls.outputs.get(given.data_ptr())
        if source is not None and source[1].numel() == given.numel():
            calls.detached.add(source[0])
        elif source is None:
            size, start = given.numel(), given.shape[:2]
            since, calls.asked[size, start] = calls.asked.get((size, start), 0), len(calls.order)
            new = takewhile(lambda output: output[2] >= since, reversed(calls.outputs.values()))
            calls.perhaps.update(n for n, shape, _ in new if shape.numel() == size or shape[:2] == start)

    def _first_input(self, given: Any) -> None:
        if not isinstance(given, Tensor) or not _has_address(given) or given.dim() < 2:
            return
        sample = given.detach().reshape(-1)[:: 1 + given.numel() // _MANY].float()
        self._evidence.put("input_scale", sample.std(correction=0).maximum(sample.mean().abs()))

    def _normalised(self, name: str, module: nn.Module, args: tuple[Any, ...]) -> None:
        if module.training and args and isinstance(args[0], Tensor) and _has_address(args[0]) and args[0].dim() > 1:
            self._evidence.put(f"norm_values/{name}", args[0].numel() / max(1, args[0].shape[1]))


def _has_address(tensor: Tensor) -> bool:
    """Whether it is numbers in memory, which a sparse or a nested tensor is not, nor one of which others have parts."""
    return measurable(tensor) and tensor.is_floating_point() and tensor.numel() > 0 and not is_distributed(tensor)


def is_alone() -> bool:
    """Whether no other process trains with this one."""
    return not (torch.distributed.is_available() and torch.distributed.is_initialized())


def _are_ids(given: Any = None) -> bool:
    """Whether they are whole numbers in memory: no shard, and nothing that has a shape alone."""
    plain = type(given) is Tensor and given.layout == torch.strided and given.device.type != "meta" and given.dim() > 0
    return plain and given.numel() > 0 and given.dtype in (torch.int64, torch.int32)


def _is_at_ends(flags: Tensor) -> Tensor:
    """Whether flags are at the ends of rows alone: what is not flagged is one run."""
    inside = ~flags
    return (inside[:, :1].sum(1) + (inside[:, 1:] & flags[:, :-1]).sum(1) <= 1).all()


class _Table(NamedTuple):
    """An embedding in the run so far, of samples."""

    module: ReferenceType[nn.Embedding]
    counts: Tensor  # look-ups of each row
    told: Tensor  # whether its ids are no positions
    lookups: list[int]


class Tables:
    """Which rows of embeddings are looked up or get gradients in sampled steps of one process."""

    def __init__(self, evidence: Evidence) -> None:
        self._evidence = evidence
        self._tables: dict[str, _Table] = {}

    def look_up(self, name: str, module: nn.Embedding, ids: Tensor) -> None:
        """A table is called."""
        table = self._tables.get(name)
        if table is None or table.module() is not module or table.counts.device != ids.device:
            if not module.weight.requires_grad or not 0 < module.num_embeddings <= _MOST_ROWS:
                return
            counts = torch.zeros(module.num_embeddings, dtype=torch.int32, device=ids.device)
            table = self._tables[name] = _Table(ref(module), counts, counts.new_zeros((), dtype=torch.bool), [0])
        flat = ids.reshape(-1)
        table.counts.index_add_(0, flat, torch.ones_like(flat, dtype=torch.int32))
        table.lookups[0] += ids.numel()
        table.told.logical_or_(_are_no_places(ids, module.padding_idx))

    def before_step(self) -> None:
        """Gradients are there. Rows that are used elsewhere, as by an output that shares them, have one too."""
        for name, (weak, counts, told, lookups) in self._tables.items() if is_alone() else ():  # others look up others
            module = weak()
            gradient = None if module is None else module.weight.grad
            if module is None or type(gradient) is not Tensor or gradient.device != counts.device:
                continue
            if gradient.layout == torch.strided:
                elsewhere = (gradient[:, :_COLUMNS] != 0).any(1) & (counts == 0)
                counts.masked_fill_(elsewhere, _OFTEN)
            if module.padding_idx is not None:
                counts[module.padding_idx : module.padding_idx + 1] = _OFTEN
            self._evidence.put(f"rows_unused/{name}", (counts == 0).sum() * told)
            self._evidence.put(f"rows_rare/{name}", ((counts > 0) & (counts < _OFTEN)).sum())
            self._evidence.put(f"rows/{name}", len(counts))
            self._evidence.put(f"lookups/{name}", lookups[0])


def _are_no_places(ids: Tensor, padding: int | None) -> Tensor:
    """Whether neighbours differ by more than 1 anywhere, as positions and distances do not."""
    far = (ids[..., 1:] - ids[..., :-1]).abs() > 1
    return (far if padding is None else far & (ids[..., 1:] != padding) & (ids[..., :-1] != padding)).any()
