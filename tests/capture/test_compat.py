"""A private name of torch is gone, as in a next release: an eager model is recorded as ever."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import torchprobe
from torchprobe.capture import compat

PACKAGE = Path(torchprobe.__file__).parent
BEFORE_CAPTURE = ("pictures", "probes", "records", "rules", "statistics", "testing", "writers", "buffer")
"""Parts that import nothing that looks names up: imported once, before the names are removed."""

_SCRIPT = '''
import gc, importlib, json, logging, os, pkgutil, sys, warnings
import torch, torch._dynamo.utils
from torch import nn

for name in sys.argv[1].split():
    importlib.import_module(name)
shared = [module for name, module in sys.modules.items() if name.startswith("torchprobe.")]
assert not [module for module in shared if module.__name__.startswith("torchprobe.capture")]

class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv = nn.Linear(4, 12)

    def forward(self, x):
        return nn.functional.scaled_dot_product_attention(*self.qkv(x).chunk(3, -1))

lines = []
torch.manual_seed(0)
model = nn.Sequential(nn.Linear(4, 4), Attention(), nn.Linear(4, 1))
weights = {name: value.clone() for name, value in model.state_dict().items()}

class Plain(torch.overrides.TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))

def train():
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(2):
        model(torch.randn(2, 3, 4)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

def remove(name):
    """Where torch needs the name itself, or will not let it go, only our look-up misses it."""
    where, _, inner = name.partition(":")
    outer, _, attribute = inner.rpartition(".")
    try:
        owner = pkgutil.resolve_name(f"{where}:{outer}" if outer else where)
        kept = owner.__dict__[attribute]
        if any(value is kept for module in shared for value in vars(module).values()):
            lines.append(f"{name} was taken at import")  # of what all share, which the removal comes too late for
        delattr(owner, attribute)
    except (ImportError, AttributeError, KeyError, TypeError):
        return hide(name)
    try:
        train()
        with Plain():
            train()
    except Exception:
        setattr(owner, attribute, kept)
        hide(name)

def hide(name):
    resolve = pkgutil.resolve_name
    def without(asked):
        if asked == name:
            raise AttributeError(name)
        return resolve(asked)
    pkgutil.resolve_name = without

class Keep(logging.Handler):
    def emit(self, record):
        lines.append(record.getMessage())

logging.getLogger("torchprobe").addHandler(Keep())

def watch():
    import torchprobe
    from torchprobe.testing import MemoryWriter
    writer = MemoryWriter()
    model.load_state_dict(weights)  # or an alert would depend on what the removal has trained
    torch.manual_seed(0)
    with torchprobe.instrument(model, writer=writer, every=1):
        train()
    return lines, writer.tags()

gc.freeze()
for name in sys.argv[2:]:
    if os.fork() == 0:
        if name != "nothing":
            remove(name)
        os.write(1, (json.dumps([name, *watch()]) + "\\n").encode())
        os._exit(0)
    os.wait()
'''


def before_capture() -> list[str]:
    files = (file for part in BEFORE_CAPTURE for file in PACKAGE.glob(f"{part}*/**/*.py"))
    names = [".".join(file.relative_to(PACKAGE.parent).with_suffix("").parts) for file in files]
    return [name for name in names if not name.endswith(("__init__", ".kernels"))]  # the latter need Triton


def seen() -> dict[str, tuple[list[str], list[str]]]:
    """What was logged and what was recorded without each name, each in a process of its own."""
    if not hasattr(os, "fork"):
        pytest.skip("needs fork")
    command = [sys.executable, "-c", _SCRIPT, " ".join(before_capture()), "nothing", *compat.NAMES]
    environment = os.environ | {"PYTHONDONTWRITEBYTECODE": ""}  # or each would compile torchprobe anew
    ran = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=800)
    assert ran.returncode == 0, ran.stderr
    found = {name: (lines, tags) for name, lines, tags in map(json.loads, ran.stdout.splitlines())}
    assert len(found) == len(compat.NAMES) + 1, ran.stderr
    return found


AT_THE_END = {
    *(
        "overview/grad_norm_unclipped",
        "overview/clipped_fraction",
        "performance/backward_seconds",
    ),  # of a backward pass
}


@pytest.mark.timeout(900)  # a minute of work, on a machine that may be busy
def test_an_eager_model_loses_nothing_with_any_private_name():
    found = seen()
    bare_lines, bare_tags = found.pop("nothing")
    assert set(bare_tags) >= AT_THE_END
    lost, told = {}, {}
    for name, (lines, tags) in found.items():
        kept = [tag for tag in bare_tags if tag not in AT_THE_END] if name.endswith("queue_callback") else bare_tags
        if tags != kept:
            lost[name] = set(kept) ^ set(tags)
        if len(lines) - len(bare_lines) > ("_dynamo" not in name):  # of Dynamo's names an eager model hears nothing
            told[name] = lines
    assert (lost, told) == ({}, {})


def test_what_is_lost_is_said_once(caplog):
    compat.lost("something is off in a test")
    compat.lost("something is off in a test")
    assert caplog.text.count("something is off in a test") == 1
