"""Statistics of tensors: pure functions from tensors to small tensors on the same device.

No state, no host read, inputs untouched; every statistic is over the finite elements and counts the others. What is
computed on device is a row; functions on Python numbers (`summarise`, `edges`) say on the host what a row means.
"""
