from tests.device.fixture import fgpu, on_fgpu  # noqa: F401 - fixtures
