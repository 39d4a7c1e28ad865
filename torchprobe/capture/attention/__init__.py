"""Finds attention in a model's forward pass, without a hook below its root and without a patch.

Read in this order: `source` (the whole), `sites` (whose call it is, and what calls add up to), `stack` and `mode` (what
sees the calls), `dot_product` and `multi_head` (calls that name their queries and keys), `functions`, `tags` and
`handwritten` (matmul, softmax, matmul), `layout` (what the tensors mean), `observer` (what is computed, or why not),
`traced` (inside compiled graphs).
"""
