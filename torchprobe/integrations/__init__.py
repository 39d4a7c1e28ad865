"""Thin adapters for training frameworks. `instrument(model)` works there without them."""
