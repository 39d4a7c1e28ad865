"""What a run was: the model, what it ran with, and the state of its code, with no environment variable, user or host;
and what a session says of itself."""

from __future__ import annotations

import getpass
import json
import math
import os
import re
import socket
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn
from torch.nn.parameter import is_lazy

from torchprobe.buffer.outlet import Outlet
from torchprobe.capture.sharding import flat_shares
from torchprobe.flight import RUNNING, versions
from torchprobe.naming import named_modules, named_parameters
from torchprobe.records import Text, Value
from torchprobe.rules.watch import Watch
from torchprobe.steps.recorder import Recorder

TAG = "torchprobe/run"
HIDDEN = "***"
_KNOWN = ("torchprobe", "torch", "python", "cuda")  # of `versions`, which also has the platform
_MOST_MODULES = 1000
_GIT_SECONDS = 2.0
_SECRET = r"[\w.-]*(?:key|token|password|passwd|secret|credential)s?"
_OPTION = re.compile(rf"--?{_SECRET}", re.IGNORECASE)
_ASSIGNED = re.compile(
    rf"((?:^|[\s,{{?&;+-])[\"']?{_SECRET}[\"']?\s*[:=]\s*)(\"[^\"]*\"|'[^']*'|[^\s,}}&]+)", re.IGNORECASE
)
_IN_URL = re.compile(r"(://)[^/@\s]*@")
_HOMES = re.compile(r"(?<![\w.])/(?:home|Users)/[^/\s:,]+")


def described(model: nn.Module, hparams: Mapping[str, Any] | None, ranks: int) -> Callable[[], Mapping[str, Value]]:
    """What goes with a run's first record: that it runs, and what it is.

    Called once, in the drain thread, where git is asked for the commit and whether files that it knows have changed.
    """
    argv = [str(word) for word in getattr(sys, "argv", ())]  # a program that Python is a part of may have none
    facts = {
        **_of_model(model),
        "ranks": ranks,
        "versions": {name: version for name, version in versions().items() if name in _KNOWN},
        "script": Path(argv[0]).name if argv else "",
        "options": [*hidden_options(argv[1:])],
        "hparams": {name: hidden_value(name, value) for name, value in (hparams or {}).items()},
    }
    script = getattr(sys.modules.get("__main__"), "__file__", None)
    code = [*([Path(script).resolve().parent] if script else []), Path.cwd()]  # beside the script, or where it started

    def announced() -> Mapping[str, Value]:
        return {**RUNNING, TAG: Text(page({**facts, "git": git_state(code)}))}

    return announced


def page(facts: Mapping[str, Any]) -> str:
    """Markdown for people; the last block holds the facts for programs, as JSON."""
    git, count = facts["git"], facts["parameters"]
    commit = f"{git['commit']}{' (dirty)' if git['dirty'] else ''}" if git else "not known"
    lines = {
        "model": facts["model"],
        "parameters": f"{count['trained']:,} trained, {count['frozen']:,} frozen",
        "device": ", ".join(facts["devices"]),
        "precision": ", ".join(facts["precision"]),
        "ranks": facts["ranks"],
        "script": " ".join([facts["script"], *facts["options"]]),
        "git commit": commit,
        **facts["versions"],
        **facts["hparams"],
    }
    table = "".join(f"| {name} | `{_cell(value)}` |\n" for name, value in lines.items())
    tree = "\n".join(map(_branch, facts["modules"]))
    return f"|  |  |\n| --- | --- |\n{table}\n```\n{tree}\n```\n\n```json\n{json.dumps(facts)}\n```\n"


def _cell(value: object) -> str:
    return " ".join(str(value).replace("|", "\\|").replace("`", "'").split())


def _branch(module: Mapping[str, Any]) -> str:
    shapes = ", ".join(f"{name} {tuple(shape) if shape else '()'}" for name, shape in module["shapes"].items())
    depth = 0 if module["name"] == "root" else module["name"].count(".") + 1
    return f"{'  ' * depth}{module['name'].rpartition('.')[2]}: {module['class']}{f' ({shapes})' if shapes else ''}"


# ---- the model


def _of_model(model: nn.Module) -> dict[str, Any]:
    shares, sizes = flat_shares(model), Counter[bool]()
    parameters = [p for _, p in named_parameters(model) if not is_lazy(p)]
    for p in parameters:
        sizes[p.requires_grad] += shares[id(p)].whole if id(p) in shares else p.numel()
    modules = named_modules(model)
    return {
        "model": type(model).__name__,
        "parameters": {"trained": sizes[True], "frozen": sizes[False]},
        "devices": sorted(map(str, {p.device for p in parameters})),
        "precision": sorted(str(dtype).removeprefix("torch.") for dtype in {p.dtype for p in parameters}),
        "modules": [_of_module(name, module) for name, module in modules[:_MOST_MODULES]],
        "modules_left_out": max(len(modules) - _MOST_MODULES, 0),
    }


def _of_module(name: str, module: nn.Module) -> dict[str, Any]:
    own = module._parameters.items()
    shapes = {name: None if is_lazy(p) else list(p.shape) for name, p in own if p is not None}
    return {"name": name, "class": type(module).__name__, "shapes": shapes}


# ---- the program


def hidden_options(options: Sequence[str]) -> Iterator[str]:
    """Options without the values of those that hold a key, token, password or secret, or the name of user or host."""
    secret = False
    for option in options:
        if option.startswith("-") and not _is_number(option):
            secret = _OPTION.fullmatch(option) is not None
            yield hidden_names(option)
        else:
            yield HIDDEN if secret else hidden_names(option)


def hidden_value(name: str, value: Any) -> Any:
    """The value of a hyperparameter, likewise."""
    if re.fullmatch(_SECRET, name, re.IGNORECASE):
        return HIDDEN
    strange = isinstance(value, float) and not math.isfinite(value)  # JSON has no name for it
    return hidden_names(str(value)) if isinstance(value, str) or strange else value


def hidden_names(text: str) -> str:
    """Text without values that are assigned to secrets in it, passwords in URLs, home directories, user and host."""
    text = _IN_URL.sub(rf"\1{HIDDEN}@", _ASSIGNED.sub(rf"\1{HIDDEN}", text))
    text = _HOMES.sub("~", re.sub(rf"{re.escape(str(Path.home()))}(?=/|$)", "~", text))
    for name in _own_names():
        text = re.sub(rf"(?<!\w){re.escape(name)}(?!\w)", HIDDEN, text)
    return text


def _own_names() -> Iterator[str]:
    for ask in (getpass.getuser, socket.gethostname):
        try:
            name = ask()
        except (OSError, KeyError, ImportError):  # a container may have no user
            continue
        if len(name) > 2 and name not in ("root", "localhost"):
            yield name


def _is_number(option: str) -> bool:
    try:
        float(option)
    except ValueError:
        return False
    return True


def git_state(places: Sequence[Path]) -> dict[str, Any] | None:
    """The commit and whether tracked files differ from it, of the first of these folders that is in a repository."""
    for place in places:
        commit = _git(place, "rev-parse", "--verify", "HEAD")
        if commit:
            status = _git(place, "status", "--porcelain", "--untracked-files=no")
            return {"commit": commit, "dirty": None if status is None else bool(status)}
    return None


def _git(place: Path, *arguments: str) -> str | None:
    command = ["git", "-C", str(place), "-c", "core.fsmonitor=false", *arguments]
    environment = {**os.environ, "GIT_OPTIONAL_LOCKS": "0"}  # it writes nothing then
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=_GIT_SECONDS, env=environment, check=False
        )
    except (OSError, subprocess.SubprocessError, ValueError):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


# ---- a session's summary


def state_lines(recorder: Recorder, outlet: Outlet, watch: Watch) -> Iterator[str]:
    """Lines of a session's summary: what it costs, what was lost, what was never seen."""
    yield f"  time in probes    {recorder.guard.meter.seconds:.3f} s"
    yield f"  skipped steps     {recorder.clock.skipped + outlet.decoder.skipped}"
    yield f"  dropped records   {outlet.drain.dropped}"
    yield f"  alerts            {watch.count}"
    yield from (f"  {fault}" for fault in (*recorder.faults(), *outlet.faults, *watch.faults))
    if captured := recorder.guard.captured["_before"]:
        yield f"  captured steps    {captured}, in graphs of the device: for what replays record see docs/devices.md"
    yield from outlet.drain.ranks
    if outlet.decoder.missing:
        yield f"  nothing captured  {', '.join(outlet.decoder.missing)}"
    yield from (f"  not recorded      {line}" for line in outlet.decoder.unsaid)
    yield from (f"  remark            {remark}. {remark.advice}" for remark in watch.remarks)
    yield from (f"  attention not seen  {what}" for what in recorder.uncovered_attention())
