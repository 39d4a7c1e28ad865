"""A run of a remote store, copied for the time of reading."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torchprobe.writers.places import filesystem_of

_TIMES = ("LastModified", "last_modified", "updated", "mtime", "created")  # as stores call it


@contextmanager
def copied(url: str) -> Iterator[tuple[Path, str]]:
    """A local folder with the files of the newest run at or below a URL, and that run's own URL.

    The folder is empty when there is no run, and gone afterwards. Raises OSError for a store that cannot be read,
    ImportError or ValueError for a URL that fsspec cannot open.
    """
    store = filesystem_of(url, "")
    with tempfile.TemporaryDirectory(prefix="torchprobe-") as folder:
        try:
            run = _fetch(store, url, Path(folder))
        except Exception as error:  # stores have exceptions of their own
            raise OSError(f"{url!r} cannot be read: {str(error) or type(error).__name__}") from error
        yield Path(folder), run


def _fetch(store: Any, url: str, folder: Path) -> str:
    root = store._strip_protocol(url).rstrip("/")
    paths: dict[str, Any] = store.find(url, detail=True)
    run = _newest(root, {path: details for path, details in paths.items() if "tfevents" in _name(path)})
    (folder / "flight").mkdir()
    for path in paths:
        if _parent(path) == run and "tfevents" in _name(path):
            store.get_file(path, str(folder / _name(path)))
        elif _parent(path) == f"{run}/flight":
            store.get_file(path, str(folder / "flight" / _name(path)))
    return url + run[len(root) :]


def _newest(root: str, event_files: Mapping[str, Mapping[str, Any]]) -> str:
    """The root itself when it holds event files, else the folder of the one that was written last."""
    if any(_parent(path) == root for path in event_files):
        return root
    return _parent(max(event_files, key=lambda path: (_written(event_files[path]), _name(path)), default=f"{root}/"))


def _written(details: Mapping[str, Any]) -> str:
    """When, in a form that sorts; empty where a store does not say: then names decide, which hold a time too."""
    return next((str(details[key]) for key in _TIMES if details.get(key)), "")


def _name(path: str) -> str:
    return path.rpartition("/")[2]


def _parent(path: str) -> str:
    return path.rpartition("/")[0]
