"""Finds attention in a model's forward pass, without a hook below its root and without a patch.

Read in this order: `source` (the whole), `sites` (whose call it is, and what calls add up to), `stack` and `mode` (what
sees the calls), `dot_product` and `multi_head` (calls that name their queries and keys), `handwritten`, `softmaxes` and
`uses` (product, softmax, product), on `tape`, `labels`, `labelling` and its tables (`functions`, `joins`, `writes`);
`layout`, `places`, `padding` (what dimensions are); `observer` (what is computed, or why not). Inside compiled graphs:
`traced`, `graph` (what reads), `unread` (what nothing reads).
"""
