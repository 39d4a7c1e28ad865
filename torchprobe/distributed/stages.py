"""Pipelines: what the parts of a model that ranks run are called in the whole of it, decided on rank 0, once."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence

from torchprobe.buffer.step import Stage
from torchprobe.distributed.mailbox import Mailbox, Part
from torchprobe.naming import ROOT

FindStages = Callable[[], Sequence[Stage]]
"""Looks for the stages of this rank; called once, in the drain thread, when the first step has run."""


class StageNames:
    """Names in the whole model, for names that a rank has.

    They are those inside of the stages where no two of these have a parameter of the same name; else, and while not all
    stages are known, `stage1.` stands before them. A stage itself is called `stage1`.

    stages: by rank.
    """

    def __init__(self, stages: Mapping[int, Sequence[Stage]]) -> None:
        every = [stage for some in stages.values() for stage in some]
        complete = bool(every) and {stage.place for stage in every} == set(range(every[0].stages))
        apart = complete and _apart((stage.place, stage.parameters) for stage in every)
        self._renamed = {rank: _table(some, prefixed=not apart) for rank, some in stages.items()}
        self._ranks = {rank: {other for s in some for other in s.ranks} for rank, some in stages.items()}

    def of(self, rank: int, parts: Sequence[Part]) -> Sequence[Part]:
        """A rank's parts of a step under the names of the whole."""
        table = self._renamed.get(rank)
        if not table:
            return parts
        return [part._replace(names=[table.get(name, name) for name in part.names]) for part in parts]

    def on_same_data(self, rank: int, others: Sequence[int]) -> Sequence[int]:
        """The ranks that see the same examples as this one: those of its pipeline too."""
        pipeline = self._ranks.get(rank)
        return sorted(pipeline.union(others)) if pipeline else others


def announce(mailbox: Mailbox, rank: int, stages: Sequence[Stage]) -> None:
    """Leave word for rank 0 of what this rank runs; before its first step, which tells that the word is there."""
    if stages:
        mailbox.put(f"stages/{rank}", json.dumps(stages).encode())


def announced(mailbox: Mailbox, rank: int) -> Sequence[Stage]:
    """What a rank has left word of."""
    said = mailbox.fetch(f"stages/{rank}")
    return () if said is None else [Stage(*stage) for stage in json.loads(said)]


def _apart(named: Iterable[tuple[int, Sequence[str]]]) -> bool:
    """Whether no two stages have a name in common; the copies of one stage have all of them."""
    owners: dict[str, int] = {}
    return all(owners.setdefault(name, index) == index for index, names in named for name in names)


def _table(stages: Sequence[Stage], prefixed: bool) -> dict[str, str]:
    renamed: dict[str, str] = {}
    for stage in stages:
        own = f"stage{stage.place}"
        before = f"{own}." if prefixed else ""
        renamed |= {local: own if name == ROOT else before + name for local, name in stage.names.items()}
    return renamed
