import subprocess
import sys

import pytest

HEAVY = {"torch", "tensorboard", "PIL", "rich", "google_crc32c"}


def loaded_by(module):
    code = f"import sys, {module}; print(*sys.modules)"
    output = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    return set(output.split()) & HEAVY


@pytest.mark.parametrize("module", ["torchprobe.writers.protocol", "torchprobe.testing"])
def test_the_protocol_and_the_test_double_load_nothing_heavy(module):
    assert loaded_by(module) == set()


def test_json_lines_need_neither_torch_nor_tensorboard():
    assert loaded_by("torchprobe.writers.json_lines") == set()


def test_an_event_file_needs_no_torch_and_pillow_only_for_images():
    assert loaded_by("torchprobe.writers.event_file") == {"tensorboard", "google_crc32c"}
