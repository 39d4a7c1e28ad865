"""A real Chromium and a real TensorBoard, for the tests of what they show and for the pictures in the docs."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import entry_points
from pathlib import Path

ROOT = Path(__file__).parents[2]
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")


@contextmanager
def chromium() -> Iterator:
    """A browser, driven by playwright, which must be installed."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@contextmanager
def tensorboard(logdir: Path, *options: str, extra: Path) -> Iterator[str]:
    """The address of a TensorBoard that has the tab's entry point, also where the package is not installed anew.

    extra: a folder in which the entry point may be put.
    """
    if not any(found.name == "torchprobe" for found in entry_points(group="tensorboard_plugins")):
        install_entry_point(extra)
    extra.mkdir(exist_ok=True)
    path = os.pathsep.join([str(ROOT), str(extra)])
    command = [sys.executable, "-m", "tensorboard.main", "--logdir", str(logdir), "--port", "0", *options]
    environment = {**os.environ, "PYTHONPATH": path}
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment, cwd=extra) as process:
        try:
            said = []
            for line in process.stderr:
                said.append(line)
                if found := re.search(r" at (http://\S+)", line):
                    break
            else:
                raise RuntimeError("".join(said))
            yield found[1]
        finally:
            process.terminate()
            process.stderr.read()


def install_entry_point(folder: Path) -> None:
    """What an installer writes, from pyproject.toml."""
    text = (ROOT / "pyproject.toml").read_text()
    section = re.search(r"\[project\.entry-points\.tensorboard_plugins\]\n(.*?)\n\n", text, re.DOTALL)
    place = folder / "probe_tab-0.dist-info"
    place.mkdir(parents=True)
    (place / "METADATA").write_text("Metadata-Version: 2.1\nName: probe-tab\nVersion: 0\n")
    (place / "entry_points.txt").write_text(f"[tensorboard_plugins]\n{section[1].replace(chr(34), '')}\n")


def open_page(browser, address: str, *, width: int = 1280, height: int = 900, dark: bool = False):
    """A page, with everything in `page.wrong` that its console calls an error and in `page.asked` what it fetched."""
    page = browser.new_page(viewport={"width": width, "height": height}, color_scheme="dark" if dark else "light")
    page.wrong, page.asked = [], []
    page.on("console", lambda message: page.wrong.append(message.text) if is_ours(message) else None)
    page.on("pageerror", lambda error: page.wrong.append(str(error)))
    page.on("request", lambda request: page.asked.append(request.url))
    page.goto(address)
    return page


def is_ours(message) -> bool:
    """TensorBoard's own fonts are not found below a path prefix."""
    return message.type == "error" and "font-roboto" not in message.location.get("url", "")


def probe_tab(page):
    """The tab's frame, once it shows a run."""
    page.get_by_role("tab", name="Probe").click()
    page.wait_for_function("[...document.querySelectorAll('iframe')].some(f => f.src.includes('name=torchprobe'))")
    frame = next(frame for frame in page.frames if "name=torchprobe" in frame.url)
    frame.wait_for_selector(".tp-verdict", timeout=60_000)
    return frame
