"""A session in a notebook: tables in place of text, the report's charts below a cell, cells that run again."""

from __future__ import annotations

import sys
from html import escape
from pathlib import Path
from typing import Any

from torchprobe.messages import log as _log

_HEIGHT = 900  # pixels of the charts; they scroll


def make_room(session: Any) -> None:
    """In a notebook, end the session that a model has, with a line that says so: a cell that runs again makes another.

    Elsewhere nothing happens: a second session of a model is a mistake there.
    """
    shell = getattr(sys.modules.get("IPython"), "get_ipython", None)
    if session is not None and shell is not None and shell() is not None:
        _log.warning("this model's session (step %d, %s) is ended for a new one", session.step, session.log_dir)
        session.detach(timeout=30.0)


class Summary(str):
    """A session's summary: text, and a table in a notebook. The first line is the title, a row's cells are apart."""

    __slots__ = ()

    def _repr_html_(self) -> str:
        title, *lines = self.splitlines()
        cells = (line.strip().partition("  ") for line in lines)
        rows = "".join(f"<tr><th>{escape(name)}</th><td>{escape(value.strip())}</td></tr>" for name, _, value in cells)
        style = "text-align:left;font-weight:bold;padding:.3em 0"
        return f'<table style="text-align:left"><caption style="{style}">{escape(title)}</caption>{rows}</table>'


class Charts:
    """A run's page as the output of a cell. document: the page."""

    def __init__(self, document: str) -> None:
        self.document = document

    def _repr_html_(self) -> str:
        style = f"width:100%;height:{_HEIGHT}px;border:0"
        return f'<iframe srcdoc="{escape(self.document)}" style="{style}" title="torchprobe"></iframe>'


class Shown:
    """What a session shows in a notebook; the session has `summary()`, `flush()` and `log_dir`."""

    log_dir: Any
    flush: Any
    summary: Any

    def show(self) -> Charts:
        """The charts of `torchprobe report --html` for what was recorded so far, inline as a cell's last value.

        Reads the run's files again, which takes about a second for 100,000 values. Raises ValueError for a session
        that writes to a writer of one's own, NoRunError before anything is written, ImportError without plotly.
        """
        from torchprobe.reports.run import NoRunError, read_run
        from torchprobe.reports.summary import summarise
        from torchprobe.reports.views import page

        if self.log_dir is None:
            raise ValueError(
                "show: this session writes to a writer of yours, or on another rank; takes one with log_dir"
            )
        self.flush(30.0)
        place = self.log_dir
        if isinstance(place, Path) and not any(place.glob("*tfevents*")):
            raise NoRunError(f"nothing is recorded in '{place}' yet: train some steps first")
        run = read_run(place)
        return Charts(page(run, summarise(run)))

    def _repr_html_(self) -> str:
        return str(self.summary()._repr_html_())
