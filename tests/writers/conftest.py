from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import (
    STORE_EVERYTHING_SIZE_GUIDANCE,
    EventAccumulator,
)
from tensorboard.backend.event_processing.event_file_loader import LegacyEventFileLoader

from torchprobe.records import Record


@pytest.fixture
def scalar_record():
    """A record at a step, with one or more scalars."""

    def make(step, **values):
        return Record(step=step, wall_time=1.7e9 + step, values=values or {"loss": step / 2})

    return make


@pytest.fixture
def event_files():
    """The event files of a directory, in the order in which TensorBoard reads them."""
    return lambda directory: sorted(Path(directory).glob("*tfevents*"))


@pytest.fixture
def load_events():
    """Every event of a file, as TensorBoard's Python loader reads it."""
    return lambda path: list(LegacyEventFileLoader(str(path)).Load())


@pytest.fixture
def accumulate():
    """A directory as TensorBoard's EventAccumulator sees it."""
    return lambda directory: EventAccumulator(str(directory), STORE_EVERYTHING_SIZE_GUIDANCE).Reload()
