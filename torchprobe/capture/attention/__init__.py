"""Finds attention in a model's forward pass, without a hook below its root and without a patch.

Read in this order: `mode` (what sees the calls), `owner` (whose call it is), `dot_product`, `flex`, `kernels` and
`multi_head` (calls that name their queries and keys), `functions`, `tags` and `handwritten` (matmul, softmax, matmul),
`padding`, `provenance` and `layout` (what the tensors mean), `sites` (what the step keeps), `fast_path` (when not to
look), `capture` (the whole).
"""
