"""Every block of code in the documentation runs, in order, and the site builds without a warning."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from torchprobe.cli import main

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "docs" / "index.md", *sorted((ROOT / "docs" / "guides").glob("*.md"))]
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```", re.DOTALL | re.MULTILINE)
NOT_RUN = ("pip install", "torchprobe demo", "torchprobe report runs/demo")  # README's own tests have the demo


@pytest.mark.parametrize("file", PAGES, ids=lambda file: file.stem)
def test_every_block_of_a_page_runs(file, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names: dict = {"__name__": "__main__"}
    blocks = BLOCK.findall(file.read_text(encoding="utf-8"))
    assert blocks
    for language, text in blocks:
        assert language in ("python", "sh")
        if language == "python":
            exec(compile(text, file.name, "exec"), names)
        else:
            for line in filter(None, text.splitlines()):
                if not line.startswith(NOT_RUN):
                    assert line.startswith("torchprobe ")
                    assert main(shlex.split(line)[1:]) == 0, line


@pytest.mark.skipif(find_spec("mkdocs") is None, reason="mkdocs is not installed: pip install torchprobe[docs]")
def test_the_site_builds_strictly(tmp_path):
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path / "site")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stderr
    reference = (tmp_path / "site" / "reference" / "index.html").read_text(encoding="utf-8")
    assert "overhead_budget" in reference
    assert len(list((tmp_path / "site" / "guides").iterdir())) == len(PAGES) - 1
