"""The Probe tab: routes that serve its scripts and what it shows, to a page that knows only relative addresses; and the
runs below TensorBoard's folders, read as they grow, for as long as somebody looks at them.
"""

from __future__ import annotations

import gzip
import json
import logging
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

from tensorboard.plugins.base_plugin import FrontendMetadata, TBContext, TBPlugin
from werkzeug import wrappers

from torchprobe.reports.events import EventFiles, event_files, event_files_below
from torchprobe.reports.run import Run, run_of
from torchprobe.reports.summary import summarise
from torchprobe.reports.views import WEB, MissingChartsError, heads_at, plotly_file, views_of

App: TypeAlias = "Callable[..., Any]"

_log = logging.getLogger("tensorboard")
_FILES = ("index.js", "charts.js", "views.js", "views.css")
_SCRIPT, _STYLE, _JSON, _TEXT = "text/javascript", "text/css", "application/json", "text/plain"


class ProbePlugin(TBPlugin):  # type: ignore[misc]
    """Serves the tab. It reads runs from their folders itself, the same with and without `--load_fast`."""

    plugin_name = "torchprobe"  # as in the metadata of the matrices that a run holds

    def __init__(self, context: TBContext) -> None:
        flags = context.flags
        self._runs = Runs(context.logdir or "", getattr(flags, "logdir_spec", "") or "")

    def is_active(self) -> bool:
        """Whether there is any run."""
        try:
            return bool(self._runs.folders()) or bool(self._runs.remote)
        except Exception:
            _log.warning("torchprobe's Probe tab: the runs cannot be listed", exc_info=True)
            return False

    def frontend_metadata(self) -> FrontendMetadata:
        """The tab's name and its script."""
        return FrontendMetadata(es_module_path="/index.js", tab_name="Probe", disable_reload=True)

    def get_plugin_apps(self) -> Mapping[str, App]:
        """The routes, below `data/plugin/torchprobe`."""
        runs = self._runs
        files = {f"/{name}": _route(partial(_file, name)) for name in _FILES}
        return {
            **files,
            "/plotly.js": _route(lambda _: (plotly_file().read_bytes(), _SCRIPT), seconds=86400),
            "/runs": _route(lambda _: (json.dumps({"runs": runs.listed(), "remote": runs.remote}).encode(), _JSON)),
            "/views": _route(lambda asked: (runs.views(asked["run"]), _JSON)),
            "/heads": _route(lambda asked: (runs.heads(asked["run"], asked["statistic"], int(asked["step"])), _TEXT)),
        }


def _file(name: str, asked: Mapping[str, str]) -> tuple[bytes, str]:
    return (WEB / name).read_bytes(), _SCRIPT if name.endswith(".js") else _STYLE


def _route(answer: Callable[[Mapping[str, str]], tuple[bytes, str]], *, seconds: int = 0) -> App:
    """A WSGI application; what is not there is a 404, and any other fault a 500 that says what it was."""

    @wrappers.Request.application
    def serve(request: Any) -> Any:
        try:
            content, kind = answer(request.args)
        except (KeyError, ValueError) as error:
            return _response(f"not there: {error}".encode(), _TEXT, 404)
        except MissingChartsError as error:
            return _response(str(error).encode(), _TEXT, 501)
        except Exception as error:
            _log.warning("torchprobe's Probe tab: %s failed", request.path, exc_info=True)
            return _response(f"{type(error).__name__}: {error}".encode(), _TEXT, 500)
        packed = len(content) > 10_000 and "gzip" in request.headers.get("Accept-Encoding", "")
        return _response(gzip.compress(content, 3) if packed else content, kind, 200, seconds, packed=packed)

    return serve


def _response(content: bytes, kind: str, code: int, seconds: int = 0, *, packed: bool = False) -> Any:
    response = wrappers.Response(content, code, content_type=f"{kind}; charset=utf-8")
    response.headers["Cache-Control"] = f"private, max-age={seconds}" if seconds else "no-store"
    response.headers["X-Content-Type-Options"] = "nosniff"
    if packed:
        response.headers["Content-Encoding"] = "gzip"
    return response


# ---- runs

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
            for file in event_files_below(root):
                below = file.parent.relative_to(root).as_posix()
                run = "/".join(part for part in (name, "" if below == "." else below) if part) or "."
                found[run] = max(found.get(run, (0.0, file.parent)), (file.stat().st_mtime, file.parent))
        ordered = sorted(found, key=lambda run: found[run], reverse=True)
        return {run: found[run][1] for run in ordered}

    def listed(self) -> list[dict[str, Any]]:
        """Every run with its size in bytes, which changes when there is more of it."""
        return [
            {"run": run, "version": sum(file.stat().st_size for file in event_files(folder))}
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
