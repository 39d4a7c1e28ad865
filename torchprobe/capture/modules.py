"""Which modules and parameters are watched; and outputs of modules, by one shared hook that is put on them and off."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

from torchprobe.arguments import checked_patterns
from torchprobe.buffer.step import Piece
from torchprobe.capture.compat import skip_frames
from torchprobe.capture.module_hooks import SharedHook, mark, unmark
from torchprobe.capture.sharding import Named, is_flat_sharded
from torchprobe.capture.sites import SITE, Kept, Memo, Site, Tap, observe_output
from torchprobe.capture.source import Running
from torchprobe.naming import Modules, all_modules, named_modules, named_parameters, owner_of, unwrapped, with_parents
from torchprobe.probes.base import Probe, Reporter
from torchprobe.probes.checks import OF_MODULES, OF_PARAMETERS
from torchprobe.statistics.dtypes import address, moved

PARAMETRIZATIONS = "parametrizations"  # where torch keeps what makes a weight of other parameters; no layers of a model
# A hook below one of these turns off its fused inference path, which changes padded outputs.
_FAST_IN_EVAL = (nn.TransformerEncoder, nn.TransformerEncoderLayer, nn.MultiheadAttention)
Patterns = str | Sequence[str] | None
_HOOK = SharedHook(observe_output)


# ---- which can be watched


def checked_model(model: Any, sessions: Iterable[nn.Module]) -> nn.Module:
    """The model itself, without its wrappers. sessions: the models that have one.

    Raises TypeError for what is no module that can be watched, ValueError for one that is watched already.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model={model!r}: takes a torch.nn.Module, not {type(model).__name__}")
    if isinstance(model, torch.jit.ScriptModule):
        raise TypeError("model is a ScriptModule, which runs no Python hooks; instrument the module it was made from")
    _check_wrappers(model)
    root, watched = unwrapped(model), {id(other) for other in sessions}
    if id(root) in watched:
        raise ValueError(
            "model is already instrumented: torchprobe.session_of(model) returns its session; "
            "call session.detach() before instrumenting it again"
        )
    for name, module in named_modules(root):
        if id(module) in watched or module.__dict__.get(SITE) is not None:
            raise ValueError(f"model shares its module {name!r} with an instrumented model; detach that session first")
    return root


def _check_wrappers(model: nn.Module) -> None:
    """Raise TypeError for DataParallel, ValueError for FullyShardedDataParallel without its `use_orig_params`."""
    for _, module in all_modules(model):
        if isinstance(module, nn.DataParallel):
            raise TypeError(
                "model: got a DataParallel, which copies the model at every call, so that hooks see pieces of a batch "
                "in several threads; takes DistributedDataParallel, one process a device, or the bare model"
            )
        if is_flat_sharded(module) and not getattr(module, "_use_orig_params", True):
            raise ValueError(
                "model: got a FullyShardedDataParallel with use_orig_params=False, whose flat parameters have lost "
                "their names; takes one with use_orig_params=True, or fully_shard(model)"
            )


def hookable(modules: Modules) -> Iterator[tuple[str, nn.Module, bool]]:
    """The same; and whether in evaluation a hook, too, leaves what the model computes as it is."""
    fast: set[nn.Module] = set()
    for name, module in modules:
        if module in fast or isinstance(module, _FAST_IN_EVAL):
            fast.update(module.modules())
        yield name, module, module not in fast


def interesting(module: nn.Module) -> bool:
    """The default choice: what has parameters, parametrized or not, and no part with others; attention; norms."""
    kind = type(module).__name__.lower()
    if "attention" in kind or "attn" in kind or "norm" in kind:
        return True
    parts, own = module._modules, module._parameters
    if PARAMETRIZATIONS not in parts and not (own and any([one is not None for one in own.values()])):  # noqa: C419
        return False
    inner = [part for name, part in parts.items() if name != PARAMETRIZATIONS and part is not None] if parts else ()
    held = {address(p) for p in own.values() if p is not None} if inner else set()
    return all([address(p) in held for part in inner for p in part.parameters()])  # noqa: C419 - costs a call


# ---- which are, by name


class Selection:
    """Module-name patterns with `*` and `?`, as in file names: `blocks.*.attention`.

    include: the modules to watch; without it, what has parameters and no part with others, attention and normalisation.
    exclude: modules to leave out, with everything inside them. Parameters follow their module. The model itself is
    `root`, which stands for the model's own output and parameters, not for its parts. Raises TypeError for anything but
    strings, ValueError for a pattern that fits no module and for an empty include.
    """

    def __init__(self, model: nn.Module, include: Patterns, exclude: Patterns) -> None:
        self._include = _patterns("include", include)
        self._exclude = _patterns("exclude", exclude)
        self._parameters: dict[str, bool] = {}
        for argument, patterns in (("include", self._include), ("exclude", self._exclude)):
            names = [name for name, _ in named_modules(model)] if patterns else []
            for pattern in patterns:
                if not any(fnmatchcase(name, pattern) for name in names):
                    raise ValueError(
                        f"{argument}={pattern!r} fits no module; takes names of modules, such as "
                        f"{', '.join(map(repr, names[1:4])) or repr(names[0])}, where * stands for anything"
                    )

    def wants_module(self, name: str, module: nn.Module, probe: Probe | None) -> bool:
        """Whether a probe captures a module's outputs; None: one without `select=`. Raises what a predicate raises."""
        if self._excluded(name):
            return False
        if probe is not None and probe.select is not None:
            return self.covers(name) and probe.selects(name, module)
        if self._include:
            return self._included(name)
        return interesting(module) and PARAMETRIZATIONS not in name.split(".")

    def parameters(self, named: Sequence[Named], probe: Probe) -> list[Named]:
        """Those that are captured for a probe: with their module, or with a module around it."""
        known = self._parameters
        for one in named:
            if one.name not in known:
                known[one.name] = self.covers(owner_of(one.name))
        left = [one for one in named if known[one.name]]
        return left if probe.select is None else [one for one in left if probe.selects(one.name, one.parameter)]

    def check(self, model: nn.Module, probes: Iterable[Probe]) -> None:
        """Raise ValueError for a pattern in a probe's `select=` that fits nothing of what is left."""
        for probe in [probe for probe in probes if isinstance(probe.select, tuple)]:
            sources, modules, parameters = {*probe.sources}, named_modules(model), named_parameters(model)
            names = [] if sources <= {*OF_PARAMETERS} else [n for n, _ in modules if self.covers(n)]
            below = [] if sources <= {*OF_MODULES} else [n for n, _ in parameters if self.covers(owner_of(n))]
            fitted = {*names, *(part for name in below for part in with_parents(name))}
            for pattern in probe.select if isinstance(probe.select, tuple) else ():
                if not any(fnmatchcase(name, pattern) for name in fitted):
                    known = ", ".join(map(repr, (names or below)[:3]))
                    raise ValueError(
                        f"select={pattern!r} of {probe.name} fits nothing that include= and exclude= leave; takes "
                        f"names such as {known}, where * stands for anything"
                    )

    def covers(self, owner: str) -> bool:
        """Whether a module is left by include= and exclude=, by itself or with a module around it."""
        return not self._excluded(owner) and (not self._include or any(map(self._included, with_parents(owner))))

    def _included(self, name: str) -> bool:
        return any(fnmatchcase(name, pattern) for pattern in self._include)

    def _excluded(self, name: str) -> bool:
        return bool(self._exclude) and any(
            fnmatchcase(part, pattern) for part in with_parents(name) for pattern in self._exclude
        )


def _patterns(argument: str, value: Patterns) -> tuple[str, ...]:
    patterns = () if value is None else checked_patterns(argument, value, "blocks.*")
    if argument == "include" and value is not None and not patterns:
        raise ValueError(
            "include is empty: takes at least one pattern, such as 'blocks.*'; leave it out for the default"
        )
    return patterns


# ---- their outputs


class OutputSource:
    """Outputs of modules and their gradients: hooks that are on for sampled passes, off for all others.

    Where a hook found itself being traced by `torch.compile` (`running.compiled`), hooks stay on, since a compiled
    graph never sees a later one, and only flags change.
    """

    names = ("outputs", "output_gradients")

    def __init__(
        self, reporters: Sequence[Reporter], wanted: Callable[[str, nn.Module, Probe | None], bool], running: Running
    ) -> None:
        self._reporters = [reporter for reporter in reporters if reporter.source in self.names]
        self._wanted = wanted
        self._running = running
        self._sites: dict[int, Site] = {}  # by identity of the module: some define ==
        self._hooked: list[Site] = []
        self._armed: tuple[bool, list[tuple[str, int, int]]] | None = None
        self._memo = Memo()
        skip_frames(observe_output)

    def wants(self, due: frozenset[Reporter]) -> bool:
        """Whether a probe of outputs is among those due."""
        return not due.isdisjoint(self._reporters)

    def watched(self) -> Iterator[tuple[Reporter, str]]:
        """Whose outputs, and their gradients, are captured, by module."""
        for site in self._sites.values():
            for tap in (*site.outputs, *site.gradients):
                yield tap.reporter, tap.name

    def arm(self, training: bool, modules: Modules) -> None:
        """Put hooks on the modules of the coming pass: all of them, or those that evaluation allows."""
        if not modules or not self._reporters or self._armed == (training, _hooks_on(modules)):
            return
        if self._running.compiled and self._hooked:
            return
        self._remove()
        known, self._sites = self._sites, {}
        for name, module, in_eval in hookable(modules):
            site = known.get(id(module))
            if site is None or site.name != name or site.module() is not module:  # it may have been put elsewhere
                site = self._site(name, module, in_eval)
            if site is not None:
                self._sites[id(module)] = site
                if training or in_eval:
                    mark(module, SITE, site)
                    _HOOK.put_after(module)
                    self._hooked.append(site)
        self._armed = training, _hooks_on(modules)

    def disarm(self) -> None:
        """Take the hooks off, unless a compiled graph holds them."""
        if not self._running.compiled:
            self._remove()

    def detach(self) -> None:
        """Take everything off: hooks and the sites' state."""
        self._remove()
        self._sites.clear()

    def merge(self, a: Kept, b: Kept) -> Kept:
        """Rows of both, tap by tap."""
        for tap, rows in b.items():
            with tap.reporter.gate:
                a[tap] = tap.shortened([*a[tap], *rows]) if tap in a else rows
        return a

    def rows(
        self, kept: Kept, training: bool, due: frozenset[Reporter], scale: float | Tensor | None = None
    ) -> list[Piece]:
        """The merged rows for the probes due. scale: what the gradients of outputs were multiplied with."""
        groups: defaultdict[tuple[Reporter, torch.device], list[tuple[str, Tensor, int]]] = defaultdict(list)
        for tap, rows in kept.items():
            if tap.reporter in due and not tap.reporter.gate.failed:
                with tap.reporter.gate.boundary(), torch.no_grad():
                    row, calls = tap.merged(rows)
                    groups[tap.reporter, row.device].append((tap.name, row, calls))
        prefix = "" if training else "val/"
        pieces = []
        for (reporter, _), named_rows in groups.items():
            with reporter.gate:
                pieces.append(_piece(reporter, named_rows, prefix, scale))
        return pieces

    def _selects(self, reporter: Reporter, name: str, module: nn.Module) -> bool:
        """Whether a probe with a choice of its own watches a module; a predicate that raises switches it off."""
        with reporter.gate.boundary():
            return self._wanted(name, module, reporter.probe)
        return False  # the boundary took an exception

    def _site(self, name: str, module: nn.Module, lasting: bool) -> Site | None:
        usual, mine = self._wanted(name, module, None), [r for r in self._reporters if not r.gate.failed]
        mine = [r for r in mine if (usual if r.probe.select is None else self._selects(r, name, module))]
        if not mine:
            return None
        taps = [tuple(Tap(name, r, self, self._running, self._memo) for r in mine if r.source == s) for s in self.names]
        return Site(name, module, self._running, lasting, *taps)

    def _remove(self) -> None:
        while self._hooked:
            module = self._hooked.pop().module()
            if module is not None:
                _HOOK.take_off(module)
                unmark(module, SITE)
        self._armed = None


def _hooks_on(modules: Modules) -> list[tuple[str, int, int]]:
    """Changes when a model grows, or gets a hook after ours that may change the output, as tensor parallelism adds."""
    return [(name, id(module), len(module._forward_hooks)) for name, module in modules]


def _piece(
    reporter: Reporter, named_rows: Sequence[tuple[str, Tensor, int]], prefix: str, scale: float | Tensor | None
) -> Piece:
    names, rows, calls = zip(*named_rows, strict=True)
    stacked = torch.stack(rows)
    counts = moved(torch.tensor(calls, dtype=stacked.dtype, device="cpu"), stacked.device)
    stacked = torch.cat((stacked, counts[:, None]), dim=1)
    piece = Piece(reporter, names, stacked, prefix, counted=True)
    return piece if scale is None else piece.unscaled(scale)
