"""The Custom Scalars page of a run."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tensorboard.plugins.custom_scalar import layout_pb2
from tensorboard.util.tensor_util import make_ndarray

import torchprobe
from tests.models import Transformer, inputs
from torchprobe.records import Layout, Lines, Margin, Record, Text
from torchprobe.testing import MemoryWriter
from torchprobe.writers.event_file import EventFileWriter, serialized
from torchprobe.writers.layout import (
    _CATEGORIES,
    BANDED,
    CHARTED,
    LAYOUT_TAG,
    LayoutWriter,
    band_tags,
    banded_in,
    bands,
    layout_of,
)


def bands_of(values) -> dict[str, float]:
    return dict(bands(Record(1, 0.0, values), banded_in(values)))


OVERVIEW = (
    "grad_norm", "update_ratio", "attention_entropy_min", "attention_max_logit", "epistemic", "aleatoric", "ece",
    "loss", "alerts", "skipped_steps", "dropped_records", "probe_overhead",
)  # fmt: skip
CALIBRATION = ("ece", "mce", "brier", "nll", "accuracy", "confidence", "confidence_gap")


def charts(layout):
    return {title: [chart.title.split(" (")[0] for chart in found] for title, found in layout.categories.items()}


def layouts(writer):
    return [(r.step, r.values[LAYOUT_TAG]) for r in writer.records if LAYOUT_TAG in r.values]


def record(step, **values):
    return Record(step, float(step), {tag.replace("__", "/"): value for tag, value in values.items()})


def test_a_training_run_has_charts_of_what_it_recorded(tmp_path, accumulate):
    model = Transformer()
    optimizer = torch.optim.AdamW(model.parameters())
    with torchprobe.instrument(model, log_dir=tmp_path, every=2) as session:
        for _ in range(4):
            loss = torch.nn.functional.cross_entropy(
                model(inputs("transformer")).transpose(1, 2), inputs("transformer")
            )
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            session.log_metrics({"loss": loss}, prefix="train")
    shown = accumulate(tmp_path)
    tags = shown.Tags()["scalars"]
    layout = layout_pb2.Layout.FromString(make_ndarray(shown.Tensors(LAYOUT_TAG)[-1].tensor_proto).item())
    found = {category.title: [chart.title.split(" (")[0] for chart in category.chart] for category in layout.category}
    assert {"Loss", "Gradient norm", "Learning rate", "Attention entropy of the lowest head"} <= set(found["Overview"])
    assert {"Gradient norm", "Update ratio"} <= set(found["Gradients"])
    assert "Entropy" in found["Attention"]
    assert "Confidence and accuracy" in found["Calibration"]
    assert "Total" in found["Uncertainty"]
    for category in layout.category:
        for chart in category.chart:
            assert all(any(re.match(pattern, tag) for tag in tags) for pattern in chart.multiline.tag)
            assert all({line.value, line.lower, line.upper} <= set(tags) for line in chart.margin.series)
            assert chart.multiline.tag or chart.margin.series


def test_the_gradient_norm_before_clipping_has_a_line_beside_the_one_that_is_used():
    clipped = layout_of({"overview/grad_norm", "overview/grad_norm_unclipped"}).categories["Overview"]
    [lines] = [chart for chart in clipped if chart.title.startswith("Gradient norm")]
    assert all(re.match(lines.patterns[0], f"overview/{name}") for name in ("grad_norm", "grad_norm_unclipped"))
    assert not re.match(lines.patterns[0], "overview/grad_norm_other")


def test_a_band_is_the_median_between_the_extremes():
    values = {"update_ratio/a": 1.0, "update_ratio/b": 9.0, "update_ratio/c": float("nan"), "update_ratio/d": 2.0}
    found = bands_of(values)
    assert found == {"layers/update_ratio/median": 2.0, "layers/update_ratio/min": 1.0, "layers/update_ratio/max": 9.0}


def test_validation_has_bands_of_its_own():
    values = {"val/attention_entropy/a": 1.0, "val/attention_entropy/b": 3.0, "attention_entropy/a": 7.0}
    assert bands_of(values) == {
        "val/layers/attention_entropy/median": 2.0,
        "val/layers/attention_entropy/min": 1.0,
        "val/layers/attention_entropy/max": 3.0,
    }


def test_what_is_no_number_or_no_layer_has_no_band():
    values = {"update_ratio/a": Text("x"), "update_ratio/b": 1.0, "loss": 1.0, "train/update_ratio": 2.0}
    assert bands_of(values) == {}


@settings(max_examples=100, deadline=None)
@given(st.lists(st.floats(width=32), min_size=2, max_size=8))
def test_a_band_holds_every_finite_value(values):
    finite = [value for value in values if np.isfinite(value)]
    found = bands_of({f"grad_norm_layer/{i}": v for i, v in enumerate(values)})
    if len(finite) < 2:
        assert found == {}
    else:
        low, middle, high = (found[f"layers/grad_norm_layer/{name}"] for name in ("min", "median", "max"))
        assert (low, high) == (min(finite), max(finite))
        assert low <= middle <= high


def test_epistemic_uncertainty_is_the_band_between_total_and_aleatoric():
    tags = {f"{p}uncertainty_{kind}/head" for p in ("", "val/") for kind in ("total", "aleatoric", "epistemic")}
    (margin,) = [c for c in layout_of(tags).categories["Uncertainty"] if isinstance(c, Margin)]
    assert margin.series == (
        ("uncertainty_total/head", "uncertainty_aleatoric/head", "uncertainty_total/head"),
        ("val/uncertainty_total/head", "val/uncertainty_aleatoric/head", "val/uncertainty_total/head"),
    )


def test_total_alone_has_no_band():
    assert charts(layout_of({"uncertainty_total/head"})) == {"Uncertainty": ["Total"]}


def test_calibration_charts_fit_training_and_validation():
    found = charts(layout_of({"val/calibration/ece", "calibration/accuracy", "val/calibration/confidence"}))
    assert found["Calibration"] == ["Confidence and accuracy", "Calibration error"]


def test_without_a_fitting_tag_there_is_no_layout():
    writer = MemoryWriter()
    LayoutWriter(writer).write([record(1, other=1.0), record(2, note=Text("loss"))])
    assert layouts(writer) == []
    assert writer.tags() == ["note", "other"]


def test_a_step_in_several_records_has_each_band_and_the_layout_once():
    writer = MemoryWriter()
    first = {"update_ratio/a": 1.0, "update_ratio/b": 3.0, "overview/loss": 1.0}
    late = {"update_ratio/c": 9.0, "update_ratio/d": 9.0, "overview/grad_norm": 1.0}
    layout = LayoutWriter(writer)
    layout.write([Record(1, 0.0, first)])
    layout.write([Record(1, 0.0, late), Record(2, 0.0, first)])
    assert writer.scalars("layers/update_ratio/median") == [(1, 2.0), (2, 2.0)]
    assert [step for step, _ in layouts(writer)] == [1, 2]
    assert "Gradient norm" in charts(layouts(writer)[1][1])["Overview"]  # the late part's chart comes with step 2


def test_the_layout_comes_again_when_new_charts_show_up_and_only_then():
    writer = MemoryWriter()
    laid = LayoutWriter(writer)
    for step in (1, 2, 3):
        laid.write([record(step, train__loss=1.0)])
    laid.write([record(4, train__loss=1.0, val__loss=1.0, val__calibration__ece=0.1), record(5, val__loss=1.0)])
    assert [(step, charts(layout)) for step, layout in layouts(writer)] == [
        (1, {"Overview": ["Loss"]}),
        (4, {"Overview": ["Loss"], "Calibration": ["Calibration error"]}),
    ]


def test_a_batch_that_is_written_again_is_the_same_however_it_grew():
    class Full(MemoryWriter):
        fails = 1
        tried = ()

        def write(self, records):
            self.tried = records
            self.fails -= 1
            if self.fails >= 0:
                raise OSError(28, "no space left")
            super().write(records)

    writer = Full()
    laid = LayoutWriter(writer)
    with pytest.raises(OSError, match="no space"):
        laid.write([record(1, loss=1.0)])
    first = writer.tried
    laid.write([record(1, loss=1.0), record(2, loss=1.0, calibration__ece=1.0)])
    assert writer.records[0] == first[0]
    assert [step for step, _ in layouts(writer)] == [1, 2]


def test_leaving_out_what_no_chart_shows_changes_no_layout():
    groups = [*sorted(BANDED), "attention_entropy_min", "grad_norm", "param_norm", "activation_mean", "alerts"]
    tags = {f"{group}/fc" for group in groups} | {f"uncertainty_{k}/fc" for k in ("total", "aleatoric", "epistemic")}
    tags |= {tag for group in BANDED for tag in band_tags("", group)}
    tags |= {f"overview/{name}" for name in OVERVIEW} | {f"calibration/{name}" for name in CALIBRATION}
    tags |= {"loss", "train/loss", "train/acc", "val/accuracy", "val/epistemic", "lr/AdamW/group_0"}
    tags |= {f"val/{tag}" for tag in tags}
    layout = layout_of(tags)
    assert layout_of({tag for tag in tags if CHARTED.match(tag)}) == layout
    assert {title: len(found) for title, found in layout.categories.items()} == {
        title: len(makers) for title, makers in _CATEGORIES.items()
    }


def test_the_stored_layout_is_the_pages_protocol_buffer():
    layout = Layout({"A": (Lines("l", ("x$", "y$")), Margin("m", (("v", "lo", "hi"),)))})
    parsed = layout_pb2.Layout.FromString(serialized(layout))
    (category,) = parsed.category
    lines, margin = category.chart
    assert (category.title, lines.title, list(lines.multiline.tag)) == ("A", "l", ["x$", "y$"])
    assert [(s.value, s.lower, s.upper) for s in margin.margin.series] == [("v", "lo", "hi")]


def test_a_writer_of_the_users_gets_no_layout(tmp_path, accumulate):
    model = Transformer()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with torchprobe.instrument(model, writer=EventFileWriter(tmp_path)):
        model(inputs("transformer")).sum().backward()
        optimizer.step()
    tags = accumulate(tmp_path).Tags()
    assert "overview/grad_norm" in tags["scalars"]
    assert not any(tag.startswith("layers/") for tag in tags["scalars"])
    assert LAYOUT_TAG not in tags["tensors"]
