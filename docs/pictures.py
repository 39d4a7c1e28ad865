"""Make the pictures of the report and of the Probe tab: `python docs/pictures.py`, from the repository's root.

Trains small models with planted illnesses, and takes pictures of what Chromium shows of them.
"""

from __future__ import annotations

import io
import os
import sys
import tempfile
from pathlib import Path

from PIL import Image

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from tests.reports.browsing import chromium, open_page, probe_tab, tensorboard
from tests.reports.recorded import record
from torchprobe.cli import main

DOCS = Path(__file__).parent


def make(folder: Path) -> None:
    os.chdir(folder)  # so that names are short
    runs = Path("runs")
    for name, illness in (("healthy", None), ("collapse", "collapse"), ("dead", "dead")):
        record(runs / name, illness, steps=120)
    main(["report", str(runs / "dead"), "--html", "dead.html"])
    with chromium() as browser:
        for name, dark in (("report.png", False), ("report_dark.png", True)):
            page = open_page(browser, (folder / "dead.html").as_uri(), width=1200, height=1000, dark=dark)
            page.locator(".tp-alert").first.click()
            page.wait_for_timeout(2000)
            keep(page, name)
        with tensorboard(folder / runs, extra=folder) as address:
            page = open_page(browser, address, width=1400, height=1000)
            view = probe_tab(page)
            view.locator("select[aria-label='run']").select_option("collapse")
            view.locator(".tp-run[data-run='collapse']").wait_for()
            view.locator(".tp-alert").first.click()
            view.locator("details[data-title='Attention entropy by layer, nats']").evaluate("e => e.scrollIntoView()")
            page.wait_for_timeout(3000)
            keep(page, "probe_tab.png")


def keep(page, name: str) -> None:
    """The page as a picture of 256 colours, and nothing else of it."""
    picture = Image.open(io.BytesIO(page.screenshot()))
    picture.convert("RGB").quantize(256).save(DOCS / name, optimize=True)
    page.close()


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as place:
        make(Path(place))
