"""Which rules a run has, and who watches for them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol, TypeAlias

from torchprobe.arguments import check_callable
from torchprobe.records import Record
from torchprobe.rules.alert import Alert
from torchprobe.rules.course import ExplodingGradient, GradNormSpike, LossSpike, NothingCaptured, Overconfidence
from torchprobe.rules.diagnoses import DIAGNOSES
from torchprobe.rules.layers import AttentionCollapse, AttentionLogitGrowth, DeadUnits, UpdateRatio, VanishingGradient
from torchprobe.rules.non_finite import NonFinite
from torchprobe.rules.progress import InputBound, Overfitting, Stalled

Watcher: TypeAlias = "Callable[[Record], Iterable[Alert] | Alert | None]"
"""Takes each record of a run in turn, in the drain thread, and returns alerts for the conditions that hold in it: an
empty list when none does, and None when the record does not say. Methods that it may have: `at_rest(step, progress)`,
asked each time that all records have passed; `state_dict()` and `load_state_dict(state)`, for a resumed run."""


class Configuration(Protocol):
    """A rule that may be used in any number of runs: each has a watcher of its own."""

    def watcher(self) -> Watcher:
        """One with the state of a run that has not begun."""


Rule: TypeAlias = "Watcher | Configuration"
"""A user's function of a record is its own watcher; what has a method `watcher` makes one for each run."""

_BUILT_IN: tuple[Configuration, ...] = (
    NonFinite(),
    LossSpike(),
    GradNormSpike(),
    ExplodingGradient(),
    VanishingGradient(),
    AttentionCollapse(),
    AttentionLogitGrowth(),
    DeadUnits(),
    UpdateRatio(),
    Overconfidence(),
    Overfitting(),
    InputBound(),
    Stalled(),
    NothingCaptured(),
    *DIAGNOSES,
)


def checked_rules(rules: Iterable[str | Rule] | None) -> list[Rule]:
    """The rules of an `instrument` call: all of them for None. Raises TypeError or ValueError for what is no rule."""
    if rules is None:
        return list(_BUILT_IN)
    if isinstance(rules, str) or not isinstance(rules, Iterable):
        raise TypeError(f"rules={rules!r}: takes a list of rules, such as ['non_finite', torchprobe.LossSpike()]")
    return [_checked_rule(rule) for rule in rules]


def name_of(rule: Rule) -> str:
    """How messages call a rule, and `stop_on=` knows it: its `name`, or the function's."""
    return str(getattr(rule, "name", None) or getattr(rule, "__name__", type(rule).__name__))


def watcher_of(rule: Any) -> Watcher:
    """Who watches for it in one run. Raises TypeError when its `watcher()` gives what cannot be called."""
    make = getattr(rule, "watcher", None)
    watcher = make() if callable(make) else rule
    if not callable(watcher):
        raise TypeError(f"rules: {name_of(rule)}.watcher() returned {watcher!r}; takes a function of a record")
    return watcher  # type: ignore[no-any-return]


def checked_stops(stop_on: Any, rules: Sequence[Rule]) -> frozenset[str]:
    """The names of the rules that stop the run: all for True. Raises TypeError or ValueError for other than names."""
    names = frozenset(map(name_of, rules))
    if stop_on is None or stop_on is False:
        return frozenset()
    if stop_on is True:
        return names
    if isinstance(stop_on, str) or not isinstance(stop_on, Iterable):
        raise TypeError(f"stop_on={stop_on!r}: takes a set of rule names, such as {{'non_finite'}}, or True for all")
    stops = list(stop_on)
    unknown = [name for name in stops if name not in names]
    if unknown:
        raise ValueError(
            f"stop_on: no rule of this run is called {unknown[0]!r}; takes {', '.join(sorted(names)) or 'none'}"
        )
    return frozenset(stops)


def _checked_rule(rule: Any) -> Rule:
    if isinstance(rule, str):
        built_in = {name_of(known): known for known in _BUILT_IN}
        if rule not in built_in:
            raise ValueError(f"rules: no rule is called {rule!r}; takes {', '.join(built_in)}")
        return built_in[rule]
    if isinstance(rule, type):
        raise TypeError(f"rules: got the class {rule.__name__}; write {rule.__name__}() with the brackets")
    if not callable(rule) and not callable(getattr(rule, "watcher", None)):
        raise TypeError(f"rules: got {rule!r}; takes names, rule objects or functions of a record")
    if not hasattr(rule, "watcher"):
        check_callable("rules", rule, "names, rule objects or functions of a record", "record")
    return rule  # type: ignore[no-any-return]
