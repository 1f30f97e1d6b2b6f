"""How large and how tangled the core is, of a commit or of the work tree: the table of docs and of the change log.

    python benchmarks/house.py                # the work tree
    python benchmarks/house.py 3c2a5a6 HEAD   # commits, each checked out to a temporary folder

Needs `coverage` (the extra `bench`). Each cell has these figures:

- core_file_lines: lines of `model/modeling.py`.
- largest_class: lines of the largest class of the core. The core is `model/` and `ops/` without `extras/` and
  `reference/`. Data and configuration do not count: `model/configuration.py` is left out.
- branches: `if` statements and conditional expressions on the core path: all files of `model/` but those that
  `OFF_PATH` names. `branches_by_file` has the parts.
- unused_statements: statements of the core that no preset executes, and their share of all statements of the core
  (`coverage` counts them; docstrings are none). The three presets run at small widths: building, saving and loading, a
  training step forward and back with padding and packed documents, reading in chunks and token by token, `generate`
  with and without beams, and a saved state. `raise` statements are left out. `unused_by_file` has the parts.
- per_token: of one token decoded by torch (preset `tiny`, after 512 bytes, mean of 32 tokens): operations that torch
  dispatches, calls of Python functions of the package, and moves between its files (calls and returns after which
  another file of the package runs than before; what runs in between outside the package does not count).
- setup_copies: functions of the package that read the text of a chunk themselves, which is where a copy of the set-up
  begins: those that call `read_text` on tokens. The engine, which has no torch, is not one of them.
"""

import argparse
import ast
import contextlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
OUTPUT = ROOT / "benchmarks" / "results" / "house.json"
WORK_TREE = "work tree"
OFF_PATH = {
    *("__init__", "boundaries", "cache", "companion", "configuration", "decoding", "extension", "loading", "outputs"),
    *("packing", "planner", "planning", "presets", "selector", "trace", "variants"),
}
TEXT = (
    "The quick brown fox jumps over the lazy dog. It's 12:30 now!\n\nA new paragraph begins here, with words; again "
    "the quick brown fox jumps over the lazy dog. ERROR 404: file not found\n2026-01-02 12:00:01 INFO started\n"
) * 12
TOKENS_READ, TOKENS_COUNTED = 512, 32


def core_files(package: Path) -> list[Path]:
    """Python files of model/ and ops/, without optional parts and the definitions that tests compare with."""
    found = [*package.glob("model/**/*.py"), *package.glob("ops/**/*.py")]
    return sorted(path for path in found if not {"extras", "reference"} & set(path.relative_to(package).parts))


def lines_of(node: ast.ClassDef) -> int:
    assert node.end_lineno is not None
    return node.end_lineno - node.lineno + 1


def reads_text(node: ast.AST) -> bool:
    """Whether a call reads the text of a chunk; `Path.read_text` takes no positional argument of that kind."""
    if not isinstance(node, ast.Call) or len(node.args) < 3:
        return False
    name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
    return name == "read_text"


def static_figures(package: Path) -> dict[str, Any]:
    """What the text of the source says."""
    trees = {path: ast.parse(path.read_text(encoding="utf-8")) for path in sorted(package.rglob("*.py"))}
    classes = [
        (lines_of(node), f"{path.relative_to(package)}:{node.name}")
        for path in core_files(package)
        if path.stem != "configuration"
        for node in ast.walk(trees[path])
        if isinstance(node, ast.ClassDef)
    ]
    branches = {
        str(path.relative_to(package)): sum(isinstance(node, ast.If | ast.IfExp) for node in ast.walk(trees[path]))
        for path in core_files(package)
        if path.relative_to(package).parts[0] == "model" and path.stem not in OFF_PATH
    }
    copies = sorted(
        f"{path.relative_to(package)}:{function.name}"
        for path, tree in trees.items()
        for function in ast.walk(tree)
        if path.relative_to(package).parts[0] != "engine"  # an implementation of its own
        if isinstance(function, ast.FunctionDef) and any(map(reads_text, ast.walk(function)))
    )
    if not copies:
        raise SystemExit("No function calls read_text; name here what reads the text of a chunk now.")
    largest, name = max(classes)
    return {
        "core_file_lines": len((package / "model/modeling.py").read_text(encoding="utf-8").splitlines()),
        "largest_class": largest,
        "largest_class_name": name,
        "branches": sum(branches.values()),
        "branches_by_file": {file: count for file, count in branches.items() if count},
        "setup_copies": len(copies),
        "setup_copies_in": copies,
    }


def run_presets() -> None:
    """Each preset at a small width: a training step, chunks, single tokens, `generate`, files."""
    import torch

    from dyadlm import DyadCache, DyadConfig, DyadForCausalLM
    from dyadlm.model.loading import load_weights
    from dyadlm.model.presets import PRESETS

    ids = torch.tensor(list(TEXT.encode()))
    for preset in PRESETS.keys() - {"paper"}:  # which has the extras on
        small = {"hidden_size": 32, "level_rank": 4, "num_hidden_layers": 2, "slot_entries": 64}
        with tempfile.TemporaryDirectory() as folder:
            DyadForCausalLM(DyadConfig.from_preset(preset, **small)).save_pretrained(folder)
            model = load_weights(folder)
            rows = ids[:192].view(2, 96)
            mask = torch.ones_like(rows)
            mask[0, :7] = 0
            positions = torch.arange(96).remainder(40).expand(2, -1)
            model.train()(rows, labels=rows).loss.backward()
            model(rows, labels=rows, attention_mask=mask).loss.backward()
            model(rows, labels=rows, position_ids=positions).loss.backward()
            model.eval()
            with torch.no_grad():
                cache, start = DyadCache(), 0
                for length in (64, 33, 1, 1, 1, 8, 1, 70):
                    model(ids[None, start : start + length], past_key_values=cache, use_cache=True)
                    start += length
                cache.save(Path(folder) / "state.safetensors", model.config)
                cache = DyadCache.load(Path(folder) / "state.safetensors", model.config)
                for t in range(start, start + 40):
                    model(ids[None, t : t + 1], past_key_values=cache, use_cache=True)
                cache.start_document()
                model(ids[None, :9], past_key_values=cache.copy(), use_cache=True)
                model.generate(rows, attention_mask=mask, max_new_tokens=4, do_sample=False)
                model.generate(rows, max_new_tokens=4, do_sample=False, num_beams=2)
                cache.batch_repeat_interleave(2)
                cache.to("cpu").batch_select_indices(torch.tensor([1]))
                assert cache.state_bytes() > 0
                cache.reset()
                model.set_progress(1.0)
            model.resize_token_embeddings(model.config.vocab_size + 1)


def unused_statements(package: Path) -> dict[str, Any]:
    """What `run_presets` does not execute. The package must not have been imported before."""
    import coverage

    measured = coverage.Coverage(data_file=None, include=[str(package / "*")])
    measured.exclude(r"^\s*raise\b")
    measured.start()
    try:
        run_presets()
    finally:
        measured.stop()
    statements, unused = 0, {}
    for path in core_files(package):
        _, known, _, missing, _ = measured.analysis2(str(path))
        statements += len(known)
        if missing:
            unused[str(path.relative_to(package))] = len(missing)
    total = sum(unused.values())
    return {
        "statements": statements,
        "unused_statements": total,
        "unused_share": round(total / statements, 4),
        "unused_by_file": unused,
    }


def per_token(package: Path) -> dict[str, float]:
    """Operations, calls and moves between files of a decoded token, by torch."""
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode

    from dyadlm import DyadCache, DyadConfig, DyadForCausalLM

    class Counter(TorchDispatchMode):
        count = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            self.count += 1
            return func(*args, **(kwargs or {}))

    torch.manual_seed(0)
    model, cache = DyadForCausalLM(DyadConfig.from_preset("tiny")).eval(), DyadCache()
    ids = torch.tensor([list(TEXT.encode()[: TOKENS_READ + 2 * TOKENS_COUNTED])])
    prefix, calls, stack, moves = str(package) + os.sep, 0, [""], 0

    def profile(frame: Any, event: str, _argument: Any) -> None:
        nonlocal calls, moves
        if event not in ("call", "return") or not frame.f_code.co_filename.startswith(prefix):
            return
        before = stack[-1]
        if event == "call":
            calls += 1
            stack.append(frame.f_code.co_filename)
        else:
            stack.pop()
        moves += before != stack[-1]

    with torch.no_grad():
        model(ids[:, :TOKENS_READ], past_key_values=cache, use_cache=True)
        with Counter() as counter:
            for t in range(TOKENS_READ, TOKENS_READ + TOKENS_COUNTED):
                model(ids[:, t : t + 1], past_key_values=cache, use_cache=True)
        for t in range(TOKENS_READ + TOKENS_COUNTED, TOKENS_READ + 2 * TOKENS_COUNTED):
            token = ids[:, t : t + 1]
            sys.setprofile(profile)
            model(token, past_key_values=cache, use_cache=True)
            sys.setprofile(None)
    return {
        "operations": round(counter.count / TOKENS_COUNTED, 1),
        "python_calls": round(calls / TOKENS_COUNTED, 1),
        "file_moves": round(moves / TOKENS_COUNTED, 1),
    }


@contextlib.contextmanager
def checked_out(revision: str) -> Iterator[Path]:
    """The folder of a commit's files; the work tree itself for WORK_TREE."""
    if revision == WORK_TREE:
        yield ROOT
        return
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder) / "tree"
        subprocess.run(["git", "worktree", "add", "--quiet", "--detach", str(place), revision], cwd=ROOT, check=True)
        try:
            yield place
        finally:
            subprocess.run(["git", "worktree", "remove", "--force", str(place)], cwd=ROOT, check=True)


def in_a_process(part: str, tree: Path) -> dict[str, Any]:
    """A part measured in a process that imports the package of a tree."""
    command = [sys.executable, __file__, "--part", part, str(tree)]
    environment = {**os.environ, "PYTHONPATH": str(tree / "src"), "OMP_NUM_THREADS": "1"}
    run = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    result: dict[str, Any] = json.loads(run.stdout.splitlines()[-1])
    return result


def commit_of(tree: Path) -> str:
    command = ["git", "describe", "--always", "--dirty", "--exclude=*"]
    return subprocess.run(command, cwd=tree, capture_output=True, text=True, check=True).stdout.strip()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("revisions", nargs="*", default=[WORK_TREE], help="commits; none: the work tree")
    parser.add_argument("--output", type=Path, default=OUTPUT)
    parser.add_argument("--part", choices=("unused", "token"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.part:
        package = Path(options.revisions[0]) / "src" / "dyadlm"
        print(json.dumps(unused_statements(package) if options.part == "unused" else per_token(package)))
        return
    cells = json.loads(options.output.read_text())["cells"] if options.output.exists() else {}
    for revision in options.revisions:
        with checked_out(revision) as tree:
            result = {
                "commit": commit_of(tree),
                **static_figures(tree / "src" / "dyadlm"),
                **in_a_process("unused", tree),
                "per_token": in_a_process("token", tree),
            }
        print(json.dumps({revision: result}, indent=1))
        cells[revision] = result
        options.output.write_text(json.dumps({"cells": cells}, indent=1) + "\n")


if __name__ == "__main__":
    main()
