"""What is known of the tensors of the running pass. Holds none of them alive."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any
from weakref import ref

from torch import Tensor


class Tags:
    """Tags on tensors, by identity. A tag goes with its tensor."""

    def __init__(self) -> None:
        self._tags: dict[int, tuple[ref[Tensor], Any]] = {}

    def __bool__(self) -> bool:
        return bool(self._tags)

    def put(self, tensor: Tensor, tag: Any) -> None:
        """Tag a tensor, in place of any earlier tag."""
        self._tags[id(tensor)] = (ref(tensor, self._forgetting(id(tensor))), tag)

    def of(self, value: Any) -> Any:
        """The tag of a tensor, or None."""
        found = self._tags.get(id(value))
        return None if found is None or found[0]() is not value else found[1]

    def among(self, values: Iterable[Any]) -> Iterator[tuple[Tensor, Any]]:
        """Those of some arguments that are tagged tensors, and those in an argument that is a list or tuple."""
        for value in values:
            for item in value if type(value) in (list, tuple) else (value,):
                tag = self.of(item)
                if tag is not None:
                    yield item, tag

    def clear(self) -> None:
        """Forget everything: the pass is over."""
        self._tags.clear()

    def _forgetting(self, key: int) -> Callable[[ref[Tensor]], None]:
        def forget(dead: ref[Tensor]) -> None:
            found = self._tags.get(key)
            if found is not None and found[0] is dead:  # another tensor may have the address by now
                del self._tags[key]

        return forget
