"""Parts of a step from all ranks to rows as if one process had seen everything; ranks are given in their order.

Those of a pipeline's stages get the names of the whole model, which are decided on rank 0, once.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray

from torchprobe.buffer.step import Arrived, Heading, Share, Stage
from torchprobe.distributed.mailbox import Mailbox, Part
from torchprobe.messages import log as _log
from torchprobe.naming import ROOT
from torchprobe.probes.base import Reporter, Way


class Combiner:
    """Lets each probe combine its rows. One whose `combine` raises keeps those of the first rank, logged once.

    reporters: by the key under which ranks send them, all with `combine_rows`.
    """

    def __init__(self, reporters: Mapping[str, Any]) -> None:
        self._reporters = reporters
        self._failed: set[str] = set()
        self.incomplete = 0  # steps in which parts of a sharded parameter were missing, which is left out then

    def __call__(self, parts: Mapping[int, Sequence[Part]], groups: Sequence[Sequence[int]]) -> list[Arrived]:
        """The rows of all ranks together, by probe; groups: the ranks that saw the same examples."""
        by_probe: defaultdict[tuple[str, str], dict[int, list[Part]]] = defaultdict(dict)
        for rank, some in parts.items():
            for part in some:
                if part.reporter in self._reporters:
                    by_probe[part.reporter, part.prefix].setdefault(rank, []).append(part)
        arrived, missing = [], False
        for (key, prefix), of_ranks in by_probe.items():
            names, rows, incomplete = self._merged(key, of_ranks, groups)
            missing |= bool(incomplete)
            if names:
                arrived.append(Arrived(Heading(self._reporters[key], names, prefix, False, None), rows))
        self.incomplete += missing
        return arrived

    def _merged(self, key: str, parts: Mapping[int, Sequence[Part]], groups: Sequence[Sequence[int]]) -> Merged:
        reporter = self._reporters[key]
        if key not in self._failed:
            try:
                return merge(reporter, parts, groups)
            except Exception:
                self._failed.add(key)
                _log.exception("%s cannot be combined over ranks; one rank's values are shown", type(reporter).__name__)
        first = min(parts)
        return merge(reporter, {first: parts[first]}, [[first]])


def same_data_groups(ranks: Mapping[int, Sequence[int]]) -> list[list[int]]:
    """Ranks by the examples that they see: given for each rank which others see the same, some of them or all."""
    groups: dict[int, set[int]] = {}
    for rank, others in ranks.items():
        joined = {rank}.union(*(groups.get(other, {other}) for other in (rank, *others)))
        groups |= dict.fromkeys(joined, joined)
    known = {id(group): sorted(group.intersection(ranks)) for rank, group in groups.items() if rank in ranks}
    return list(known.values())


Rows: TypeAlias = "dict[str, NDArray[np.float64]]"
"""What one rank has under each name: (occurrences, fields), as several optimizers or heads have a row each."""


class Merged(NamedTuple):
    """Names and rows of all ranks together; incomplete names some parts of which are missing."""

    names: list[str]
    rows: NDArray[np.float64]
    incomplete: list[str]


def merge(probe: Reporter, parts: Mapping[int, Sequence[Part]], groups: Iterable[Sequence[int]]) -> Merged:
    """What all ranks have of one probe. groups: the ranks that saw the same examples, each rank in one group."""
    if any(part.shards is not None for some in parts.values() for part in some):
        rows, incomplete = _of_parameters(probe, parts)
    else:
        groups, incomplete = list(groups), []
        rows = _averaged(probe, _alike(probe, parts, groups) or _of_batches(probe, parts, groups), len(groups))
    names = [name for name, some in rows.items() for _ in range(len(some))]
    return Merged(names, np.concatenate(list(rows.values())) if rows else np.zeros((0, 1)), incomplete)


def _alike(probe: Reporter, parts: Mapping[int, Sequence[Part]], groups: Sequence[Sequence[int]]) -> Rows | None:
    """Of ranks with examples of their own and the same rows, neighbours at a time; None for others.

    A thousand ranks take as many calls as two: half of the rows with the other half, and again.
    """
    if probe.over_batches == "append" or any(len(group) != 1 for group in groups):
        return None
    own = [part for [rank] in groups for part in parts.get(rank, ())]
    names = own[0].names if own else []
    alike = all(part.names == names and part.rows.shape == own[0].rows.shape for part in own)
    if not (alike and len(own) == len(groups) and len(set(names)) == len(names) > 0):
        return None
    rows = np.stack([part.rows for part in own])
    while len(rows) > 1:
        pairs, last = rows[: len(rows) // 2 * 2], rows[len(rows) // 2 * 2 :]
        both = probe.combine_rows(np.concatenate(pairs[::2]), np.concatenate(pairs[1::2]))
        rows = np.concatenate((both.reshape(len(pairs) // 2, *rows.shape[1:]), last))
    return {name: rows[0, i : i + 1] for i, name in enumerate(names)}


def _of_batches(probe: Reporter, parts: Mapping[int, Sequence[Part]], groups: Sequence[Sequence[int]]) -> Rows:
    by_rank = {rank: _by_name(some) for rank, some in parts.items()}
    batches = [_of_shards(probe, [by_rank[rank] for rank in group if rank in by_rank]) for group in groups]
    return _folded(probe, batches, probe.over_batches)


def _of_parameters(probe: Reporter, parts: Mapping[int, Sequence[Part]]) -> tuple[Rows, list[str]]:
    """A row of the whole parameter is taken from the first rank that has one, else the parts of one copy are merged."""
    whole: Rows = {}
    copies: defaultdict[str, defaultdict[int, list[_Held]]] = defaultdict(lambda: defaultdict(list))
    for some in parts.values():
        own = _by_name(some)
        for name, shard in _shards_by_name(some).items():
            if shard.is_whole:
                whole.setdefault(name, own[name])
            else:
                copies[name][shard.copy].append(_Held(shard, own[name]))
    chosen = {name: _complete_copy(of_name) for name, of_name in copies.items() if name not in whole}
    ranks = max((len(held) for held in chosen.values()), default=0)
    shards = [{name: held[i].rows for name, held in chosen.items() if i < len(held)} for i in range(ranks)]
    rows = whole | _folded(probe, shards, "combine")
    ordered = dict.fromkeys(name for some in parts.values() for part in some for name in part.names)
    return {name: rows[name] for name in ordered if name in rows}, [name for name, held in chosen.items() if not held]


class _Held(NamedTuple):
    shard: Share
    rows: NDArray[np.float64]


def _complete_copy(copies: Mapping[int, list[_Held]]) -> list[_Held]:
    """The parts that together hold every element once; none when some are missing."""
    for _, held in sorted(copies.items()):
        if sum(shard.part for shard, _ in held) == held[0].shard.whole:
            return held
    return []


def _of_shards(probe: Reporter, ranks: Sequence[Rows]) -> Rows:
    """Rows of ranks that saw the same examples. Equal ones are copies; others are of parts."""
    if len(ranks) < 2:
        return dict(ranks[0]) if ranks else {}
    names = dict.fromkeys(name for rows in ranks for name in rows)
    held = {name: [rows[name] for rows in ranks if name in rows] for name in names}
    alike = {name: all(np.array_equal(some[0], one, equal_nan=True) for one in some[1:]) for name, some in held.items()}
    copies = {name: some[0] for name, some in held.items() if alike[name]}
    spread = [{name: some for name, some in rows.items() if name not in copies} for rows in ranks]
    merged = copies | _folded(probe, spread, probe.over_shards)
    return {name: merged[name] for name in names}


def _averaged(probe: Reporter, rows: Rows, batches: int) -> Rows:
    """The training loss is the mean of the ranks' losses, and each has seen the gradient of its own."""
    unscale = getattr(probe, "unscale", None)
    if batches == 1 or unscale is None or getattr(probe, "source", "") != "output_gradients":
        return rows
    scale = torch.tensor(float(batches), dtype=torch.float64)
    return {
        n: unscale(torch.from_numpy(np.pad(some, ((0, 0), (0, 1)))), scale).numpy()[:, :-1] for n, some in rows.items()
    }


def _folded(probe: Reporter, ranks: Iterable[Rows], way: Way) -> Rows:
    total: Rows = {}
    for rows in ranks:
        shared = [name for name in rows if name in total]
        if way == "append":
            total |= {name: np.concatenate((total[name], rows[name])) for name in shared}
        else:
            total |= _combined(probe, total, rows, [name for name in shared if total[name].shape == rows[name].shape])
        total |= {name: some for name, some in rows.items() if name not in total}
    return total


def _combined(probe: Reporter, a: Rows, b: Rows, names: Sequence[str]) -> Rows:
    """One call for all names: a call costs more than its arithmetic."""
    if not names:
        return {}
    both = probe.combine_rows(np.concatenate([a[n] for n in names]), np.concatenate([b[n] for n in names]))
    ends = np.cumsum([len(a[name]) for name in names])[:-1]
    return dict(zip(names, np.split(both, ends), strict=True))


def _by_name(parts: Sequence[Part]) -> Rows:
    lists: dict[str, list[NDArray[np.float64]]] = {}
    for part in parts:
        for name, row in zip(part.names, part.rows, strict=True):
            lists.setdefault(name, []).append(row)
    return {name: np.stack(rows) for name, rows in lists.items()}


def _shards_by_name(parts: Sequence[Part]) -> dict[str, Share]:
    return {n: shard for part in parts for n, shard in zip(part.names, part.shards or (), strict=True)}


# ---- names in a pipeline

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
