"""What a person changes while a run goes on: how often it is sampled, by a call or by a file in its directory."""

from __future__ import annotations

import json
import stat
from collections.abc import Callable
from pathlib import Path
from time import time_ns
from typing import Any

from torchprobe.arguments import check_count
from torchprobe.messages import log as _log
from torchprobe.probes.schedule import Schedule, as_schedule
from torchprobe.rules.watch import Follower
from torchprobe.steps.cadence import Plan

FILE = "control.json"
_MOST_BYTES = 4096
_SLACK = 10**9  # nanoseconds by which a file system's clock may be behind
_NO_JSON = "holds no JSON"
_TAKES = 'takes an object such as {"every": 10} or {"sample_next": 20}; nothing was changed'


class SamplingCalls:
    """Calls that change how often a run is sampled, from the next step that begins on; from any thread."""

    def __init__(self, plan: Plan) -> None:
        self._plan = plan

    def every(self, every: int | Schedule) -> None:
        """Another cadence for all sampled probes that name none of their own: N is steps N, 2N, … from here on.

        As `every=` of `instrument`, which a resumed run begins with again. On several ranks call it on each, after the
        same step. Raises TypeError or ValueError for what is no cadence.
        """
        self._plan.change(schedule=as_schedule("every", every))

    def sample_next(self, steps: int) -> None:
        """Sample each of the next `steps` steps by all sampled probes, whatever their cadences and the budget.

        On several ranks call it on each, after the same step. Raises TypeError or ValueError for other than a number of
        steps above 0.
        """
        self._plan.change(sample_next=check_count("steps", steps))


class ControlFile(Follower):
    """Does the same when `control.json` in the run's directory is written or touched: looked at in the drain thread.

    The file holds `{"every": 10}`, `{"sample_next": 20}`, or both. One from before the run says nothing. What it cannot
    mean changes nothing and is said once. Costs a look at one file each time that the drain thread wakes up.

    place: where the run is, as far as is known, which is settled at its first write; a URL has no such file. alone: no
    other ranks, which would have to sample the same steps.
    """

    def __init__(self, place: Callable[[], Path | str], plan: Plan, alone: bool) -> None:
        self._place, self._calls, self._alone = place, SamplingCalls(plan), alone
        self._begun = time_ns() - _SLACK
        self._seen = self._stamp()
        self._said: set[str] = set()

    def at_rest(self) -> None:
        """Whether the file has changed since."""
        stamp = self._stamp()
        if stamp is None or stamp == self._seen:
            return
        self._seen = stamp
        if stamp[1] >= self._begun:
            self._obey(new=0 <= time_ns() - stamp[1] < _SLACK)

    def _stamp(self) -> tuple[str, int, int] | None:
        place = self._place()
        if isinstance(place, str):
            return None
        try:
            found = (place / FILE).stat()
        except OSError:
            return None
        return str(place), found.st_mtime_ns, found.st_size

    def _obey(self, new: bool) -> None:
        if not self._alone:
            self._say("there are several ranks, which have to sample the same steps: call session.every on each")
            return
        try:
            wanted = _read(Path(self._place()) / FILE)
        except (OSError, ValueError, TypeError) as error:
            if new and str(error) == _NO_JSON:  # it may be half written: the next look tells
                self._seen = None
            else:
                self._say(str(error))
            return
        if "every" in wanted:
            self._calls.every(wanted["every"])
        if "sample_next" in wanted:
            self._calls.sample_next(wanted["sample_next"])
        _log.info("%s: %s", FILE, ", ".join(f"{key} {value}" for key, value in wanted.items()))

    def _say(self, why: str) -> None:
        if why not in self._said:
            self._said.add(why)
            _log.warning("%s: %s; %s", FILE, why, _TAKES)


def _read(file: Path) -> dict[str, int]:
    """What the file asks for. Raises OSError, ValueError or TypeError for what it cannot mean."""
    found = file.stat()
    if not stat.S_ISREG(found.st_mode) or found.st_size > _MOST_BYTES:
        raise ValueError(f"is no file of at most {_MOST_BYTES} bytes")
    try:
        wanted: Any = json.loads(file.read_bytes())
    except (ValueError, RecursionError):
        raise ValueError(_NO_JSON) from None
    if not isinstance(wanted, dict) or not wanted or not wanted.keys() <= {"every", "sample_next"}:
        raise ValueError("holds something else")
    return {key: check_count(key, value) for key, value in wanted.items()}
