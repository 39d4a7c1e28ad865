"""Every test here runs twice: as it is, and on a device that is not there (`tests/device`)."""

import pytest

from tests.device.fixture import PLACES, both_places, fgpu, on_cuda, on_fgpu  # noqa: F401 - fixtures


@pytest.fixture(autouse=True, params=PLACES)
def place(request):
    """Where what a test makes lies, if it does not say otherwise."""
    both_places(request)
