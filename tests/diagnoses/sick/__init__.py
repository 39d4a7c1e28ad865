"""Planted bugs, each with the rule that names it. As in `healthy`, a recipe is a function of `watch`."""

from tests.diagnoses.recipes import REMARKS, SICK
from tests.diagnoses.sick import losses, modules, optimizers, remarks

__all__ = ["REMARKS", "SICK", "losses", "modules", "optimizers", "remarks"]
