"""What the README shows works, and what it promises is there."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import torchprobe

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)


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


def test_files_and_pictures_it_points_to_exist():
    for target in re.findall(r"\]\((?!http)([^)#]+)\)", README):
        assert (ROOT / target).exists(), target


def test_every_tag_group_of_the_defaults_is_in_its_table():
    from torchprobe.probes.choosing import default_probes

    groups = {group for probe in default_probes() for group in probe.descriptions}
    beside = {
        g for g in groups if g.endswith(("_nonfinite", "_zeros", "_histogram")) or g in ("momentum", "weight_decay")
    }
    shown = README.replace("`_", "`activation_") + README.replace("`_", "`attention_")
    assert [group for group in sorted(groups - beside) if f"{group}/" not in shown and f"{group}`" not in shown] == []
