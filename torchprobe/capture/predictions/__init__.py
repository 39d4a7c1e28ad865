"""Finds what a model says about its own uncertainty, and the targets that its predictions are judged by."""
