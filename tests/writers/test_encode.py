import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from tensorboard.compat.proto import summary_pb2
from tensorboard.plugins.histogram import metadata as histogram_plugin
from tensorboard.plugins.image import metadata as image_plugin
from tensorboard.plugins.scalar import metadata as scalar_plugin
from tensorboard.plugins.text import metadata as text_plugin
from tensorboard.util.tensor_util import make_ndarray

from torchprobe.records import Histogram, Image, Record, Text
from torchprobe.writers.event_file import Scalars, encode, trim

HISTOGRAM = Histogram(np.arange(4.0), np.array([0, 2, 5]))
IMAGE = Image(np.zeros((2, 3, 3), np.uint8))


def encode_one(value, tag="group/name", **fields):
    record = Record(step=7, wall_time=12.5, values={tag: value}, descriptions={"group": "what *it* is"})
    return encode(record, **fields).summary.value[0]


def test_a_record_is_one_event_with_its_step_time_and_tags():
    event = encode(Record(step=7, wall_time=12.5, values={"a": 1.0, "b": HISTOGRAM, "c": 2.0}))
    assert (event.step, event.wall_time) == (7, 12.5)
    assert [value.tag for value in event.summary.value] == ["a", "b", "c"]


@settings(max_examples=50, deadline=None)
@given(st.floats(width=32))
def test_any_float32_comes_back_as_it_is(value):
    stored = encode_one(value).simple_value
    assert stored == value or (math.isnan(value) and math.isnan(stored))


@pytest.mark.parametrize("value", [3, np.float32(3), np.float64(3), np.int64(3), True])
def test_whatever_is_a_number_is_a_scalar(value):
    assert encode_one(value).simple_value == float(value)


@pytest.mark.parametrize("value", ["3.0", None, {"a": 1.0}, [1.0]])
def test_another_kind_of_value_is_refused_by_tag_and_type(value):
    message = rf"record\.values\['group/name'\] is a {type(value).__name__}: pass a float, Histogram"
    with pytest.raises(TypeError, match=message):
        encode_one(value)


@pytest.mark.parametrize(
    ("value", "plugin", "data_class"),
    [
        (1.0, scalar_plugin, summary_pb2.DATA_CLASS_SCALAR),
        (HISTOGRAM, histogram_plugin, summary_pb2.DATA_CLASS_TENSOR),
        (Text("hi"), text_plugin, summary_pb2.DATA_CLASS_TENSOR),
        (IMAGE, image_plugin, summary_pb2.DATA_CLASS_BLOB_SEQUENCE),
    ],
)
def test_metadata_is_tensorboards_own_plus_the_data_class(value, plugin, data_class):
    expected = plugin.create_summary_metadata(display_name="", description="what *it* is")
    expected.data_class = data_class
    assert encode_one(value).metadata == expected


def test_a_validation_tag_has_its_groups_description():
    assert encode_one(1.0, tag="val/group/name").metadata.summary_description == "what *it* is"


def test_a_tag_described_before_carries_no_metadata():
    assert not encode_one(1.0, described={"group/name"}).HasField("metadata")
    assert encode_one(1.0, described={"group/other"}).HasField("metadata")


def test_a_histogram_is_rows_of_left_right_and_count():
    rows = make_ndarray(encode_one(HISTOGRAM).tensor)
    assert rows.dtype == np.float64
    assert rows.tolist() == [[1.0, 2.0, 2.0], [2.0, 3.0, 5.0]]


def test_a_histogram_of_nothing_has_no_rows():
    rows = make_ndarray(encode_one(Histogram(np.arange(3.0), np.array([0, 0]))).tensor)
    assert rows.shape == (0, 3)


@settings(max_examples=50, deadline=None)
@given(arrays(np.int64, st.integers(1, 12), elements=st.integers(0, 3)))
def test_trimming_drops_empty_outer_buckets_and_nothing_else(counts):
    histogram = Histogram(np.linspace(-1, 1, len(counts) + 1), counts)
    trimmed = trim(histogram)
    kept = dict(zip(trimmed.edges[:-1].tolist(), trimmed.counts.tolist(), strict=True))
    filled = {left: n for left, n in zip(histogram.edges[:-1].tolist(), counts.tolist(), strict=True) if n}
    assert {left: n for left, n in kept.items() if n} == filled
    assert all(trimmed.counts[[0, -1]]) if len(trimmed.counts) else not filled


def test_text_is_one_markdown_string_even_with_bytes_that_utf8_lacks():
    assert make_ndarray(encode_one(Text("**a** \udc80")).tensor).item() == b"**a** ?"


def test_an_image_is_width_height_and_png():
    pixels = np.random.default_rng(0).integers(0, 256, (4, 6, 3)).astype(np.uint8)[:, ::-1]  # not one after another
    tensor = encode_one(Image(pixels)).tensor
    width, height, data = tensor.string_val
    assert (width, height, tensor.tensor_shape.dim[0].size) == (b"6", b"4", 3)
    assert np.array_equal(decode_png(data), pixels)


def decode_png(data):
    import io

    from PIL import Image as Pillow

    with Pillow.open(io.BytesIO(data)) as image:
        return np.asarray(image)


@pytest.mark.parametrize("order", ["C", "F"])
def test_an_array_keeps_its_shape_and_values(order):
    array = np.asarray(np.random.default_rng(0).normal(size=(3, 4)), np.float32, order=order)
    entry = encode_one(array)
    assert np.array_equal(make_ndarray(entry.tensor), array)
    assert entry.metadata.plugin_data.plugin_name == "torchprobe"


@given(st.dictionaries(st.text(min_size=1, max_size=200), st.floats(), min_size=1), st.integers(1, 2**40))
def test_floats_that_are_encoded_at_once_have_the_bytes_of_protocol_buffers(values, step):
    record = Record(step=step, wall_time=12.5, values=values)
    many = Scalars(tuple(values))
    assert many.event(Record(step=1, wall_time=0.0, values=dict.fromkeys(values, 7.0)))
    assert many.event(record) == encode(record, values.keys()).SerializeToString()
