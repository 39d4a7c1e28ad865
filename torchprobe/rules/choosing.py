"""Which rules a run has."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeAlias

from torchprobe.records import Record
from torchprobe.rules.alert import Alert
from torchprobe.rules.attention_collapse import AttentionCollapse
from torchprobe.rules.attention_logit_growth import AttentionLogitGrowth
from torchprobe.rules.dead_units import DeadUnits
from torchprobe.rules.exploding_gradient import ExplodingGradient
from torchprobe.rules.grad_norm_spike import GradNormSpike
from torchprobe.rules.loss_spike import LossSpike
from torchprobe.rules.non_finite import NonFinite
from torchprobe.rules.nothing_captured import NothingCaptured
from torchprobe.rules.overconfidence import Overconfidence
from torchprobe.rules.stalled import Stalled
from torchprobe.rules.update_ratio import UpdateRatio
from torchprobe.rules.vanishing_gradient import VanishingGradient

Rule: TypeAlias = "Callable[[Record], Iterable[Alert] | Alert | None]"
"""Takes each record in turn, in the drain thread, and returns alerts for the conditions that hold in it: an empty
list when none does, and None when the record does not hold what the rule looks at."""

_DEFAULTS: tuple[Callable[[], Rule], ...] = (
    NonFinite,
    LossSpike,
    GradNormSpike,
    ExplodingGradient,
    VanishingGradient,
    AttentionCollapse,
    AttentionLogitGrowth,
    DeadUnits,
    UpdateRatio,
    Overconfidence,
    Stalled,
    NothingCaptured,
)
_BY_NAME: dict[str, Callable[[], Rule]] = {getattr(rule, "name", ""): rule for rule in _DEFAULTS}


def checked_rules(rules: Iterable[str | Rule] | None) -> list[Rule]:
    """The rules of an `instrument` call: all of them for None. Raises TypeError or ValueError for what is no rule."""
    if rules is None:
        return [make() for make in _DEFAULTS]
    if isinstance(rules, str) or not isinstance(rules, Iterable):
        raise TypeError(f"rules={rules!r}: takes a list of rules, such as ['non_finite', torchprobe.LossSpike()]")
    return [_checked_rule(rule) for rule in rules]


def name_of(rule: Rule) -> str:
    """How messages call a rule, and `stop_on=` knows it: its `name`, or the function's."""
    return str(getattr(rule, "name", None) or getattr(rule, "__name__", type(rule).__name__))


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


def checked_callback(on_alert: Any) -> Callable[[Alert], object] | None:
    """What is called with each alert, or None. Raises TypeError for what cannot be called."""
    if on_alert is None or (callable(on_alert) and not isinstance(on_alert, type)):
        return on_alert
    raise TypeError(f"on_alert={on_alert!r}: takes a function of one alert, or torchprobe.WebhookNotifier(url)")


def _checked_rule(rule: Any) -> Rule:
    if isinstance(rule, str):
        if rule not in _BY_NAME:
            raise ValueError(f"rules: no rule is called {rule!r}; takes {', '.join(_BY_NAME)}")
        return _BY_NAME[rule]()
    if isinstance(rule, type):
        raise TypeError(f"rules: got the class {rule.__name__}; write {rule.__name__}() with the brackets")
    if not callable(rule):
        raise TypeError(f"rules: got {rule!r}; takes names, rule objects or functions of a record")
    return rule  # type: ignore[no-any-return]
