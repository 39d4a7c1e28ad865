"""Which modules and parameters to watch, by name."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase

from torch import nn

from torchprobe.capture.modules import PARAMETRIZATIONS, interesting
from torchprobe.capture.sharding import Named
from torchprobe.naming import named_modules, named_parameters, owner_of, with_parents
from torchprobe.probes.base import Probe
from torchprobe.probes.checks import OF_MODULES, OF_PARAMETERS

Patterns = str | Sequence[str] | None


class Selection:
    """Module-name patterns with `*` and `?`, as in file names: `blocks.*.attention`.

    include: the modules to watch; without it, leaves that have parameters and attention and normalisation
    blocks. exclude: modules to leave out, with everything inside them. Parameters follow their module.
    The model itself is `root`, which stands for the model's own output and parameters, not for its parts.
    Raises TypeError for anything but strings, ValueError for a pattern that fits no module and for an
    empty include.
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
    if value is None:
        return ()
    patterns = tuple(value) if isinstance(value, Iterable) and not isinstance(value, str) else (value,)
    if argument == "include" and not patterns:
        raise ValueError(
            "include is empty: takes at least one pattern, such as 'blocks.*'; leave it out for the default"
        )
    for pattern in patterns:
        if not isinstance(pattern, str):
            raise TypeError(f"{argument}: got {pattern!r}; takes module-name patterns, such as 'blocks.*'")
    return patterns
