"""The runs below TensorBoard's folders, read as they grow, for as long as somebody looks at them."""

from __future__ import annotations

import json
import threading
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torchprobe.reports.events import EVENTS, EventFiles, regular
from torchprobe.reports.run import Run, run_of
from torchprobe.reports.summary import summarise
from torchprobe.reports.views import heads_at, views_of

_MOST_KEPT = 4  # runs in memory: those that were looked at last
_URL = "://"


class Runs:
    """Runs by name: the folder's path below the one that TensorBoard shows, as on its other pages.

    logdir and spec are TensorBoard's options `--logdir` and `--logdir_spec`. Safe to ask from several threads.
    """

    def __init__(self, logdir: str, spec: str = "") -> None:
        self._roots = dict(_roots(logdir, spec))
        self._kept: OrderedDict[str, tuple[EventFiles, Run]] = OrderedDict()
        self._lock = threading.Lock()

    @property
    def remote(self) -> list[str]:
        """Places that cannot be read here, since they are URLs."""
        return [root for root in self._roots.values() if _URL in root]

    def folders(self) -> dict[str, Path]:
        """Every run with its folder, the one that was written last first."""
        found: dict[str, tuple[float, Path]] = {}
        for name, root in self._roots.items():
            if _URL in root:
                continue
            for file in regular(Path(root).rglob(EVENTS)):
                below = file.parent.relative_to(root).as_posix()
                run = "/".join(part for part in (name, "" if below == "." else below) if part) or "."
                found[run] = max(found.get(run, (0.0, file.parent)), (file.stat().st_mtime, file.parent))
        ordered = sorted(found, key=lambda run: found[run], reverse=True)
        return {run: found[run][1] for run in ordered}

    def listed(self) -> list[dict[str, Any]]:
        """Every run with its size in bytes, which changes when there is more of it."""
        return [
            {"run": run, "version": sum(file.stat().st_size for file in regular(folder.glob(EVENTS)))}
            for run, folder in self.folders().items()
        ]

    def views(self, name: str) -> bytes:
        """What is to be shown of a run, as JSON. Raises KeyError for a run that is not there."""
        run = self._run(name)
        views = views_of(run, {**summarise(run), "run": name}, all_heads=False)
        return json.dumps(views, allow_nan=False).encode()

    def heads(self, name: str, statistic: str, step: int) -> bytes:
        """A statistic of all heads at a step. Raises KeyError for what is not there."""
        with self._lock:
            known = self._kept.get(name)
        return heads_at(self._run(name) if known is None else known[1], statistic, step).encode()

    def _run(self, name: str) -> Run:
        folder = self.folders()[name]
        with self._lock:
            files, run = self._kept.pop(name, (EventFiles(folder), None))
            if files.update() or run is None:
                run = run_of(files)
            self._kept[name] = files, run
            while len(self._kept) > _MOST_KEPT:
                self._kept.popitem(last=False)
        return run


def _roots(logdir: str, spec: str) -> Iterator[tuple[str, str]]:
    """Names and places: `--logdir_spec` is `name:path,name:path`."""
    if logdir:
        yield "", str(Path(logdir).expanduser()) if _URL not in logdir else logdir
    for part in filter(None, spec.split(",")):
        name, colon, path = part.partition(":")
        named = bool(colon) and not path.startswith("//") and "/" not in name
        yield (name, str(Path(path).expanduser())) if named else ("", part)
