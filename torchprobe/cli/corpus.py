"""Labelled passages of text, split by file: no file is in both the training and the held-out part.

Two sources: the packages of Python's own standard library, and any folder with one sub-folder a class. To the model
they are fixed-length rows of word numbers, without a vocabulary to learn or to ship.
"""

from __future__ import annotations

import random
import re
import sysconfig
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from torchprobe.cli.arguments import CommandError

# On every CPython from 3.10 on, also where distributions cut the library up; the last four stand in for missing ones.
PACKAGES = (
    *("asyncio", "ctypes", "email", "http", "importlib", "json", "multiprocessing", "unittest", "urllib", "xml"),
    *("wsgiref", "concurrent", "logging", "sqlite3"),
)
MAX_PACKAGES = 10
MIN_PACKAGE_FILES = 3
MIN_SOURCE_BYTES = 1000
TEST_FOLDERS = frozenset({"test", "tests", "idle_test"})
HELD_OUT_NAMES = ("test", "val", "validation")
HELD_OUT_SHARE = 0.25
MAX_FILE_BYTES = 1 << 20
MAX_TRAIN_PASSAGES = 10_000
MAX_HELD_OUT_PASSAGES = 600

_LAYOUT = "It takes a folder with one sub-folder of text files for each class, such as DIR/pos and DIR/neg."


@dataclass(frozen=True, slots=True)
class Part:
    """Passages, the class number of each, and the files they were read from, no file twice."""

    passages: tuple[str, ...]
    labels: tuple[int, ...]
    files: tuple[Path, ...]


@dataclass(frozen=True, slots=True)
class Corpus:
    """Passages to train on and passages of other files to be judged on.

    ignored names what lies in the folder and is not used, for lack of a counterpart.
    """

    classes: tuple[str, ...]
    train: Part
    held_out: Part
    ignored: tuple[str, ...] = ()

    @property
    def majority_share(self) -> float:
        """Accuracy on the held-out passages of always answering with their commonest class."""
        labels = self.held_out.labels
        return max(labels.count(label) for label in set(labels)) / len(labels)


def standard_library(*, lines: int, seed: int, root: Path | None = None) -> Corpus:
    """Passages of the running Python's own packages; the packages' names are blanked out of the text.

    root is the folder of the standard library, by default the one in use.
    Raises CommandError when fewer than two of the packages are there as source.
    """
    root = Path(sysconfig.get_path("stdlib")) if root is None else root
    sources = {name: _sources(root / name) for name in PACKAGES}
    found = {name: files for name, files in sources.items() if len(files) >= MIN_PACKAGE_FILES}
    files_of = dict(sorted(list(found.items())[:MAX_PACKAGES]))
    if len(files_of) < 2:
        raise CommandError(f"no standard-library source under {root}. Name a folder of texts with --data DIR.")
    split = {name: _split(files, random.Random(f"{seed} {name}")) for name, files in files_of.items()}
    names = re.compile("|".join(files_of), re.IGNORECASE)
    return _corpus(split, lines=lines, seed=seed, blank=names)


def labelled_folder(folder: Path, *, lines: int, seed: int) -> Corpus:
    """Passages of a folder with one sub-folder a class, or with such folders in `train` and `test`.

    Without `train` and `test`, a quarter of each class's files is held out.
    Raises CommandError when folder is none, has fewer than two classes, or a class has too few text files.
    """
    if not folder.is_dir():
        raise CommandError(f"--data: '{folder}' is not a folder. {_LAYOUT}")
    held_out = next((folder / name for name in HELD_OUT_NAMES if (folder / name).is_dir()), None)
    if held_out is None or not (folder / "train").is_dir():
        classes = _class_folders(folder)
        split = {path.name: _split(_text_files(path), random.Random(f"{seed} {path.name}")) for path in classes}
        ignored: tuple[str, ...] = ()
    else:
        split, ignored = _ready_split(folder / "train", held_out)
    for name, parts in split.items():
        if not all(parts):
            raise CommandError(
                f"--data: class '{name}' of '{folder}' has {sum(map(len, parts))} text file(s), too few to split. Each "
                "class takes at least one file to train on and one to hold out; empty and binary files do not count."
            )
    return _corpus(split, lines=lines, seed=seed, ignored=ignored)


def passages_of(text: str, lines: int) -> Iterator[str]:
    """Runs of `lines` non-blank lines; a shorter rest is left out, unless it is all there is."""
    kept = [line.rstrip() for line in text.splitlines() if line.strip()]
    last_start = max(len(kept) - lines, 0)
    for start in range(0, last_start + 1 if kept else 0, lines):
        yield "\n".join(kept[start : start + lines])


def read_text(path: Path) -> str:
    """The file's text, at most its first mebibyte; bytes that are not UTF-8 become the replacement character."""
    return _start(path, MAX_FILE_BYTES).decode("utf-8", errors="replace")


def _start(path: Path, most: int) -> bytes:
    try:
        with path.open("rb") as stream:
            return stream.read(most)
    except OSError as error:
        raise CommandError(f"cannot read {path}: {error.strerror}") from error


def _sources(package: Path) -> list[Path]:
    """The package's source files, without its tests and without files too short to tell anything."""
    files = sorted(package.rglob("*.py"), key=lambda path: path.relative_to(package).as_posix())
    return [
        path
        for path in files
        if TEST_FOLDERS.isdisjoint(path.relative_to(package).parts) and path.stat().st_size >= MIN_SOURCE_BYTES
    ]


def _class_folders(folder: Path) -> list[Path]:
    classes = sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith((".", "__")))
    if len(classes) < 2:
        found = ", ".join(path.name for path in classes) or "none"
        raise CommandError(f"--data: '{folder}' has fewer than two class sub-folders ({found}). {_LAYOUT}")
    return classes


def _text_files(folder: Path) -> list[Path]:
    """Files below folder, in an order that is the same on every system; binary and hidden ones left out."""
    files = sorted(folder.rglob("*"), key=lambda path: path.relative_to(folder).as_posix())
    return [path for path in files if not path.name.startswith(".") and path.is_file() and _is_text(path)]


def _is_text(path: Path) -> bool:
    start = _start(path, 1024)
    return b"\0" not in start and bool(start.strip())


_Files = tuple[list[Path], list[Path]]
"""Files to train on, and files held out."""


def _split(files: Sequence[Path], rng: random.Random) -> _Files:
    shuffled = list(files)
    rng.shuffle(shuffled)
    held_out = min(max(1, round(len(files) * HELD_OUT_SHARE)), len(files))
    return shuffled[held_out:], shuffled[:held_out]


def _ready_split(train: Path, held_out: Path) -> tuple[dict[str, _Files], tuple[str, ...]]:
    train_classes = {path.name: path for path in _class_folders(train)}
    held_out_classes = {path.name: path for path in _class_folders(held_out)}
    names = sorted(train_classes.keys() & held_out_classes.keys())
    if len(names) < 2:
        raise CommandError(f"--data: '{train}' and '{held_out}' share fewer than two class sub-folders. {_LAYOUT}")
    ignored = sorted(train_classes.keys() ^ held_out_classes.keys())
    split = {name: (_text_files(train_classes[name]), _text_files(held_out_classes[name])) for name in names}
    return split, tuple(ignored)


def _corpus(
    split: Mapping[str, _Files],
    *,
    lines: int,
    seed: int,
    blank: re.Pattern[str] | None = None,
    ignored: tuple[str, ...] = (),
) -> Corpus:
    train = {name: files for name, (files, _) in split.items()}
    held_out = {name: files for name, (_, files) in split.items()}
    return Corpus(
        classes=tuple(split),
        train=_part(train, MAX_TRAIN_PASSAGES // len(split), lines, seed, blank),
        held_out=_part(held_out, MAX_HELD_OUT_PASSAGES // len(split), lines, seed, blank),
        ignored=ignored,
    )


def _part(
    files_of: Mapping[str, Sequence[Path]], limit: int, lines: int, seed: int, blank: re.Pattern[str] | None
) -> Part:
    """At most limit passages of each class, drawn from at most limit of its files."""
    passages: list[str] = []
    labels: list[int] = []
    used: list[Path] = []
    for label, (name, files) in enumerate(files_of.items()):
        rng = random.Random(f"{seed} {name}")
        chosen = rng.sample(list(files), min(limit, len(files)))
        texts = (read_text(path) for path in chosen)
        blanked = (blank.sub("_", text) if blank else text for text in texts)
        candidates = [passage for text in blanked for passage in passages_of(text, lines)]
        drawn = rng.sample(candidates, min(limit, len(candidates)))
        passages += drawn
        labels += [label] * len(drawn)
        used += chosen
    return Part(tuple(passages), tuple(labels), tuple(used))


PADDING = 0

# assertEqual -> assert, Equal; HTTPServer -> HTTP, Server; other scripts stay whole words; punctuation counts too.
_WORD = re.compile(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])|\d+|[^\W\d_]+|[^\w\s]")


def words_of(text: str) -> list[str]:
    """Lower-case words and punctuation marks; text that holds neither is one word of its own."""
    return [word.lower() for word in _WORD.findall(text)] or [text]


def word_numbers(text: str, length: int, vocabulary: int) -> list[int]:
    """The first `length` words as numbers in [1, vocabulary), filled up with `PADDING`.

    The number is the word's CRC-32, so it is the same in every process; words may share one.
    At least one number is not padding, so no attention row is ever fully masked.
    """
    numbers = [1 + zlib.crc32(word.encode()) % (vocabulary - 1) for word in words_of(text)[:length]]
    return numbers + [PADDING] * (length - len(numbers))
