"""The page and the Probe tab in Chromium: what is shown is what was written, and clicks go where they say."""

from __future__ import annotations

import numpy as np
import pytest

from tests.reports.browsing import CHROMIUM, chromium, open_page, probe_tab, tensorboard
from torchprobe.cli import main
from torchprobe.records import Image, Record, Text
from torchprobe.writers.event_file import EventFileWriter

pytest.importorskip("playwright.sync_api", reason="playwright, which drives the browser, is not installed")
pytestmark = [pytest.mark.browser, pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on PATH")]

LAYERS, HEADS, STEPS, ILL = 6, 4, 30, 20
MODULES = [f"blocks.{i}.attention" for i in range(LAYERS)]
NASTY = "<img src=x onerror=alert(1)>"  # a layer may be called anything
ALERT = (
    f"- attention\\_collapse, step {ILL} at {MODULES[3]}: a head looks at one key (value 0.01, threshold 0.1)\n"
    "    - It says little. Try less (Paper 2020)."
)


def heads(step: int) -> np.ndarray:
    return np.random.default_rng(step).random((LAYERS, HEADS)).astype(np.float32)


def gradient(step: int, layer: int) -> float:
    return 0.0 if step >= ILL and layer == 3 else 10.0 ** -(layer + step / STEPS)


def values(step: int) -> dict:
    found = {
        "overview/loss": float("nan") if step == 25 else 1.0 / step,
        "train/loss": 2.0 / step,
        f"overview/{NASTY}": float(step),
        "attention_heads/entropy": heads(step),
        "attention_heads/sink": heads(step) / 2,
        "calibration_reliability/predictions": Image(np.full((40, 40, 3), step, np.uint8)),
    }
    for layer, name in enumerate(MODULES):
        found[f"grad_norm_layer/{name}"] = gradient(step, layer)
        found[f"attention_entropy/{name}"] = float(heads(step)[layer].mean())
    if step == ILL:
        found |= {"alerts": Text(ALERT), "alerts/attention_collapse": 1.0}
    return found


def write(folder, steps=range(1, STEPS + 1)):
    writer = EventFileWriter(folder)
    for step in steps:
        writer.write([Record(step, 1000.0 + step, values(step))])
    return writer


@pytest.fixture(scope="module")
def browser():
    with chromium() as opened:
        yield opened


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    for name in ("first", "second"):
        write(folder / name).close()
    return folder


@pytest.fixture
def report(browser, runs, tmp_path):
    assert main(["report", str(runs / "first"), "--html", str(tmp_path / "run.html")]) == 0
    page = open_page(browser, (tmp_path / "run.html").as_uri())
    page.wait_for_selector(".tp-verdict")
    yield page
    assert page.wrong == []
    page.close()


def chart(view, title: str) -> dict:
    """What a chart shows, once it is in sight: Plotly's own data."""
    element = view.locator(f".tp-chart[data-title='{title}']")
    element.scroll_into_view_if_needed()
    element.locator(".plot-container").wait_for(timeout=30_000)
    return element.evaluate("e => ({data: e.data})")


def mark(view, title: str, name: str) -> dict:
    """What stands over a chart: its data, and where it is as a share of the width of the plot."""
    element = view.locator(f".tp-chart[data-title='{title}'] > .{name}")
    element.wait_for(state="visible")
    where = """e => { const a = e.parentElement.querySelector('.nsewdrag').getBoundingClientRect();
                      return {...e.dataset, share: (e.getBoundingClientRect().left - a.left) / a.width}; }"""
    return element.evaluate(where)


def shown_heads(view, step: int) -> np.ndarray:
    element = view.locator(".tp-chart[data-kind='heads']")
    element.scroll_into_view_if_needed()
    view.locator(f".tp-chart[data-kind='heads'][data-step='{step}'] .plot-container").wait_for(timeout=30_000)
    view.wait_for_timeout(150)
    return np.array(element.evaluate("e => e.data[0].z.map(row => Array.from(row))"), np.float32)


def move_to(view, place: int) -> None:
    view.locator(".tp-step").evaluate("(e, v) => { e.value = v; e.dispatchEvent(new Event('input')); }", place)


def what_a_view_must_do(view) -> None:
    """Of the page and of the tab alike."""
    assert "Not healthy. Look at this:" in view.locator(".tp-verdict").inner_text()
    assert "Try less (Paper 2020)." in view.locator(".tp-verdict").inner_text()
    loss = chart(view, "overview/loss")
    written = [1.0 / step if step != 25 else None for step in range(1, STEPS + 1)]
    assert loss["data"][0]["y"] == [None if y is None else pytest.approx(y, rel=1e-6) for y in written]
    assert next(trace["x"] for trace in loss["data"] if trace["name"] == "NaN or inf") == [25]
    assert next(trace["x"] for trace in loss["data"] if trace["name"] == "alerts") == [ILL]
    heat = chart(view, "Gradient norm by layer")["data"]
    assert np.allclose(heat[0]["z"][1], [np.log10(gradient(step, 1)) for step in range(1, STEPS + 1)], atol=1e-5)
    zeros = [step for step, zero in zip(heat[1]["x"], heat[1]["z"][3], strict=True) if zero]
    assert zeros == list(range(ILL, STEPS + 1))
    assert np.array_equal(shown_heads(view, STEPS), heads(STEPS))
    move_to(view, 4)
    assert view.locator(".tp-step-shown").inner_text() == f"step 5 of {STEPS}"
    assert np.array_equal(shown_heads(view, 5), heads(5))
    view.locator(".tp-statistic").select_option(label="sink")
    view.wait_for_timeout(300)
    assert np.array_equal(shown_heads(view, 5), heads(5) / 2)
    view.locator(".tp-alert").click()
    assert view.locator(".tp-step-shown").inner_text() == f"step {ILL} of {STEPS}"
    assert view.locator(".tp-layer").input_value() == MODULES[3]
    assert np.array_equal(shown_heads(view, ILL), heads(ILL) / 2)
    view.locator(f".tp-picture[data-step='{nearest_picture(ILL)}']").wait_for()
    chart(view, "train/loss")
    assert mark(view, "train/loss", "tp-cursor")["step"] == str(ILL)
    chart(view, "Gradient norm by layer")
    assert mark(view, "Gradient norm by layer", "tp-row")["row"] == "3"
    place = mark(view, "Gradient norm by layer", "tp-cursor")
    assert place["share"] == pytest.approx((ILL - 0.5) / STEPS, abs=0.01)  # cells are a step wide
    assert view.locator("img[src='x']").count() == 0  # nobody's name is markup


def nearest_picture(step: int) -> int:
    kept = sorted({round(place) + 1 for place in np.linspace(0, STEPS - 1, 12)})
    return max(one for one in kept if one <= step)


def test_the_page_shows_what_was_written_and_asks_for_nothing(report):
    what_a_view_must_do(report)
    assert {address.partition(":")[0] for address in report.asked} <= {"file", "data", "blob"}


def test_log_axes_and_smoothing(report):
    before = chart(report, "train/loss")["data"]
    report.locator(".tp-log").check()
    report.locator(".tp-smooth").evaluate("e => { e.value = 0.9; e.dispatchEvent(new Event('input')); }")
    report.wait_for_timeout(500)
    element = report.locator(".tp-chart[data-title='train/loss']")
    assert element.evaluate("e => e.layout.yaxis.type") == "log"
    smooth = element.evaluate("e => e.data[1].y")
    assert smooth[0] == pytest.approx(before[0]["y"][0])
    assert smooth[-1] > before[0]["y"][-1]  # it falls, and the average lags behind


@pytest.mark.parametrize("width", [390, 1280])
def test_nothing_is_wider_than_the_window(browser, runs, tmp_path, width):
    assert main(["report", str(runs / "first"), "--html", str(tmp_path / "run.html")]) == 0
    page = open_page(browser, (tmp_path / "run.html").as_uri(), width=width)
    page.wait_for_selector(".tp-verdict")
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    page.close()


@pytest.mark.parametrize("options", [["--load_fast=false"], ["--load_fast=true", "--path_prefix=/a/b"]])
def test_the_tab_shows_what_was_written(browser, runs, tmp_path, options):
    with tensorboard(runs, *options, extra=tmp_path) as address:
        page = open_page(browser, address)
        view = probe_tab(page)
        view.locator("select[aria-label='run']").select_option("first")
        view.locator(".tp-run[data-run='first']").wait_for()
        what_a_view_must_do(view)
        view.locator("select[aria-label='second run']").select_option("second")
        view.locator(".tp-run[data-run='second']").wait_for()
        assert [one.get_attribute("data-run") for one in view.locator(".tp-run").all()] == ["first", "second"]
        assert page.wrong == []
        page.close()


def test_the_tab_keeps_up_with_a_run(browser, tmp_path):
    writer = write(tmp_path / "runs" / "live", range(1, 11))
    with tensorboard(tmp_path / "runs", extra=tmp_path / "site") as address:
        page = open_page(browser, address)
        view = probe_tab(page)
        assert view.locator(".tp-step-shown").inner_text() == "step 10 of 10"
        for step in range(11, 14):
            writer.write([Record(step, 1000.0 + step, values(step))])
        writer.close()
        view.locator(".tp-step-shown", has_text="step 13 of 13").wait_for(timeout=30_000)
        assert np.array_equal(shown_heads(view, 13), heads(13))
        assert page.wrong == []
        page.close()
