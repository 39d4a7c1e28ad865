"""Tiny models of the families of transformers and timm, and what is true of their attention."""
