"""Parts of a step from all ranks to rows as if one process had seen everything."""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from torchprobe.buffer.step import Arrived, Heading
from torchprobe.distributed.frames import Part
from torchprobe.distributed.merge import Merged, merge

_log = logging.getLogger("torchprobe")


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
                _log.exception(
                    "%s cannot be combined over ranks; one rank's values are shown",
                    getattr(reporter, "name", type(reporter).__name__),
                )
        first = min(parts)
        return merge(reporter, {first: parts[first]}, [[first]])


def same_data_groups(ranks: Mapping[int, Sequence[int]]) -> list[list[int]]:
    """Ranks by the examples that they see: given for each rank which others see the same."""
    groups: defaultdict[frozenset[int], list[int]] = defaultdict(list)
    for rank, others in ranks.items():
        groups[frozenset(others) or frozenset({rank})].append(rank)
    return list(groups.values())
