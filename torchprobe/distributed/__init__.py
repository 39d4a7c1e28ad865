"""One run over several ranks: each sends what it has seen to rank 0, which combines and writes it.

Read in the order in which values flow: `world` (who writes), `exchange` (what a rank does), `sender`, `frames` (which
steps are the same, and their bytes), `mailbox` (how they travel), `gatherer`, `merge` (one row from many).
"""
