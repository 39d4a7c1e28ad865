"""Checkpoints of a training run, and going on from them."""

from torchprobe.checkpoint.manager import CheckpointManager

__all__ = ["CheckpointManager"]
