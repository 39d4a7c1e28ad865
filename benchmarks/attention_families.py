"""Every family of transformers and timm: is its attention found, and how far off are its statistics?

    pip install transformers timm
    python benchmarks/attention_families.py [--only NAME ...] [--jobs N] [--seconds N]

A model of each family, tiny and random, trains one step bare and one watched by `torchprobe.Attention`. What is there
is told by a mode below autograd (`benchmarks/families/truth.py`). Prints the table of docs/attention.md.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import json
import os
import resource
import signal
import sys
import traceback
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from benchmarks.families import huggingface, vision
from benchmarks.families.watched import Forward, Verdict, verdict

LIBRARIES = {"transformers": huggingface, "timm": vision}
BEFOREHAND = ("torchprobe.capture.attention.source",)  # once, not in each process
MEMORY = 8 * 2**30


def judged(library: str, name: str) -> Verdict:
    """One family, by the first way to build it that works."""
    problems = []
    for build in LIBRARIES[library].builds(name):
        try:
            model, forwards = build()
        except Exception as error:
            problems.append(_told(error))
            continue
        found = next((forward for forward in forwards if _works(model, forward, problems)), None)
        if found is not None:
            return verdict(name, model, found)
    return Verdict(name, problem=" / ".join(dict.fromkeys(problems)))


def _works(model: Any, forward: Forward, problems: list[str]) -> bool:
    try:
        forward(model)
    except Exception as error:
        problems.append(_told(error))
        return False
    return True


def _told(error: BaseException) -> str:
    frame = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__}: {str(error)[:160]} ({Path(frame.filename).name}:{frame.lineno})"


def in_child(library: str, name: str, seconds: int) -> tuple[int, int]:
    """Starts a process that judges a family: (process, pipe)."""
    read, write = os.pipe()
    child = os.fork()
    if child:
        os.close(write)
        return child, read
    signal.alarm(seconds)
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    os.close(read)
    quiet = os.open(os.devnull, os.O_WRONLY)
    os.dup2(quiet, 1), os.dup2(quiet, 2)
    try:
        result = judged(library, name)
    except BaseException as error:
        result = Verdict(name, problem=f"broke: {_told(error)}")
    with os.fdopen(write, "w") as pipe:
        json.dump(result.as_dict(), pipe)
    os._exit(0)


def all_judged(families: list[tuple[str, str]], jobs: int, seconds: int) -> Iterator[tuple[str, Verdict]]:
    """Each in a process of its own, for a few break the interpreter."""
    running: dict[int, tuple[str, str, int]] = {}
    waiting = list(reversed(families))
    while waiting or running:
        while waiting and len(running) < jobs:
            library, name = waiting.pop()
            child, pipe = in_child(library, name, seconds)
            running[child] = library, name, pipe
        child, status = os.wait()
        library, name, pipe = running.pop(child)
        with os.fdopen(pipe) as lines:
            said = lines.read()
        late = Verdict(name, problem="late" if os.WTERMSIG(status) == signal.SIGALRM else f"ended with {status}")
        yield library, Verdict(**json.loads(said)) if said else late


def table(verdicts: list[tuple[str, Verdict]]) -> str:
    """A line for each library, then each family that is not simply found."""
    lines = [
        "| library | families | attentions there | found | said | silently missed | worst error |",
        "|" + " --- |" * 7,
    ]
    for library in LIBRARIES:
        mine = [one for name, one in verdicts if name == library and not one.problem and one.there]
        exact = [one.error for one in mine if not one.wrong]
        counts = [len(mine), *(sum(getattr(one, what) for one in mine) for what in ("there", "found", "said"))]
        missed = sum(len(one.missed) for one in mine)
        version = importlib.import_module(library).__version__
        lines.append(
            f"| {library} {version} | {' | '.join(map(str, counts))} | {missed} | {max(exact, default=0):.0e} |"
        )
    lines += ["", "| family | found / there | said | to look at |", "|" + " --- |" * 4]
    for _, one in sorted(verdicts, key=lambda pair: pair[1].name):
        if one.said or one.missed or one.extra or one.wrong or not one.equal:
            lines.append(f"| {one.name} | {one.found} / {one.there} | {one.said} | {_remarks(one)} |")
    return "\n".join(lines)


def _remarks(one: Verdict) -> str:
    parts = {"missed: ": one.missed, "recorded beside these: ": one.extra, "differs: ": one.wrong}
    told = [start + ", ".join(names) for start, names in parts.items() if names]
    return "; ".join(told + ([] if one.equal else ["weights differ"]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="*", metavar="NAME")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--seconds", type=int, default=60, help="for one family")
    parser.add_argument("--json", help="a file to add each family's result to")
    parser.add_argument("--of", help="print the table of such a file instead")
    given = parser.parse_args()
    if given.of:
        rows = [json.loads(line) for line in Path(given.of).read_text().splitlines()]
        print(table([(library, Verdict(**row)) for library, row in rows]))
        return
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    libraries = {name: one for name, one in LIBRARIES.items() if importlib.util.find_spec(name)}
    for name in (*BEFOREHAND, *libraries):
        importlib.import_module(name)
    families = [(library, name) for library, one in libraries.items() for name in one.names()]
    families = [pair for pair in families if not given.only or pair[1] in given.only]
    verdicts = []
    for library, one in all_judged(families, given.jobs, given.seconds):
        verdicts.append((library, one))
        print(f"{library} {one.name}: {one.problem or f'{one.found} / {one.there}'}", file=sys.stderr, flush=True)
        if given.json:
            with Path(given.json).open("a") as out:
                out.write(json.dumps([library, one.as_dict()]) + "\n")
    print(table(verdicts))


if __name__ == "__main__":
    main()
