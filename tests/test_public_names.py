"""What users import, and what an import pulls in."""

from __future__ import annotations

import ast
import importlib
import subprocess
import sys
from pathlib import Path

import pytest

import torchprobe
from tests import warm

PACKAGE = Path(torchprobe.__file__).parent

# What each folder, or module beside them, may import: only what stands above it, so that nothing goes in a circle. What
# wires the others (`session`, `logger`) and what reads finished runs (`reports`, `cli`) comes last.
ALLOWED: dict[str, set[str]] = {
    "_version": set(),
    "messages": set(),  # every part may import it
    "arguments": set(),
    "naming": set(),
    "random_state": set(),
    "records": set(),
    "statistics": set(),
    "state": {"naming"},
    "pictures": {"records"},
    "writers": {"records"},
    "testing": {"writers"},
    "rules": {"arguments", "naming", "records"},
    "probes": {"arguments", "naming", "pictures", "records", "statistics"},
    "buffer": {"records", "statistics", "writers"},
    "capture": {"arguments", "buffer", "naming", "probes", "random_state", "records", "statistics"},
    "distributed": {"buffer", "naming", "probes", "records", "rules"},
    "steps": {"buffer", "capture", "naming", "probes", "records", "rules", "statistics"},
    "user_values": {"buffer", "statistics"},
    "logs": {"buffer", "records", "statistics", "steps", "user_values", "writers"},
    "control": {"arguments", "probes", "records", "rules", "steps"},
    "flight": {"_version", "records", "rules", "writers"},
    "description": {"buffer", "capture", "flight", "naming", "records", "rules", "steps"},
    "reports": {"writers"},
    "session": {
        *("arguments", "buffer", "capture", "control", "description", "distributed", "flight", "logs"),
        *("naming", "probes", "records", "reports", "rules", "state", "steps", "writers"),
    },
    "logger": {
        *(
            "arguments",
            "buffer",
            "capture",
            "logs",
            "naming",
            "probes",
            "records",
            "statistics",
            "steps",
            "user_values",
            "writers",
        ),
    },
    "finding": {"capture", "session", "writers"},
    "checkpoint": {"arguments", "distributed", "naming", "random_state", "records", "session", "state", "writers"},
    "integrations": {"session"},
    "cli": {"_version", "finding", "reports", "session", "writers"},
    "__main__": {"cli"},
}


def test_every_public_name_can_be_imported_and_is_documented():
    for name in torchprobe.__all__:
        value = getattr(torchprobe, name)
        assert name == "__version__" or value.__doc__, name
    assert set(torchprobe.__all__) == set(torchprobe._HOMES) | {"__version__"}


def test_type_checkers_see_every_public_name_where_it_comes_from():
    """`from module import Name as Name`: without `as` a name is private to them."""
    block = next(node for node in ast.parse((PACKAGE / "__init__.py").read_text()).body if isinstance(node, ast.If))
    seen = {alias.asname: node.module for node in block.body for alias in node.names}
    homes = {name: "torchprobe" if name == home else f"torchprobe.{home}" for name, home in torchprobe._HOMES.items()}
    assert seen == homes


@pytest.mark.parametrize(
    "name", ["testing.MemoryWriter", "random_state.set_random_state", "integrations", "statistics"]
)
def test_modules_of_the_public_interface_need_no_import_of_their_own(name):
    statement = f"import torchprobe; assert torchprobe.{name}.__doc__"
    subprocess.run([sys.executable, "-c", statement], check=True, timeout=120)


@pytest.mark.parametrize("installed", [True, False])
def test_an_adapter_is_imported_when_it_is_asked_for(tmp_path, installed):
    """Without Lightning's own seconds of import; the real one: `test_every_module_imports_by_itself`."""
    for name in ("lightning", "pytorch_lightning"):
        there = "class Callback: pass" if installed else "raise ImportError"
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text(there)
        (tmp_path / name / "pytorch.py").write_text(there)
    statement = (
        f"import sys; sys.path.insert(0, {str(tmp_path)!r}); import torchprobe; torchprobe.integrations.lightning"
    )
    result = subprocess.run([*warm.python(), "-c", statement], capture_output=True, text=True, timeout=120)
    assert not result.returncode if installed else "pip install lightning" in result.stderr, result.stderr


def test_an_unknown_adapter_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'keras'"):
        torchprobe.integrations.keras  # noqa: B018


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'watch'"):
        torchprobe.watch  # noqa: B018


@pytest.mark.parametrize("statement", ["import torchprobe", "import torchprobe; torchprobe.instrument"])
def test_importing_stays_light(statement):
    heavy = ["tensorboard", "PIL", "rich", "matplotlib", "torch.utils.tensorboard"]
    if ";" not in statement:
        heavy.append("torch")
    check = f"import sys; {statement}; print([m for m in {heavy!r} if m in sys.modules])"
    result = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=True, timeout=120)
    assert result.stdout.strip() == "[]"


def part_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def files_of(part: str) -> list[Path]:
    return [file for file in PACKAGE.rglob("*.py") if part_of(file) == part]


def imported_parts(path: Path) -> set[str]:
    """With those under TYPE_CHECKING, and in functions: a circle of types is one, too."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        modules = []
        if isinstance(node, ast.ImportFrom) and node.module:
            modules = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        found |= {m.split(".")[1] for m in modules if m.startswith("torchprobe.")}
    return found


@pytest.mark.parametrize("part", sorted(ALLOWED))
def test_imports_go_one_way(part):
    files = files_of(part)
    assert files
    for file in files:
        assert imported_parts(file) <= ALLOWED[part] | {part, "messages"}, file


def test_every_part_stands_in_the_table_and_imports_only_what_stands_above_it():
    assert set(ALLOWED) == {part_of(file) for file in PACKAGE.rglob("*.py")} - {"__init__"}
    above: set[str] = set()
    for part, allowed in ALLOWED.items():
        assert allowed <= above, part
        above.add(part)


def test_every_module_imports_by_itself():
    for file in PACKAGE.rglob("*.py"):
        if file.name != "__main__.py":
            name = ".".join(file.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__")
            try:
                assert importlib.import_module(name)
            except ImportError as error:  # an adapter without its framework, or kernels without their compiler
                if name == "torchprobe.statistics.kernels" and "triton" in str(error):
                    continue
                assert "pip install" in str(error) and name.startswith("torchprobe.integrations.")  # noqa: PT017, PT018
