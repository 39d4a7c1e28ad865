"""How steps are handed to a drain."""

from __future__ import annotations

PATIENCE = 30.0


def put_all(drain, sealed):
    for one in sealed:
        assert drain.admit()
        drain.put(one)
