"""Finds attention in a model's forward pass, without a hook below its root and without a patch.

Read in this order: `capture` (the whole), `stack` and `mode` (what sees the calls), `owner` (whose call it is),
`dot_product`, `flex`, `kernels` and `multi_head` (calls that name their queries and keys), `functions`, `subscripts`,
`tags`, `given` and `handwritten` (matmul, softmax, matmul), `layout`, `provenance` and `padding` (what the tensors
mean), `reading`, `observer`, `sites` and `pieces` (what is kept), `uncovered` and `fast_path` (when not to look),
`traced` and `projected` (inside compiled graphs).
"""
