"""TensorBoard's first page with the overview on top: its cards are pinned, unless the address says something else."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from typing import Any
from urllib.parse import quote

# The page takes up to ten pins, by hand or from its address; those of tags that a run lacks are not shown.
PINNED = (
    "overview/loss",
    "overview/update_ratio",
    "overview/attention_entropy_min",
    "val/overview/epistemic",
    "val/overview/ece",
    "overview/grad_norm",
    "overview/epistemic",
    "overview/alerts",
)

App = Callable[[Any, Any], Iterable[bytes]]


def with_overview(app: App) -> App:
    """TensorBoard's WSGI application, whose bare address leads to the address with the pins."""
    cards = json.dumps([{"plugin": "scalars", "tag": tag} for tag in PINNED], separators=(",", ":"))
    address = f"?pinnedCards={quote(cards)}"

    def serve(environ: Any, start_response: Any) -> Iterable[bytes]:
        if environ.get("PATH_INFO", "/") in ("", "/") and not environ.get("QUERY_STRING"):
            start_response("302 Found", [("Location", address), ("Content-Length", "0")])
            return [b""]
        return app(environ, start_response)

    return serve
