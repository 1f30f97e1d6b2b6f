"""Imports go one way, as docs/architecture.md says."""

import ast
from pathlib import Path

import pytest

SOURCE = Path(__file__).parent.parent / "src" / "dyadlm"
# Packages of one row may import those of the same row, and all above.
ROWS = (
    ("ops",),
    ("kernels",),
    ("model",),
    ("engine", "causal_lm", "accounting", "memory", "peer_ngrams"),
    ("data",),
    ("generate", "evaluate", "train", "recall", "score"),
    ("diagnose",),
    ("zoo",),
    ("compare",),
    ("report",),
    ("serve",),
    ("cli",),
)
ROW = {name: number for number, row in enumerate(ROWS) for name in row}
# Modules that anything may import; they import nothing of the package but each other.
FREE = {
    "cluster",
    "compilation",
    "console",
    "errors",
    "files",
    "lazy",
    "registration",
    "shipped",
    "state_file",
    "values",
    "version",
    "workers",
}


def imports(path: Path, top_alone: bool, source: str | None = None) -> set[str]:
    """The modules of dyadlm, torch and transformers that a file imports, relative imports resolved.

    top_alone: what importing the file imports: not what functions import when they are called, nor what stands there
    for types. Imports in `try`, `if` and `with` count.
    """
    own = (
        ["dyadlm", *path.relative_to(SOURCE).with_suffix("").parts] if path.is_relative_to(SOURCE) else ["dyadlm", "x"]
    )
    found = set()
    waiting: list[ast.AST] = list(ast.parse(path.read_text() if source is None else source).body)
    while waiting:
        node = waiting.pop()
        if top_alone and isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            waiting += node.orelse if top_alone else node.body + node.orelse
            continue
        if isinstance(node, ast.ImportFrom):
            above = own[: len(own) - node.level] if node.level else []
            module = ".".join([*above, *([node.module] if node.module else [])])
            # `from dyadlm import model` and `from dyadlm import DyadConfig` (which is lazy, and of the model).
            found |= {f"{module}.{alias.name}" for alias in node.names} if module == "dyadlm" else {module}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        else:
            waiting += ast.iter_child_nodes(node)
    return {name for name in found if name.split(".")[0] in ("dyadlm", "torch", "transformers")}


def row_of(name: str) -> int | None:
    """The row of a module of dyadlm by its name, None for one that anything may import."""
    part = name.split(".")[1] if "." in name else ""
    if part in FREE or part.startswith("__"):
        return None
    return ROW.get(part, ROW["model"])  # the names that the package itself gives are those of the model


FILES = [path for path in sorted(SOURCE.rglob("*.py")) if path.relative_to(SOURCE).with_suffix("").parts[0] in ROW]


def upward(path: Path, source: str | None = None) -> list[str]:
    """What a file imports of rows below its own."""
    own = ROW[path.relative_to(SOURCE).with_suffix("").parts[0]]
    names = [name for name in imports(path, True, source) if name.startswith("dyadlm")]
    return [name for name in names if (row := row_of(name)) is not None and row > own]


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(SOURCE)))
def test_nothing_imports_upward(path):
    assert not upward(path)


@pytest.mark.parametrize("name", sorted(FREE))
def test_what_anything_may_import_imports_nothing_of_the_rows(name):
    names = imports(SOURCE / f"{name}.py", top_alone=True)
    assert not [name for name in names if name.startswith("dyadlm") and row_of(name) is not None]
    assert not [name for name in names if name.startswith(("torch", "transformers"))]


@pytest.mark.parametrize(
    "source",
    [
        "from dyadlm.train import run",
        "import dyadlm.train.run",
        "from ..train import run",
        "from dyadlm import train",
        "try:\n    from dyadlm.cli import app\nexcept ImportError:\n    pass",
        "if True:\n    from dyadlm.report import summary",
        "class A:\n    from dyadlm.report import summary",
    ],
)
def test_the_check_sees_imports_in_every_form(source):
    assert upward(SOURCE / "model" / "block.py", source)


def test_the_check_passes_over_functions_and_types():
    source = "def f():\n    from dyadlm.train import run\nif TYPE_CHECKING:\n    from dyadlm.train import run"
    assert not upward(SOURCE / "model" / "block.py", source)


def test_the_core_imports_no_extra():
    core = [path for path in (SOURCE / "model").rglob("*.py") if "extras" not in path.parts]
    for path in core:
        assert not any(name.startswith("dyadlm.model.extras") for name in imports(path, top_alone=False)), path


def test_the_engine_imports_neither_torch_nor_the_model():
    for path in (SOURCE / "engine").glob("*.py"):
        if path.name != "bridge.py":
            names = imports(path, top_alone=False)
            assert not any(name.startswith(("torch", "transformers", "dyadlm.model")) for name in names), path
