import base64
import io
import json
import math
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

from torchprobe.records import Histogram, Image, Record, Text
from torchprobe.writers.json_lines import JsonLinesWriter
from torchprobe.writers.protocol import Writer


def strict_json(text):
    """Parse as every other language would: no bare NaN, no Infinity."""

    def refuse(constant):
        raise ValueError(constant)

    return json.loads(text, parse_constant=refuse)


def read(path):
    return [strict_json(line) for line in Path(path).read_text().splitlines()]


@pytest.fixture
def writer(tmp_path):
    writer = JsonLinesWriter(tmp_path / "log" / "run.jsonl")
    yield writer
    writer.close()


@pytest.fixture
def path(tmp_path, writer):
    return tmp_path / "log" / "run.jsonl"


def value_of(writer, path, value):
    writer.write([Record(3, 1.5, {"tag": value})])
    return read(path)[0]["values"]["tag"]


def test_it_is_a_writer(writer):
    assert isinstance(writer, Writer)


def test_a_record_is_a_line(writer, path):
    writer.write([Record(3, 1.5, {"loss": 0.25}), Record(4, 2.5, {"loss": 0.1})])
    assert read(path) == [
        {"step": 3, "wall_time": 1.5, "values": {"loss": 0.25}},
        {"step": 4, "wall_time": 2.5, "values": {"loss": 0.1}},
    ]


@pytest.mark.parametrize(
    ("number", "written"), [(math.nan, "NaN"), (math.inf, "Infinity"), (-math.inf, "-Infinity"), (2, 2)]
)
def test_numbers_that_json_lacks_are_strings_that_float_reads(writer, path, number, written):
    assert value_of(writer, path, number) == written
    assert float(written) == number or math.isnan(number)


def test_a_histogram_has_edges_and_counts(writer, path):
    histogram = Histogram(np.array([-np.inf, 0.0, 2.5]), np.array([3, 4]))
    assert value_of(writer, path, histogram) == {"edges": ["-Infinity", 0.0, 2.5], "counts": [3, 4]}


def test_an_array_is_nested_lists(writer, path):
    array = np.array([[1.0, np.nan], [0.5, 2.0]], np.float32)
    assert value_of(writer, path, array) == {"array": [[1.0, "NaN"], [0.5, 2.0]]}


def test_text_is_kept(writer, path):
    assert value_of(writer, path, Text('a "b"\nc é')) == {"text": 'a "b"\nc é'}


def test_an_image_comes_back_from_its_png(writer, path):
    from PIL import Image as Pillow

    pixels = np.random.default_rng(0).integers(0, 256, (4, 6, 3)).astype(np.uint8)
    value = value_of(writer, path, Image(pixels))
    assert value["shape"] == [4, 6, 3]
    with Pillow.open(io.BytesIO(base64.b64decode(value["png"]))) as image:
        assert np.array_equal(np.asarray(image), pixels)


numbers = st.one_of(st.floats(), st.integers(-(2**60), 2**60))
values = st.one_of(
    numbers,
    st.text(max_size=10).map(Text),
    arrays(np.float32, array_shapes(max_dims=3, max_side=3), elements=st.floats(width=32)),
)


@settings(max_examples=30, deadline=None)
@given(st.dictionaries(st.text(max_size=10), values, max_size=5))
def test_every_line_is_valid_json(record_values):
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "run.jsonl"
        writer = JsonLinesWriter(path)
        writer.write([Record(1, 0.0, record_values)])
        writer.close()
        lines = path.read_bytes().split(b"\n")
        assert lines.pop() == b""
        assert [set(strict_json(line)["values"]) for line in lines] == [set(record_values)]


def test_what_the_file_held_is_kept(writer, path, scalar_record):
    writer.write([scalar_record(1)])
    again = JsonLinesWriter(path)
    again.write([scalar_record(2)])
    again.close()
    assert [line["step"] for line in read(path)] == [1, 2]


def test_half_a_line_of_a_killed_process_does_not_spoil_the_next(writer, path, scalar_record):
    path.write_text('{"step": 1, "wall')
    again = JsonLinesWriter(path)
    again.write([scalar_record(2)])
    again.close()
    assert strict_json(path.read_text().splitlines()[1])["step"] == 2


def test_a_batch_that_does_not_fit_leaves_no_half_line(writer, path, scalar_record, full_disk):
    writer.write([scalar_record(1)])
    batch = [Record(2, 0.0, {"text": Text("x" * 200_000)})]
    with full_disk(100_000), pytest.raises(OSError, match="File too large"):
        writer.write(batch)
    assert [line["step"] for line in read(path)] == [1]
    writer.write(batch)
    assert [line["step"] for line in read(path)] == [1, 2]


def test_a_deleted_file_is_made_again(writer, path, scalar_record):
    writer.write([scalar_record(1)])
    path.unlink()
    writer.write([scalar_record(2)])
    assert [line["step"] for line in read(path)] == [2]


def test_an_empty_batch_writes_nothing(writer, path):
    writer.write([])
    assert path.read_bytes() == b""


def test_a_directory_in_the_way_is_reported_with_the_argument(tmp_path):
    with pytest.raises(IsADirectoryError, match=r"path='.*': Is a directory: pass the path of a file"):
        JsonLinesWriter(tmp_path)


def test_closing_twice_is_harmless(writer, path):
    writer.close()
    writer.close()
    assert path.exists()
