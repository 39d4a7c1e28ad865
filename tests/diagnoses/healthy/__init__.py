"""Healthy recipes, many of them odd on purpose. Each is a function of `watch`, which instruments a model."""

from tests.diagnoses.healthy import layers, losses, optimizers, sequences, several_models, untrained_parts
from tests.diagnoses.recipes import HEALTHY

__all__ = ["HEALTHY", "layers", "losses", "optimizers", "sequences", "several_models", "untrained_parts"]
