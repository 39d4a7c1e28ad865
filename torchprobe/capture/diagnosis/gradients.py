"""Which gradients an optimizer finds: those it holds, those that nobody holds, and what became of them since backward.

Only sampled steps are looked at. Norms are of small parameters alone, which tell as well as large ones whether a
gradient is zero.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple
from weakref import ReferenceType, ref

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from torchprobe.capture.backward import loss_scale
from torchprobe.capture.diagnosis.evidence import Evidence
from torchprobe.capture.diagnosis.modules import ModuleCalls, is_alone
from torchprobe.capture.optimizers import held_by_living
from torchprobe.capture.sharding import local_part
from torchprobe.naming import all_parameters, named_parameters, owner_of
from torchprobe.statistics.dtypes import measurable, row_dtype
from torchprobe.statistics.norms import l2_norms

_FEW = 2**14  # elements of a parameter whose gradient is looked at
_MOST = 64  # such parameters
_FIRST = 8  # backward passes of a step that are looked at
_LARGE = 2**22  # elements of a gradient whose zeros are not counted
_NAMED = 200  # parameters that are named in evidence
_SAMPLE = 1024  # elements that tell whether a parameter has changed


class _Seen(NamedTuple):
    """Gradients at one moment: identity and version of each that is there, norms of the small ones."""

    states: dict[int, tuple[int, int]]
    norms: dict[int, Tensor]


class _Empty(NamedTuple):
    """What an optimizer holds that found no gradient in the open step, and no backward pass before it."""

    first: str
    parameters: set[int]


class GradientFacts:
    """What backward passes of the open step added, and what optimizers find of it when they step."""

    def __init__(self, model: ReferenceType[nn.Module], evidence: Evidence, calls: ModuleCalls) -> None:
        self._model = model
        self._calls = calls
        self._evidence = evidence
        self._before: _Seen | None = None  # of the backward pass that runs
        self._passes: list[tuple[_Seen, _Seen]] = []  # before and after each of the open step
        self._empty: dict[str, _Empty] = {}  # by the optimizer's class
        self._holders: dict[int, tuple[ReferenceType[Optimizer], set[int]]] = {}
        self._searched: frozenset[int] = frozenset()  # parameters for whose holder all objects were looked at
        self._backwards = 0
        self._stepped = False
        self._ran = False  # a training pass, in the open step
        self._half_precision = False  # of an output of the open step

    def open(self) -> None:
        """A step begins."""
        self._passes, self._before, self._ran, self._half_precision = [], None, False, False
        self._empty = {}

    def returned(self, half_precision: bool) -> None:
        """A training pass has returned. half_precision: whether an output is float16."""
        self._ran, self._half_precision = True, self._half_precision or half_precision

    def backward_begins(self) -> None:
        """Before any gradient of a parameter."""
        self._backwards += 1
        if len(self._passes) < _FIRST:
            self._before = self._look()

    def backward_ends(self) -> None:
        """After all of them."""
        before, self._before = self._before, None
        if before is not None:
            self._passes.append((before, self._look()))
            self._comes_late()
        if not self._stepped:
            self._evidence.put("backwards_without_step", self._backwards)

    def before_step(self, optimizer: Optimizer, label: str) -> None:
        """An optimizer is about to use what it finds. label: its class."""
        model = self._model()
        if model is None:
            return
        self._stepped = True
        named = list(named_parameters(model))
        held = {id(p) for group in optimizer.param_groups for p in group["params"]}
        self._holders = {key: one for key, one in self._holders.items() if one[0]() is not None}
        self._holders[id(optimizer)] = ref(optimizer), held
        trained = {name: p for name, p in named if id(p) in held and p.requires_grad}
        mine = [*trained.values()]
        reached = self._since_backward(mine, label)
        self._empty.pop(label, None)
        if mine and not reached and all(p.grad is None for p in mine):
            self._empty[label] = _Empty(next(iter(trained)), {id(p) for p in mine})
        self._unheld(named, optimizer, label)
        self._without_gradient(named, trained, reached)
        self._rate(optimizer, label)
        if self._half_precision and loss_scale(optimizer) is None:
            self._zeros(mine)
        self._passes = []

    # ---- zeroed too late, too early, or never

    def _since_backward(self, mine: list[nn.Parameter], label: str) -> bool:
        """Whether a backward pass of the open step reached any of them."""
        ids = {id(p): p for p in mine}
        changed = [(pair, [key for key in ids if _changed(pair, key)]) for pair in self._passes]
        reaching = [(pair, keys) for pair, keys in changed if keys]
        if not reaching:
            return False
        kept = [_largest([before.norms.get(key) for key in keys]) for (before, _), keys in reaching]
        least: float | Tensor = 0.0
        if all(one is not None for one in kept):
            least = torch.stack([one for one in kept if one is not None]).amin()
        self._evidence.put(f"kept_gradient/{label}", least)
        (_, after), reached = reaching[-1]
        there = [key for key in reached if ids[key].grad is not None]
        if not there:
            self._evidence.put(f"gradient_gone/{label}", 1.0)
            return True
        now = self._look()
        pairs = [(after.norms[key], now.norms[key]) for key in there if key in after.norms and key in now.norms]
        if pairs:
            then, left = (torch.stack(some) for some in zip(*pairs, strict=True))
            gone, alive = (then > 0) & (left == 0), left > 0
            self._evidence.put(f"gradient_gone/{label}", (gone.any() & ~alive.any()).float())
        return True

    def _comes_late(self) -> None:
        """A backward pass follows the step that found nothing: what the one before it gave was zeroed first."""
        for label, empty in self._empty.items():
            if any(_changed(self._passes[-1], key) for key in empty.parameters):
                self._evidence.put(f"gradient_gone/{label}", 1.0)
                self._evidence.put(f"empty_step/{empty.first}", 0.0)

    # ---- held by nobody

    def _unheld(self, named: list[tuple[str, nn.Parameter]], optimizer: Optimizer, label: str) -> None:
        everyones = set().union(*(ids for _, ids in self._holders.values()))
        with_gradient = [(n, p) for n, p in named if p.requires_grad and p.grad is not None and id(p) not in everyones]
        lone = frozenset(id(p) for _, p in with_gradient)
        if not lone:
            return
        if not lone <= self._searched:  # an optimizer may yet have its first step before it
            self._searched = lone - held_by_living()
        for name, p in with_gradient[:_NAMED]:
            if id(p) in self._searched and measurable(p):
                self._evidence.put(f"unheld/{name}", _fingerprint(p))
        ours = {id(p) for _, p in named}
        strangers = [p for group in optimizer.param_groups for p in group["params"] if id(p) not in ours]
        lost = [p for p in strangers if p.requires_grad and p.grad is None]
        if lost and lone & self._searched:
            self._evidence.put(f"strangers/{label}", len(lost))

    def _without_gradient(
        self, named: list[tuple[str, nn.Parameter]], mine: dict[str, nn.Parameter], reached: bool
    ) -> None:
        missing = [name for name, p in mine.items() if p.grad is None]
        if mine and self._ran and is_alone():  # of shards a rank may hold nothing
            none, others = len(missing) == len(mine) and not reached, any(p.grad is not None for _, p in named)
            self._evidence.put(f"empty_step/{next(iter(mine))}", none * (1.0 if others else 2.0))
        if 0 < len(missing) < len(mine):
            owners = {owner_of(name) for name, p in named if p.grad is not None}
            for name in missing[:_NAMED]:
                why = self._calls.why_without_gradient(owner_of(name), owners)
                self._evidence.put(f"no_gradient/{name}", why)

    # ---- rates, half precision

    def _rate(self, optimizer: Optimizer, label: str) -> None:
        rates = [group.get("lr") for group in optimizer.param_groups]
        known = [float(rate) for rate in rates if isinstance(rate, int | float)]
        if known and len(known) == len(rates):
            self._evidence.put(f"rate/{label}", max(known))
        decays = [group.get("weight_decay") for group in optimizer.param_groups]
        self._evidence.put(f"decay/{label}", max((float(d) for d in decays if isinstance(d, int | float)), default=0.0))

    def _zeros(self, mine: list[nn.Parameter]) -> None:
        """The share of elements that are exactly zero, of matrices: of an embedding most are by right."""
        usable = [g for p in mine if p.dim() > 1 and (g := _gradient(p)) is not None and g.numel()]
        shares = [(g == 0).float().mean() for g in usable[:: 1 + len(usable) // _MOST] if g.numel() < _LARGE]
        if shares:
            self._evidence.put("zero_gradients", torch.stack([s.to(shares[0].device) for s in shares]).median())

    def _look(self) -> _Seen:
        there = [p for p in all_parameters(self._model()) if p.grad is not None]
        states = {id(p): (id(p.grad), p.grad._version) for p in there if p.grad is not None}
        small = [p for p in there if p.numel() <= _FEW] or there
        return _Seen(states, dict(_norms(small[:: 1 + len(small) // _MOST])))


def _changed(pair: tuple[_Seen, _Seen], parameter: int) -> bool:
    before, after = pair[0].states, pair[1].states
    return parameter in after and before.get(parameter) != after[parameter]


def _gradient(parameter: nn.Parameter) -> Tensor | None:
    """What this rank has of it, which asks no other one; None where there is none, or no numbers in memory."""
    gradient = parameter.grad
    return None if gradient is None or not measurable(gradient) else local_part(gradient.detach())


def _norms(parameters: list[nn.Parameter]) -> Iterator[tuple[int, Tensor]]:
    usable = [(id(p), gradient) for p in parameters if (gradient := _gradient(p)) is not None]
    for device in {gradient.device for _, gradient in usable}:
        mine = [(key, gradient) for key, gradient in usable if gradient.device == device]
        yield from zip([key for key, _ in mine], l2_norms([g for _, g in mine]).unbind(), strict=True)


def _largest(norms: list[Tensor | None]) -> Tensor | None:
    known = [norm for norm in norms if norm is not None]
    if not known:
        return None
    return torch.stack([norm.to(known[0].device) for norm in known]).amax()


def _fingerprint(parameter: nn.Parameter) -> Tensor:
    kind, own = row_dtype(parameter.device), local_part(parameter.detach())
    flat = own.reshape(-1)[:: 1 + own.numel() // _SAMPLE].to(kind)
    return (flat * torch.linspace(1, 2, len(flat), dtype=kind, device=flat.device)).sum()
