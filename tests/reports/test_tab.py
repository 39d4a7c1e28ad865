"""The Probe tab's side in TensorBoard: what its routes serve, and that no fault of it reaches TensorBoard."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from base64 import b64decode
from types import SimpleNamespace

import numpy as np
import pytest
from werkzeug.test import Client

from tests.reports.conftest import write_run
from torchprobe.cli.view import _plugins
from torchprobe.records import Record
from torchprobe.reports.tab import ProbeLoader
from torchprobe.reports.tab import plugin as plugin_module
from torchprobe.reports.tab.plugin import Runs
from torchprobe.reports.views import MissingChartsError
from torchprobe.writers.event_file import EventFileWriter


@pytest.fixture
def folder(tmp_path):
    write_run(tmp_path / "runs" / "a", {"overview/loss": [2.0, 1.0]})
    write_run(tmp_path / "runs" / "b" / "run_2", {"overview/loss": [3.0]})
    return tmp_path / "runs"


def served(folder, path: str, spec: str = "", **asked):
    context = SimpleNamespace(logdir=str(folder), flags=SimpleNamespace(logdir_spec=spec))
    apps = ProbeLoader().load(context).get_plugin_apps()
    return Client(apps[path]).get(path, query_string=asked)


def test_runs_have_the_names_of_the_other_pages(folder):
    found = json.loads(served(folder, "/runs").data)
    assert {run["run"] for run in found["runs"]} == {"a", "b/run_2"}
    assert {run["run"] for run in json.loads(served(folder / "a", "/runs").data)["runs"]} == {"."}
    spec = f"one:{folder}/a,two:{folder}/b"
    assert {run["run"] for run in json.loads(served("", "/runs", spec).data)["runs"]} == {"one", "two/run_2"}


def test_a_store_is_named_as_not_read():
    found = json.loads(served("s3://bucket/runs", "/runs").data)
    assert found == {"runs": [], "remote": ["s3://bucket/runs"]}


def test_what_is_shown_grows_with_the_run(tmp_path):
    writer, runs = EventFileWriter(tmp_path / "a"), Runs(str(tmp_path))
    writer.write([Record(1, 1.0, {"overview/loss": 2.0})])
    versions = [runs.listed()[0]["version"]]
    assert json.loads(runs.views("a"))["steps"] == 1
    writer.write([Record(2, 2.0, {"overview/loss": 1.0})])
    writer.close()
    versions.append(runs.listed()[0]["version"])
    assert versions[1] > versions[0]
    assert json.loads(runs.views("a"))["steps"] == 2


def test_heads_are_sent_a_step_at_a_time(tmp_path):
    heads = np.arange(6, dtype=np.float32).reshape(2, 3)
    writer = EventFileWriter(tmp_path / "a")
    writer.write([Record(step, 1.0, {"attention_heads/sink": heads * step}) for step in (1, 2)])
    writer.close()
    [view] = json.loads(served(tmp_path, "/views", run="a").data)["heads"]
    assert (view["title"], view["shape"], view["values"], view["range"]) == ("sink", [2, 2, 3], None, [0.0, 10.0])
    sent = served(tmp_path, "/heads", run="a", statistic="sink", step=2).data
    assert np.frombuffer(b64decode(sent), "<f4").tolist() == (heads * 2).ravel().tolist()


@pytest.mark.parametrize(
    ("path", "asked", "code"),
    [
        ("/views", {"run": "../../etc"}, 404),
        ("/views", {}, 404),
        ("/heads", {"run": "a", "statistic": "no", "step": 1}, 404),
        ("/heads", {"run": "a", "statistic": "no", "step": "x"}, 404),
    ],
)
def test_what_is_not_there_is_said(folder, path, asked, code):
    assert served(folder, path, **asked).status_code == code


def test_a_fault_in_a_route_is_an_answer(folder, monkeypatch, caplog):
    def broken(*_):
        raise RuntimeError("no")

    monkeypatch.setattr(plugin_module.Runs, "views", broken)
    response = served(folder, "/views", run="a")
    assert (response.status_code, response.data) == (500, b"RuntimeError: no")
    assert "/views failed" in caplog.text


def test_without_the_charts_library_the_tab_says_what_to_install(folder, monkeypatch):
    def missing():
        raise MissingChartsError("Run: pip install plotly")

    monkeypatch.setattr(plugin_module, "plotly_file", missing)
    response = served(folder, "/plotly.js")
    assert (response.status_code, response.data) == (501, b"Run: pip install plotly")


@pytest.mark.parametrize("fault", ["import", "make"])
def test_a_fault_costs_the_tab_and_not_tensorboard(fault, monkeypatch, caplog):
    def broken(*_):
        raise RuntimeError("no")

    if fault == "import":
        monkeypatch.setitem(sys.modules, "torchprobe.reports.tab.plugin", None)
    else:
        monkeypatch.setattr(plugin_module.ProbePlugin, "__init__", broken)
    with caplog.at_level(logging.WARNING):
        assert ProbeLoader().load(SimpleNamespace(logdir="", flags=None)) is None
    assert "Probe tab cannot be shown" in caplog.text


def test_a_fault_while_runs_are_listed_makes_the_tab_inactive(folder, monkeypatch, caplog):
    def broken(*_):
        raise OSError("no")

    plugin = ProbeLoader().load(SimpleNamespace(logdir=str(folder), flags=SimpleNamespace(logdir_spec="")))
    assert plugin.is_active()
    monkeypatch.setattr(plugin_module.Runs, "folders", broken)
    assert not plugin.is_active()
    assert "cannot be listed" in caplog.text


def test_importing_the_entry_point_brings_no_torch():
    check = "import sys, torchprobe.reports.tab; print({'torch', 'numpy', 'plotly'} & set(sys.modules))"
    said = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=True)
    assert said.stdout.strip() == "set()"


@pytest.mark.filterwarnings("ignore:html5lib's sanitizer")  # as TensorBoard starts
def test_view_has_the_tab_once(monkeypatch):
    from tensorboard import default
    from tensorboard.backend import application

    assert [found for found in _plugins() if found is ProbeLoader] == [ProbeLoader]
    monkeypatch.setattr(default, "get_plugins", lambda: [ProbeLoader])
    assert _plugins() == [ProbeLoader]
    assert isinstance(application.make_plugin_loader(ProbeLoader), ProbeLoader)
