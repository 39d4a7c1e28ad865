"""A run as one HTML file that needs nothing else: the views that the Probe tab shows, with Plotly inside."""

from __future__ import annotations

import json
from collections.abc import Mapping
from html import escape
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from torchprobe.reports.run import Run
from torchprobe.reports.views import views_of

WEB = Path(__file__).parent / "web"
SCRIPTS = ("charts.js", "views.js")  # in this order


class MissingChartsError(ImportError):
    """The charts' library is not installed; the message says how to install it."""


def plotly_file() -> Path:
    """Plotly's script, which its Python package brings. Raises MissingChartsError where that is missing."""
    found = find_spec("plotly")  # which need not be imported for it
    file = Path(found.origin).parent / "package_data" / "plotly.min.js" if found and found.origin else None
    if file is None or not file.is_file():
        raise MissingChartsError("charts are drawn by plotly, which is not installed. Run: pip install plotly")
    return file


def page(run: Run, summary: Mapping[str, Any]) -> str:
    """The whole document, views by themselves. Raises MissingChartsError.

    Names in them are put on the page as text by the script, and cannot end its element here.
    """
    views = views_of(run, summary)
    data = json.dumps(views, allow_nan=False).replace("<", "\\u003c")
    ours = "\n".join((WEB / name).read_text(encoding="utf-8") for name in SCRIPTS)
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>torchprobe: {escape(views['name'])}</title>"
        f"<style>{(WEB / 'views.css').read_text(encoding='utf-8')}</style></head>\n"
        f"<body><main id='views'></main><noscript><p>{escape(views['headline'])}</p></noscript>\n"
        f"<script>{plotly_file().read_text(encoding='utf-8')}</script>\n"
        f'<script type="application/json" id="data">{data}</script>\n'
        f"<script>{ours}\n"
        "torchprobe.show(document.getElementById('views'), [JSON.parse(document.getElementById('data').textContent)]);"
        "</script></body></html>\n"
    )
