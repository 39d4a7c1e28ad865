"""Every test leaves the process as it found it: no hook, no thread, no attribute, no session."""

from __future__ import annotations

import copy
import gc
import importlib
import os
import sys
import threading
from contextlib import contextmanager

import pytest
import torch
from torch import nn
from torch.nn.modules import module as nn_module
from torch.optim import optimizer as optim

from tests.device import backend
from tests.s3 import s3  # noqa: F401 - a fixture
from torchprobe import session as session_module
from torchprobe.capture.module_hooks import MARKS, ROOT_KEY
from torchprobe.capture.predictions.hooks import KINDS
from torchprobe.capture.sites import SITE

HELPERS = ("tests.setups.losses",)
"""Modules with loss modules of their own, which test files import as modules."""

# One thread a process, children included: workers side by side would wait for each other's at every operation.
os.environ.setdefault("OMP_NUM_THREADS", "1")
torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
# For the same reason; more would be processes, each of which imports torch.
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")

if torch.cuda.is_available():
    backend.MISSING = "autograd takes one accelerator beside the CPU, and there is a real one"
else:
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before Triton is imported: its own functions look then
if not backend.MISSING:
    backend.set_up()  # before the first backward pass of the process, at which autograd counts the devices there are

importlib.import_module("torch._dynamo.utils")  # as every worker does in the end, since it collects tests that do


def pytest_collection_finish():
    """Sessions look for optimizers and loss modules among all objects, as the collector does: not among these 650,000.

    Nor does a session find one that a test file made as it was imported: `made_anew`, or make it in the test.
    """
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def nothing_is_left_behind():
    before = _left_behind()
    yield
    if _left_behind() != before:
        gc.collect()
    assert _left_behind() == before


@pytest.fixture(autouse=True)
def no_graphs_of_other_tests():
    """Dynamo keeps graphs by code, so that those of one test would serve, and be looked at by, the next."""
    compiler = sys.modules.get("torch._dynamo.convert_frame")
    if compiler is not None and compiler.input_codes.seen:
        torch._dynamo.reset()
        if len(gc.get_objects()) > 50_000:  # of the compiler, which imports as it goes
            pytest_collection_finish()


@pytest.fixture(autouse=True)
def made_anew(request, monkeypatch):
    """What loss modules a test file has as globals, or in a table: those that it was imported with are frozen."""
    names = vars(request.module)
    tables = [table for table in names.values() if type(table) is dict]
    helpers = [vars(helper) for helper in names.values() if getattr(helper, "__name__", None) in HELPERS]
    copies = {}
    for table in (names, *tables, *helpers):
        for name, value in [*table.items()]:
            if issubclass(type(value), KINDS):
                monkeypatch.setitem(table, name, copies.setdefault(id(value), copy.deepcopy(value)))


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture
def traces():
    """What torchprobe has put on a model: hooks and state, by module name."""
    return traces_on


@pytest.fixture
def full_disk():
    """While entered, no file of this process grows beyond `limit` bytes: a write fails half-way."""
    resource = pytest.importorskip("resource")

    @contextmanager
    def limited(limit):
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    return limited


def traces_on(model: nn.Module) -> list[str]:
    found = []
    for name, module in model.named_modules():
        hooks = [*module._forward_hooks.values(), *module._forward_pre_hooks.values(), *module._backward_hooks.values()]
        found += [f"{name}: {hook}" for hook in hooks if "torchprobe" in getattr(hook, "__module__", "")]
        found += [f"{name}.{key}" for key in (SITE, ROOT_KEY, MARKS) if key in module.__dict__]
    found += [name for name, p in model.named_parameters() if p._post_accumulate_grad_hooks or p._backward_hooks]
    return found


def _left_behind() -> dict[str, int]:
    registries = (
        nn_module._global_forward_hooks,
        nn_module._global_forward_pre_hooks,
        nn_module._global_backward_hooks,
        getattr(nn_module, "_global_forward_hooks_with_kwargs", {}),
    )
    steps = (optim._global_optimizer_pre_hooks, optim._global_optimizer_post_hooks)
    return {
        "process-wide hooks": sum(map(len, registries + steps)),
        "threads": sum(thread.name.startswith("torchprobe") for thread in threading.enumerate()),
        "sessions": len(session_module._sessions),
    }
