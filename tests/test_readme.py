"""What the README shows works, and what it promises is there."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import torchprobe
from benchmarks import tables
from torchprobe.testing import MemoryWriter

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
CONTRIBUTING = (ROOT / "CONTRIBUTING.md").read_text()


def python_blocks(text: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)


BLOCKS = python_blocks(README)


def test_the_first_example_runs_as_it_is(tmp_path):
    result = subprocess.run(
        [sys.executable, "-c", BLOCKS[0]], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    assert list((tmp_path / "runs" / "exp1").glob("events.out.tfevents.*"))


def test_the_options_shown_are_accepted(tmp_path):
    from torch import nn

    class Blocks(nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks = nn.ModuleList([nn.ModuleDict({"fc": nn.Linear(2, 2), "dropout": nn.Dropout()})])

        def forward(self, x):
            return self.blocks[0]["dropout"](self.blocks[0]["fc"](x))

    model = Blocks()
    code = BLOCKS[1].replace('"runs"', repr(str(tmp_path)))
    exec(compile(code, "README.md", "exec"), {"torchprobe": torchprobe, "model": model})
    assert torchprobe.session_of(model).detach()


@pytest.mark.parametrize("file", ["README.md", "CONTRIBUTING.md", *(f"docs/{f.name}" for f in ROOT.glob("docs/*.md"))])
def test_files_and_pictures_it_points_to_exist(file):
    for target in re.findall(r"\]\((?!http)([^)#]+)\)", (ROOT / file).read_text()):
        assert (ROOT / file).parent.joinpath(target).exists(), target


def test_every_tag_group_of_the_defaults_is_in_its_table():
    from torchprobe.probes.choosing import default_probes

    groups = {group for probe in default_probes() for group in probe.descriptions}
    beside = {
        g for g in groups if g.endswith(("_nonfinite", "_zeros", "_histogram")) or g in ("momentum", "weight_decay")
    }
    shown = README.replace("`_", "`activation_") + README.replace("`_", "`attention_")
    assert [group for group in sorted(groups - beside) if f"{group}/" not in shown and f"{group}`" not in shown] == []


def test_a_new_probe_is_one_file_and_one_export(tmp_path, monkeypatch):
    """As CONTRIBUTING.md has it; the file stands in a folder of its own here, which `torchprobe.probes` looks into."""
    from torchprobe import probes

    file, code = re.search(r"`torchprobe/probes/(\w+\.py)`:\n\n```python\n(.*?)```", CONTRIBUTING, re.DOTALL).groups()
    (tmp_path / file).write_text(code)
    monkeypatch.setattr(probes, "__path__", [*probes.__path__, str(tmp_path)])
    home, name = re.search(r'`"(probes\.\w+)": "(\w+)",` in `_NAMES`', CONTRIBUTING).groups()
    monkeypatch.setitem(torchprobe._HOMES, name, home)
    monkeypatch.delitem(sys.modules, f"torchprobe.{home}", raising=False)
    try:
        model, records = trained([getattr(torchprobe, name)(every=1, select="0.weight")])
    finally:
        vars(torchprobe).pop(name, None)
        sys.modules.pop(f"torchprobe.{home}", None)
    assert list(records[-1].values) == ["weight_max/0.weight"]
    assert records[-1].values["weight_max/0.weight"] == pytest.approx(model[0].weight.abs().max().item())


def test_a_source_of_ones_own_feeds_a_probe(monkeypatch):
    from torchprobe.capture import source
    from torchprobe.probes import checks

    monkeypatch.setattr(source, "_makers", {})
    monkeypatch.setattr(checks, "_registered", {})
    code = next(block for block in python_blocks(CONTRIBUTING) if "register_source" in block)
    space: dict[str, Any] = {}
    exec(compile(code, "CONTRIBUTING.md", "exec"), space)
    _, records = trained([space["InputPower"](every=1)], micro_batches=(2, 6))
    of_all = (2 * 1.0 + 6 * 4.0) / 8  # the first batch is of ones, the second of twos
    assert records[-1].values["input_power/input"] == pytest.approx(of_all)


def trained(probes, micro_batches=(4,)):
    """A model after a step, and the records of it that these probes wrote."""
    model, writer = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.Linear(2, 1)), MemoryWriter()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with torchprobe.instrument(model, writer=writer, probes=probes, rules=[]) as session:
        for i, size in enumerate(micro_batches, start=1):
            model(torch.full((size, 3), float(i))).sum().backward()
        optimizer.step()
        assert session.flush()
        return model, list(writer.records)


@pytest.mark.parametrize("page", tables.PAGES, ids=lambda page: page.stem)
def test_the_table_of_peers_is_made_of_what_was_measured(page):
    text, results = page.read_text(), json.loads(tables.RESULTS.read_text())
    assert tables.put(text, results, tables.PAGES[page]) == text
    assert {one["ratio"] > 0 and one["blocks"] > 1 for one in results["measurements"]} == {True}


def test_a_later_measurement_replaces_an_earlier_one_of_the_same():
    one = {"recipe": "r", "peer": "p", "ratio": 1.25, "error": 0.5, "bare_ms": 2.0, "added_ms": 0.5, "blocks": 4}
    before = {"machine": "n", "measurements": [one, {**one, "peer": "q"}]}
    both = tables.merged(before, {"machine": "m", "date": "d", "measurements": [{**one, "ratio": 3.0}]})
    assert [(m["peer"], m["ratio"]) for m in both["measurements"]] == [("p", 3.0), ("q", 1.25)]
    assert tables.table(both).splitlines()[2:] == ["| p | 3.00 ± 0.50 |", "| q | 1.25 ± 0.50 † |"]
    assert tables.put(f"{tables.BEGIN}{tables.END}", both).splitlines()[-3] == "Measured on m, d. † n."


def test_compiled_models_have_a_table_of_their_own():
    one = {"recipe": "r", "peer": "p", "ratio": 1.25, "error": 0.5, "bare_ms": 2.0, "clock": "cpu"}
    both = {"measurements": [one, {**one, "recipe": "r, compiled", "ratio": 1.5, "clock": "wall"}]}
    assert tables.table(both).splitlines()[0] == "| at every step | r (2.0 ms of CPU time) |"
    assert tables.table(both, compiled=True).splitlines()[::2] == [
        "| at every step | r, compiled (2.0 ms) |",
        "| p | 1.50 ± 0.50 |",
    ]
