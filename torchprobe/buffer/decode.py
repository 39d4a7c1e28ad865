"""Host rows to records, in the drain thread."""

from __future__ import annotations

import logging
import reprlib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, cast

from torchprobe.buffer.step import SKIPPED, SKIPPED_BEFORE, Arrived, Reporter, StepInFlight, by_reporter, grouped
from torchprobe.messages import log as _log
from torchprobe.records import EVIDENCE, Record, Text, UserTag, Value, is_tag, of_tags, storable

_PATIENCE = 3  # sampled steps
_MOST_ODD = 20  # values that cannot be stored and are named; a tag with the step's number in it would give one a step
_NOT_HELD = (
    "no torch.optim optimizer held a parameter of the model that include= and exclude= leave; one made before its "
    "parameters were replaced, as load_state_dict(assign=True) does, holds the old ones"
)

_REASONS = {
    "outputs": "no chosen module ran with a floating-point output; look at include= and exclude=",
    "output_gradients": "no chosen module's output needed a gradient; look at include= and exclude=",
    "gradients": "no parameter of the model had a gradient when a torch.optim optimizer stepped, or none stepped",
    "parameters": _NOT_HELD,
    "updates": _NOT_HELD,
    "momenta": "no optimizer keeps a momentum under a name that is known",
    "second_moments": "no optimizer keeps squares of gradients under a name that is known",
    "attention": "no attention was seen; session.summary() counts what was not covered, and why",
    "uncertainty": "the model returned no named uncertainty, no distribution, and no logits that a cross-entropy told; "
    "Uncertainty(task='classification') or task='regression' says what a plain output is",
    "calibration": "no labels=, loss module or gradient told the targets of class predictions; "
    "session.log_predictions(probs, targets) takes them",
    "loss": "no backward() of a single number was seen through the model's output, which is what the loss is read from",
}

LOSS = "overview/loss"
SKIPPED_STEPS = "overview/skipped_steps"
_LATE = frozenset({SKIPPED_STEPS, *(f"overview/{name}" for name in ("alerts", "dropped_records", "probe_overhead"))})


class Decoder:
    """Lets each probe report its rows. A probe whose report raises is left out from then on, logged once.

    A value that no writer could store, or under a tag that is no text, is left out alone and said once. skipped counts
    the steps that turned out to be skipped when their rows arrived, by a fused optimizer (they give no record) or for
    want of finite gradients: `overview/skipped_steps` is told here. missing names the probes that saw nothing in their
    first three sampled steps, each logged once: as a warning, unless the user did not ask for the probe (asked_for) and
    a model need not have what it watches. faults: what is left out for good, a short line each.
    """

    def __init__(self, descriptions: Mapping[str, str], asked_for: bool = True) -> None:
        self.skipped = 0
        self.missing: list[str] = []
        self.faults: list[str] = []
        self._descriptions = _texts(descriptions)
        self._asked_for = asked_for
        self._failed: set[Reporter] = set()
        self._odd: set[tuple[str, str]] = set()
        self._seen: set[Reporter] = set()
        self._asked: Counter[Reporter] = Counter()
        self._lost = False
        self._evidence = of_tags(lambda tags: [tag for tag in tags if tag.startswith(EVIDENCE)])
        self._plain = of_tags(_plainly)
        self._users = of_tags(lambda tags: [tag for tag in tags if type(tag) is UserTag])
        self._own = {*_LATE, *(["performance/step_seconds"] if "performance" in descriptions else [])}  # as written

    def resume(self, skipped: int) -> None:
        """Count on from there."""
        self.skipped = skipped

    @property
    def unsaid(self) -> list[str]:
        """What probes looked at and did not record, a line each, and what would settle it."""
        reasons = {r: str(getattr(r, "reason", "")) for r in self._asked if not self._saw(r)}
        wholes = dict.fromkeys(getattr(reporter, "whole", reporter) for reporter in self._asked)
        remarks = [str(line) for reporter in wholes for line in getattr(reporter, "remarks", ())]
        return [*(f"{_name(reporter)}: {reason}" for reporter, reason in reasons.items() if reason), *remarks]

    def __call__(self, sent: StepInFlight) -> Record | None:
        """The record of a step; None when it has no values. Raises what a device raised."""
        return self.record(sent, sent.arrive())

    def record(self, sent: StepInFlight, arrived: Iterable[Arrived]) -> Record | None:
        """The record of a step whose rows are on the host."""
        groups = grouped(arrived)
        self.skipped += sum(int(part.rows.sum()) for part in groups.get((SKIPPED_BEFORE, ""), ()))
        if any((flag.rows > 0).any() for flag in groups.get((SKIPPED, ""), ())):
            self.skipped += 1
            return None
        values: dict[str, Value] = {}
        plain, users = self._plain(tuple(sent.values))
        if plain and {*map(type, sent.values.values())} == {float}:
            values = dict(zip(plain, sent.values.values(), strict=True))  # the same strings each time, quick to compare
        else:
            self._take(values, sent.values.items(), "the step")
        if SKIPPED_STEPS in values:  # those that the training thread knows of
            values[SKIPPED_STEPS] = float(cast("float", values[SKIPPED_STEPS]) + self.skipped)
        # Training first: what its loss tells of an output holds in the validation after it.
        for (reporter, prefix), parts in sorted(groups.items(), key=lambda group: group[0][1]):
            values.update(self._report(reporter, prefix, parts))
        values.update(self._explain_gaps(sent))
        self._own |= values.keys()
        if groups or users:
            self._take_users(values)
        evidence = self._taken(values) if groups else {}
        if not values and not evidence:
            return None
        sampled = any(getattr(getattr(reporter, "probe", None), "sampled", True) for reporter in sent.due)
        return Record(sent.step, sent.wall_time, values, self._descriptions, sampled, evidence)

    def _take_users(self, values: dict[str, Value]) -> None:
        """What the user logs, but for what would stand among torchprobe's own numbers."""
        for logged in self._users(tuple(values)):
            tag, value = str(logged), values.pop(logged)
            if tag in self._own:
                self._say_odd("what was logged", tag, "torchprobe writes that tag itself; log it under another")
            else:
                values[tag] = value

    def _taken(self, values: dict[str, Value]) -> dict[str, float]:
        """What is for rules alone, out of the values that are written, without the prefix."""
        return {tag.removeprefix(EVIDENCE): cast("float", values.pop(tag)) for tag in self._evidence(tuple(values))}

    def _report(self, reporter: Reporter, prefix: str, parts: Sequence[Arrived]) -> dict[str, Value]:
        if reporter in self._failed:
            return {}
        tagged: dict[str, Value] = {}
        try:
            found = by_reporter(parts)
            if found:
                self._take(tagged, _reported(reporter, found), _name(reporter), prefix)
                self._descriptions.update(_texts(getattr(reporter, "descriptions", {})))
        except BaseException as error:
            name, kind = _name(reporter), type(error).__name__
            self._failed.add(reporter)
            self.faults.append(f"{name} is left out: its report raised {kind}")
            _log.error("the report of %s failed and is left out from now on (%s)", name, kind, exc_info=error)
            return {}
        if tagged or (found and getattr(reporter, "rows_suffice", True)):
            self._seen.update(getattr(part, "speaks_for", part) for part in found)
        return tagged

    def _take(self, values: dict[str, Value], items: Iterable[Any], owner: str, prefix: str = "") -> None:
        """Take values in under their tags. Most are floats under tags of ASCII, for which little is asked."""
        plain = prefix.isascii()
        for item in items:
            if type(item) is not tuple or len(item) != 2:  # a user's report may yield anything
                self._say_odd(owner, "", f"{reprlib.repr(item)} is no (tag, value) pair")
                continue
            tag, value = item
            if plain and type(value) is float and type(tag) is str and tag and tag.isascii():
                values[prefix + tag] = value
                continue
            tag = prefix + tag if isinstance(tag, str) and type(tag) is not UserTag else tag
            stored = storable(value)
            if stored is None:
                self._say_odd(owner, tag, f"takes a number, text, histogram, image or array, not {reprlib.repr(value)}")
            elif is_tag(tag):
                values[tag if type(tag) is UserTag else str(tag)] = stored
            else:
                self._say_odd(owner, tag, "takes a tag that is text")

    def _say_odd(self, owner: str, tag: object, problem: str) -> None:
        key = (owner, tag if isinstance(tag, str) else type(tag).__name__)
        if key in self._odd or len(self._odd) >= _MOST_ODD:
            return
        self._odd.add(key)
        more = "; more such values are not named" if len(self._odd) == _MOST_ODD else ""
        self.faults.append(f"{reprlib.repr(tag)} of {owner} is left out: {problem}")
        _log.warning("%s of %s is left out: %s%s", reprlib.repr(tag), owner, problem, more)

    def _explain_gaps(self, sent: StepInFlight) -> dict[str, Value]:
        if not sent.lost:
            return self._look_for_missing(sent.due)
        if not self._lost:
            self._lost = True
            _log.warning("step %d found no free slots on its device: its statistics are lost", sent.step)
        return {}

    def _saw(self, reporter: Reporter) -> bool:
        return reporter in self._seen or (getattr(reporter, "source", "") == "loss" and LOSS in self._own)  # no rows

    def _look_for_missing(self, due: Sequence[Reporter]) -> dict[str, Value]:
        self._asked.update(due)
        texts: dict[str, Value] = {}
        for reporter in due:
            failed = getattr(reporter, "whole", reporter) in self._failed
            unseen = not self._saw(reporter) and _name(reporter) not in self.missing
            if self._asked[reporter] == _PATIENCE and unseen and not failed:
                name, source = _name(reporter), getattr(reporter, "source", "")
                self.missing.append(name)
                usual = _REASONS.get(source, "nothing of the kind it watches occurred")
                reason = getattr(reporter, "reason", "") or usual
                text = f"{name} saw nothing in its first {_PATIENCE} sampled steps ({reason})"
                serious = self._asked_for or getattr(reporter, "found_everywhere", True)
                _log.log(logging.WARNING if serious else logging.INFO, "nothing captured: %s", text)
                if serious:
                    texts[f"nothing_captured/{name}"] = Text(text)
        return texts


def _reported(reporter: Any, found: Mapping[Reporter, tuple[Sequence[str], Any]]) -> Iterable[Any]:
    """Tags and values of one source, or of several together."""
    if reporter in found:
        return cast("Iterable[Any]", reporter.report_all(*found[reporter]))
    rows = {getattr(part, "source", ""): named for part, named in found.items()}
    return cast("Iterable[Any]", reporter.report_sources(rows)) if rows else ()


def _plainly(tags: tuple[str, ...]) -> tuple[Sequence[str], bool]:
    """Tags, if no writer could refuse one, and whether there are some of the user's."""
    kinds = {*map(type, tags)}
    return tags if kinds <= {str, UserTag} and all(map(is_tag, tags)) else (), UserTag in kinds


def _name(reporter: Reporter) -> str:
    return str(getattr(reporter, "name", type(reporter).__name__))


def _texts(descriptions: Mapping[str, str]) -> dict[str, str]:
    """Those that are text: another one would keep its record from being written."""
    return {group: text for group, text in descriptions.items() if isinstance(group, str) and isinstance(text, str)}
