"""In a notebook: what a session looks like, and cells that run again."""

from __future__ import annotations

import logging
import sys
from html import unescape
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import torchprobe
from torchprobe.reports.run import NoRunError
from torchprobe.testing import MemoryWriter


@pytest.fixture
def notebook(monkeypatch):
    monkeypatch.setitem(sys.modules, "IPython", SimpleNamespace(get_ipython=lambda: object()))


def train(model, steps=3):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.ones(2, 4)).sum().backward()
        optimizer.step()


def test_a_session_and_its_summary_are_tables_with_nothing_of_a_name_as_markup(tmp_path):
    with torchprobe.instrument(nn.Linear(4, 1), log_dir=tmp_path / "<b>run") as session:
        summary = session.summary()
        table = session._repr_html_()
    assert isinstance(summary, str)
    assert table == summary._repr_html_()
    assert "<th>skipped steps</th><td>0</td>" in table
    assert "<b>run" not in table
    assert unescape(table).count("<b>run") == 1


def test_a_cell_that_runs_again_replaces_the_session_with_one_line(tmp_path, notebook, caplog):
    model = nn.Linear(4, 1)
    first = torchprobe.instrument(model, log_dir=tmp_path)
    train(model)
    with caplog.at_level(logging.WARNING):
        second = torchprobe.instrument(model, log_dir=tmp_path)
    assert (first.attached, second.attached) == (False, True)
    assert [record.getMessage() for record in caplog.records] == [
        f"this model's session (step 3, {tmp_path}) is ended for a new one"
    ]
    train(model, 2)
    assert second.step == 2
    assert second.detach()
    assert second.log_dir == tmp_path / "run_2"


@pytest.mark.parametrize("shell", [None, "no shell"])
def test_elsewhere_a_second_session_is_an_error(tmp_path, monkeypatch, shell):
    if shell:  # imported by another library, and not running
        monkeypatch.setitem(sys.modules, "IPython", SimpleNamespace(get_ipython=lambda: None))
    model = nn.Linear(4, 1)
    with (
        torchprobe.instrument(model, writer=MemoryWriter()),
        pytest.raises(ValueError, match="already instrumented"),
    ):
        torchprobe.instrument(model, writer=MemoryWriter())


def test_the_charts_of_a_run_that_trains_are_shown_inline(tmp_path):
    model = nn.Linear(4, 1)
    with torchprobe.instrument(model, log_dir=tmp_path) as session:
        with pytest.raises(NoRunError, match="train some steps first"):
            session.show()
        train(model)
        shown = session.show()._repr_html_()
    assert shown.startswith("<iframe")
    assert shown.count("<") == 2  # the page is an attribute
    assert "overview/loss" in unescape(shown)


def test_a_writer_of_ones_own_has_no_charts():
    with (
        torchprobe.instrument(nn.Linear(4, 1), writer=MemoryWriter()) as session,
        pytest.raises(ValueError, match="a writer of yours"),
    ):
        session.show()


def test_ipython_shows_what_is_said_here(tmp_path):
    shells = pytest.importorskip("IPython.core.interactiveshell", reason="IPython is not installed")
    shell = shells.InteractiveShell()
    formatter = shell.display_formatter.formatters["text/html"]
    with torchprobe.instrument(nn.Linear(4, 1), log_dir=tmp_path) as session:
        assert formatter(session) == session._repr_html_()
        assert formatter(session.summary()).startswith("<table")
