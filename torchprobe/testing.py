"""For your own tests: see what was recorded, without files.

Pass a `MemoryWriter` as `writer=` to `torchprobe.instrument` and ask it afterwards. By itself:

>>> from torchprobe.records import Record
>>> from torchprobe.testing import MemoryWriter
>>> writer = MemoryWriter()
>>> writer.write([Record(step=1, wall_time=0.0, values={"train/loss": 0.5})])
>>> writer.write([Record(step=2, wall_time=1.0, values={"train/loss": 0.25})])
>>> writer.tags()
['train/loss']
>>> writer.scalars("train/loss")
[(1, 0.5), (2, 0.25)]
>>> writer.value("train/loss"), writer.value("train/loss", step=1)
(0.25, 0.5)
"""

from torchprobe.writers.protocol import MemoryWriter

__all__ = ["MemoryWriter"]
