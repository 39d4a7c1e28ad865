import pytest
import torch

from tests.device.fixture import fgpu, on_fgpu  # noqa: F401 - fixtures


@pytest.fixture
def errors_on_waiting():
    """Inside, whatever makes this thread wait for the device raises."""
    yield
    torch.cuda.set_sync_debug_mode("default")
