"""The shape of the code base: layers, file sizes, who may import what."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SOURCES = sorted(
    path
    for folder in ("mapreduce", "peer", "neurons", "examples")
    for path in (ROOT / folder).rglob("*.py")
)
TESTS = sorted((ROOT / "test").rglob("*.py"))
MAX_LINES = 500

# From the bottom up; a module imports its own layer and those below.
LAYERS = (
    ("mapreduce.errors", "mapreduce.core", "mapreduce.wire", "mapreduce.config"),
    (
        "mapreduce.net",
        "mapreduce.chain",
        "mapreduce.store",
        "mapreduce.logs",
        "mapreduce.commands",
        "mapreduce.processes",
        "mapreduce.ranks",
        "mapreduce.releases",
    ),
    ("mapreduce.services",),
    (
        "mapreduce.local",
        "mapreduce.local_chain",
        "mapreduce.local_checkout",
        "mapreduce.demo",
        "mapreduce.demo_incentive",
        "mapreduce.score",
        "mapreduce.selfcheck",
        "mapreduce.speedtest",
        "mapreduce.verify",
        "peer",
        "neurons",
        "examples",
    ),
)
PURE = ("mapreduce.core", "mapreduce.wire")
IMPURE = {"asyncio", "socket", "time", "aiohttp", "bittensor", "torch", "sqlite3", "threading"}
MAY_IMPORT_BITTENSOR = ("mapreduce.chain", "mapreduce.net.auth", "examples")


def module_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def within(module: str, prefixes: tuple[str, ...]) -> bool:
    return any(module == prefix or module.startswith(prefix + ".") for prefix in prefixes)


def layer_of(module: str) -> int | None:
    for level, prefixes in enumerate(LAYERS):
        if within(module, prefixes):
            return level
    return None


def runtime_imports(path: Path) -> set[str]:
    """What a module imports when it runs; imports for type checkers are no dependency."""
    found: set[str] = set()

    def visit(node: ast.AST) -> None:
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            return
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found.update(f"{node.module}.{alias.name}" for alias in node.names)
        for child in ast.iter_child_nodes(node):
            visit(child)

    visit(ast.parse(path.read_text()))
    return found


@pytest.mark.parametrize("path", SOURCES, ids=module_of)
def test_imports_go_down_only(path: Path) -> None:
    module = module_of(path)
    if module in ("mapreduce", "mapreduce.launcher"):
        return
    level = layer_of(module)
    assert level is not None, f"{module} belongs to no layer: add it to LAYERS"
    for imported in runtime_imports(path):
        above = layer_of(imported)
        assert above is None or above <= level, f"{module} imports {imported} from above"


@pytest.mark.parametrize("path", SOURCES, ids=module_of)
def test_only_adapters_know_the_outside(path: Path) -> None:
    module = module_of(path)
    roots = {name.partition(".")[0] for name in runtime_imports(path)}
    if within(module, PURE):
        assert not roots & IMPURE
    if not within(module, MAY_IMPORT_BITTENSOR):
        assert "bittensor" not in roots


@pytest.mark.parametrize("path", SOURCES + TESTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_file_is_too_long(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= MAX_LINES


def test_neurons_are_thin() -> None:
    for path in (ROOT / "neurons").glob("*.py"):
        assert len(path.read_text().splitlines()) <= 60


@pytest.mark.parametrize("path", [p for p in SOURCES if "examples" not in p.parts], ids=module_of)
def test_every_module_says_what_it_knows(path: Path) -> None:
    tree = ast.parse(path.read_text())
    assert ast.get_docstring(tree)
    if not within(module_of(path), (*PURE[:1], "peer")):
        return
    for node in ast.walk(tree):
        if isinstance(node, (ast.ClassDef, ast.FunctionDef)) and not node.name.startswith("_"):
            assert ast.get_docstring(node) or node.name == "allocate", f"{node.name} has none"


def test_importing_the_package_is_light() -> None:
    code = (  # the neurons' scripts: a supervisor stays as light as they are
        "import sys, mapreduce, mapreduce.config, mapreduce.chain; "
        "from neurons import all, benchmark, miner, validator; "
        "print(sorted({'torch', 'bittensor', 'aiohttp'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
