"""Every test leaves the stack of function modes as it found it."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture(autouse=True)
def no_mode_is_left():
    before = torch._C._len_torch_function_stack()
    yield
    assert torch._C._len_torch_function_stack() == before
