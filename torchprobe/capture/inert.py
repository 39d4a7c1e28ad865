"""What hangs on the user's modules and means nothing to anybody else."""

from __future__ import annotations

from typing import Any


class Inert:
    """Copies and pickles become None, so that they do nothing."""

    def __deepcopy__(self, memo: dict[int, Any]) -> None:
        return None

    def __reduce__(self) -> tuple[type, tuple[()]]:
        return (type(None), ())
