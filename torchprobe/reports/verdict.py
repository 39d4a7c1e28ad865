"""Is a run healthy, and if not, at what to look first: the alerts of a run as episodes, and the verdict over them."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from typing import Any

MOST = 3  # things to look at
_SAID = re.compile(
    r"(?P<rule>.+?)(?P<ended> has ended)?, step (?P<step>\d+)"
    r"(?: at (?P<where>.+?)(?: to (?P<last>.+?) \((?P<members>\d+) in all\))?)?: (?P<message>.*)",
    re.DOTALL,
)
_GRAVEST = ("non_finite", "exploding_gradient")  # first; then bugs that have a name, and rules of a user's own
_SYMPTOMS = (
    *("vanishing_gradient", "dead_units", "attention_logit_growth", "attention_collapse", "loss_spike"),
    *("learning_rate_too_low", "at_chance", "overfitting", "overconfidence"),
    *("grad_norm_spike", "update_ratio", "input_bound", "stalled", "nothing_captured"),
)
_CONSEQUENCES = frozenset({"at_chance", "learning_rate_too_low", "update_ratio"})
"""Of whatever else keeps a model from learning, where that began no later: no illness of their own then."""


def parsed(line: str) -> dict[str, Any] | None:
    """An alert's line taken apart: rule, step, where, last, members, ended, message; None for another line."""
    match = _SAID.fullmatch(line)
    if match is None:
        return None
    found = {**match.groupdict(), "ended": match["ended"] is not None, "step": int(match["step"])}
    return {**found, "members": int(match["members"] or bool(match["where"]))}


def episodes(rule: str, steps: Sequence[int], lines: Sequence[tuple[str, str]]) -> list[dict[str, Any]]:
    """From when to when an illness lasted, and where: one for each alert of a rule.

    steps: at which it fired, for alerts whose text is not there. lines: what was said, each with its advice. `until` is
    None while it lasts.
    """
    found: list[dict[str, Any]] = []
    for line, _ in lines:
        alert = parsed(line)
        if alert is None or alert["rule"] != rule:
            continue
        if not alert["ended"]:
            found.append({**{key: alert[key] for key in _KEPT}, "said": line, "until": None})
            continue
        open_ones = (one for one in reversed(found) if one["until"] is None and one["where"] == alert["where"])
        for one in open_ones:
            one["until"] = alert["step"]
            break
    told = {one["step"] for one in found}
    found += [
        {"step": step, "where": None, "last": None, "members": 0, "message": "", "said": None, "until": None}
        for step in steps
        if step not in told
    ]
    return sorted(found, key=lambda one: one["step"])


_KEPT = ("step", "where", "last", "members", "message")


def verdict(summary: Mapping[str, Any]) -> dict[str, Any]:
    """`healthy` (None where nobody can say), the verdict in a `line`, and at most three things to `look_at` first.

    Each has `what` in a sentence, `step`, `where`, the `rules` that fired with it, and `advice`.
    """
    things = [*_endings(summary), *_ill(summary["alerts"]), *_unsaid(summary)]
    steps = f"{summary['steps']} step{'' if summary['steps'] == 1 else 's'}"
    healthy: bool | None = not things
    if not summary["steps"] and not things:
        healthy, line = None, "Nothing is recorded yet."
    elif not things and summary["state"] is None and "alerts" not in summary["counts"]:
        healthy, line = None, f"Nothing stands out in {steps}, but no rule is known to have watched this run."
    elif not things:
        so_far = " so far" if summary["state"] == "running" else ""
        line = f"Healthy{so_far}: nothing to look at in {steps}."
    else:
        more = f" (and {len(things) - MOST} more)" if len(things) > MOST else ""
        count = min(len(things), MOST)
        over = all(thing["over"] for thing in things)
        what = "this" if count == 1 else f"these {count} things"
        line = f"{'Healthy at the end, but look' if over else 'Not healthy. Look'} at {what}{more}:"
    return {"healthy": healthy, "line": line, "look_at": things[:MOST]}


def next_steps(summary: Mapping[str, Any]) -> list[str]:
    """What to try, for every illness of the run, the gravest first and each once."""
    things = [*_ill(summary["alerts"]), *_unsaid(summary)]
    advice = [thing["advice"] for thing in things if thing["advice"]]
    milder = [alert["advice"] for alert in sorted(summary["alerts"], key=_gravity) if alert["advice"]]
    return list(dict.fromkeys((*advice, *milder)))


def _thing(what: str, step: int, advice: str | None = None, where: str | None = None, **more: Any) -> dict[str, Any]:
    return {"what": what, "step": step, "where": where, "rules": [], "advice": advice, "over": False, **more}


def _endings(summary: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    step, stopped = summary["steps"], summary["stopped"]
    if summary["state"] == "crashed":
        yield _thing(f"The run crashed at step {step}: {summary['exception']}", step)
    if summary["state"] == "killed":
        yield _thing(f"The run was killed after step {step}, or hangs", step)
    if stopped is not None:
        yield _thing(f"Recording stopped at step {stopped['step']}: {stopped['why']}", stopped["step"])


def _ill(alerts: Sequence[Mapping[str, Any]]) -> list[Any]:
    """What began in one step is one thing, headed by a bug that has a name, or by what says where; what still holds
    stands before what is over."""
    begun = [(one, alert) for alert in alerts for one in alert["episodes"]]
    by_rule: dict[tuple[str, str | None], Any] = {}
    for one, alert in begun:  # of one illness that comes and goes, the first time
        by_rule.setdefault((alert["rule"], one["where"]), (one, alert, alert["episodes"][-1]["until"]))
    ordered = sorted(by_rule.values(), key=lambda found: found[0]["step"])
    grouped = _with_consequences([list(found) for _, found in groupby(ordered, key=lambda found: found[0]["step"])])
    heads = [(sorted(found, key=lambda f: (_is_vague(*f[:2]), _gravity(f[1]))), found) for found in grouped]
    things = [(_is_over(found), _gravity(head[0][1]), _as_thing(head)) for head, found in heads]
    return [thing for _, _, thing in sorted(things, key=lambda thing: (thing[0], thing[1], thing[2]["step"]))]


def _is_vague(one: Mapping[str, Any], alert: Mapping[str, Any]) -> bool:
    return one["where"] is None and alert["rule"] in (*_GRAVEST, *_SYMPTOMS)


def _with_consequences(groups: Sequence[list[Any]]) -> list[list[Any]]:
    """What is nothing but a consequence goes with the gravest illness that was there before and still is."""
    kept: list[list[Any]] = []
    for found in groups:
        later = all(alert["rule"] in _CONSEQUENCES for _, alert, _ in found)
        causes = [group for group in kept if later and not _is_over(group) and _heads_others(group)]
        if causes:
            min(causes, key=lambda group: min(_gravity(alert) for _, alert, _ in group)).extend(found)
        else:
            kept.append(found)
    return kept


def _heads_others(found: Sequence[Any]) -> bool:
    """Whether it may keep a model from learning: a wait for data does not."""
    rules = {alert["rule"] for _, alert, _ in found}
    return bool(rules - _CONSEQUENCES - {"input_bound", "stalled", "nothing_captured", "overfitting", "overconfidence"})


def _is_over(found: Sequence[Any]) -> bool:
    return all(until is not None for _, _, until in found)


def _as_thing(found: Sequence[Any]) -> Any:
    one, alert, until = found[0]
    others = list(dict.fromkeys(other["rule"] for _, other, _ in found[1:] if other["rule"] != alert["rule"]))
    when = f"from step {one['step']} to {until}" if until is not None else f"since step {one['step']}"
    place = f" at {one['where']}" if one["where"] else ""
    place += f" to {one['last']} ({one['members']} in all)" if one["last"] else ""
    what = f"{named(alert['rule'])}{place} {when}" + (f": {one['message']}" if one["message"] else "")
    what += f". With it: {', '.join(map(_lower, others))}" if others else ""
    rules = [alert["rule"], *others]
    return _thing(what, one["step"], alert["advice"], one["where"], rules=rules, over=_is_over(found))


def named(rule: str) -> str:
    """`vanishing_gradient` as `Vanishing gradient`."""
    return _lower(rule)[:1].upper() + _lower(rule)[1:]


def _lower(rule: str) -> str:
    return rule.replace("_", " ").replace("non finite", "NaN or inf")


def _gravity(alert: Mapping[str, Any]) -> int:
    rule = alert["rule"]
    if rule in _GRAVEST:
        return _GRAVEST.index(rule)
    return len(_GRAVEST) + 1 + _SYMPTOMS.index(rule) if rule in _SYMPTOMS else len(_GRAVEST)


def _unsaid(summary: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """What the numbers say where no rule was on that would."""
    rules = {alert["rule"] for alert in summary["alerts"]}
    curves = summary["curves"]
    losses = [tag for tag in ("overview/loss", "train/loss") if tag in curves and curves[tag]["last"] is None]
    if losses and "non_finite" not in rules:
        what = f"{losses[0]} ends as NaN or inf"
        yield _thing(what, summary["steps"], "Go back to a checkpoint before it, and let the rule non_finite watch.")
    dead = [row for row in summary["layers_to_look_at"].get("smallest mean gradients", ()) if row["value"] == 0]
    if dead and not rules & {"vanishing_gradient", "dead_units", "non_finite"}:
        where = dead[0]["where"]
        others = f" and {len(dead) - 1} more" if len(dead) > 1 else ""
        yield _thing(
            f"The gradient is exactly 0 at {where}{others} since step {dead[0]['step']}", dead[0]["step"], None, where
        )
