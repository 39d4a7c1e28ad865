"""The Probe tab: routes that serve its scripts and what it shows, to a page that knows only relative addresses."""

from __future__ import annotations

import gzip
import json
import logging
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, TypeAlias

from tensorboard.plugins.base_plugin import FrontendMetadata, TBContext, TBPlugin
from werkzeug import wrappers

from torchprobe.reports.page import WEB, MissingChartsError, plotly_file
from torchprobe.reports.tab.runs import Runs

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
