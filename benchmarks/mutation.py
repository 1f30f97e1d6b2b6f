"""How many small faults do the tests find? A sample of mutants of the files that must not be wrong, and the survivors.

    python benchmarks/mutation.py                      # all targets; goes on where it stopped
    python benchmarks/mutation.py ops/slots.py --most 80

Needs `pip install cosmic-ray` (8.7.0 was used), which makes the mutants: another comparison or arithmetic operator, a
number changed by one, `and` for `or`, a condition negated, a loop without rounds, a decorator left out, another
exception caught. Two operators are added here: a statement left out, and `return None`.
Of each place that can be mutated one mutant is drawn, and of the places a sample, both by the seed.
Annotations, asserts and blocks for type checkers are left out: no test is meant to notice them.

Each mutant runs in a process forked from one that has imported torch, in a copy of the tree; the tests are those that
`TARGETS` names for its file, the fast ones first. Outcomes:

- killed: a test fails.        - timeout: the tests take three times as long as without a mutant; counted as killed.
- survived: all tests pass.    - incompetent: the package or the tests cannot be imported; not counted.

The rate is killed / (killed + survived), without the survivors that `mutation_equivalents.json` says do the same as
the original, each with its reason. Killed mutants are not run again while their file is unchanged; survivors are when
a file of their tests has changed.
"""

import argparse
import ast
import contextlib
import difflib
import gc
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

# Before torch and Hugging Face are imported; their settings go to all forks.
os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import parso.python.tree as syntax
from cosmic_ray.ast import ast_nodes, get_ast
from cosmic_ray.mutating import mutate_code
from cosmic_ray.operators.operator import Operator
from cosmic_ray.plugins import get_operator

ROOT = Path(__file__).resolve().parent.parent
OUTPUT = ROOT / "benchmarks" / "results" / "mutation.json"
TABLE = OUTPUT.with_suffix(".md")
EQUIVALENTS = ROOT / "benchmarks" / "mutation_equivalents.json"
PACKAGE = "src/dyadlm"

GENERATE = ("tests/generate",)
STREAMING = "tests/model/test_streaming.py::"
STATES = (
    *("tests/model/test_cache.py", "tests/engine/test_state_files.py", "tests/generate/test_memory.py"),
    *(
        f"{STREAMING}test_saved_and_restored_state_continues_as_if_never_interrupted[{name}]"
        for name in ("everything", "planner")
    ),
    f"{STREAMING}test_rows_can_be_reordered_repeated_and_sliced",
    f"{STREAMING}test_a_token_writes_into_the_tables_that_the_state_owns_and_into_no_others",
    f"{STREAMING}test_where_gradients_are_on_a_token_writes_into_copies",
    f"{STREAMING}test_a_state_that_is_reset_starts_anew",
    "tests/engine/test_bridge.py",
)
RUN = "tests/train/test_run.py::test_"
CHECKPOINTS = (
    "tests/train/test_parts.py",
    f"{RUN}resume_refuses_another_run",
    f"{RUN}resume_passes_over_damaged_checkpoints",
)
TRAINER = (
    f"{RUN}run_leaves_a_loadable_model_and_complete_checkpoints",
    f"{RUN}checkpoints_are_read_back_without_pickles",
    f"{RUN}resumed_run_has_the_weights_of_an_uninterrupted_one",
    f"{RUN}a_model_that_cannot_be_put_in_place_is_put_there_by_resume",
    f"{RUN}changed_learning_rate_holds_after_resume",
    f"{RUN}changed_values_of_the_optimizer_hold_after_resume",
    f"{RUN}changed_steps_hold_after_resume",
    f"{RUN}checkpoint_is_complete_before_evaluation_begins",
    f"{RUN}loss_that_is_not_finite_stops_and_names_the_last_good_checkpoint",
    f"{RUN}every_way_of_feeding_resumes_bit_equal",
    "tests/train/test_verification.py",
    "tests/train/test_companions.py",
)
# By group: the files, and the tests that are about them.
TARGETS: dict[str, dict[str, tuple[str, ...]]] = {
    "ops": {
        "ops/blocks.py": ("tests/ops/test_pyramid.py",),
        "ops/centroids.py": ("tests/ops/test_pyramid.py",),
        "ops/clock.py": ("tests/ops/test_pyramid.py", "tests/ops/test_segments.py"),
        "ops/consensus.py": ("tests/ops/test_consensus.py",),
        "ops/contexts.py": ("tests/ops/test_contexts.py",),
        "ops/pyramid.py": ("tests/ops/test_pyramid.py",),
        "ops/recurrence.py": ("tests/ops/test_recurrence.py",),
        "ops/segments.py": ("tests/ops/test_segments.py",),
        "ops/selection.py": ("tests/ops/test_selection.py",),
        "ops/sliding.py": ("tests/ops/test_pyramid.py",),
        "ops/slots.py": ("tests/ops/test_slots.py",),
        "ops/transport.py": ("tests/ops/test_transport.py",),
    },
    "model/cache.py": {"model/cache.py": STATES},
    "checkpoints": {
        "train/checkpoint.py": CHECKPOINTS,
        "train/companions.py": ("tests/train/test_companions.py", "tests/train/test_fingerprint.py"),
        "train/verification.py": ("tests/train/test_verification.py",),
        "train/checkpointing.py": TRAINER,
        "train/damage.py": ("tests/train/test_verification.py", *TRAINER),
        "train/optimizer.py": ("tests/train/test_parts.py",),
    },
    "data/preparation.py": {
        "data/preparation.py": ("tests/data/test_prepare.py",),
        "data/split_writer.py": ("tests/data/test_prepare.py",),
    },
    "generate": {
        "generate/decoding.py": GENERATE,
        "generate/engine_reader.py": ("tests/test_start.py", *GENERATE),
        "generate/pretrained.py": GENERATE,
        "generate/sampling.py": GENERATE,
        "generate/session.py": GENERATE,
        "generate/speculation.py": ("tests/generate/test_speculation.py",),
        "generate/states.py": GENERATE,
        "generate/streaming.py": GENERATE,
        "generate/torch_reader.py": GENERATE,
    },
}
# Mutants a file; more of the files that are a target of their own.
MOST = 12
MOST_OF = {"model/cache.py": 40, "data/preparation.py": 30, "train/checkpoint.py": 20, "ops/slots.py": 20}
# Those that differ least from the original, and so are hardest to notice.
BINARY = "Add_Sub Sub_Add Mul_Div Div_Mul FloorDiv_Div Mod_FloorDiv Pow_Mul LShift_RShift RShift_LShift BitAnd_BitOr"
COMPARISON = "Lt_LtE LtE_Lt Gt_GtE GtE_Gt Eq_NotEq NotEq_Eq Is_IsNot IsNot_Is"
OPERATORS = (
    *(f"core/ReplaceBinaryOperator_{pair}" for pair in (*BINARY.split(), "BitOr_BitAnd", "BitXor_BitAnd")),
    *(f"core/ReplaceComparisonOperator_{pair}" for pair in COMPARISON.split()),
    *(f"core/ReplaceUnaryOperator_Delete_{name}" for name in ("Not", "USub", "Invert")),
    *("core/AddNot", "core/ReplaceTrueWithFalse", "core/ReplaceFalseWithTrue", "core/ReplaceAndWithOr"),
    *("core/ReplaceOrWithAnd", "core/ReplaceBreakWithContinue", "core/ReplaceContinueWithBreak"),
    *("core/ExceptionReplacer", "core/NumberReplacer", "core/RemoveDecorator", "core/ZeroIterationForLoop"),
    *("LeaveOutStatement", "ReturnNone"),
)
# What takes long to import and is no part of the package.
PRELOADED = (
    *("torch", "torch.utils._python_dispatch", "torch._dynamo", "numpy", "numba", "datasets", "tokenizers"),
    *("safetensors.torch", "accelerate", "transformers", "transformers.generation", "transformers.modeling_utils"),
    *("transformers.trainer", "hypothesis", "pytest", "rich.console", "typer", "pyarrow.parquet"),
    *("transformers.models.llama.modeling_llama", "transformers.models.auto.modeling_auto", "torch.utils.tensorboard"),
)
# Exit codes of pytest: no test has the mark; tests or their set-up cannot be imported.
NO_TESTS, CANNOT_IMPORT = 5, (2, 4)


class LeaveOutStatement(Operator):
    """`pass` for a call, an assignment to an attribute or an item, an assignment like `+=`, or a `raise`."""

    def mutation_positions(self, node: Any) -> Iterator[tuple[Any, Any]]:
        if node.type == "simple_stmt" and self._may_go(node.children[0]):
            yield node.children[0].start_pos, node.children[0].end_pos

    def mutate(self, node: Any, index: int) -> Any:
        first = node.children[0]
        node.children[0] = syntax.Keyword("pass", first.start_pos, first.get_first_leaf().prefix)
        return node

    def _may_go(self, statement: Any) -> bool:
        if statement.type == "expr_stmt":
            target, sign = statement.children[0], statement.children[1]
            augmented = getattr(sign, "value", "=") != "=" and sign.type == "operator"
            return augmented or target.type in ("atom_expr", "power")
        return statement.type in ("atom_expr", "power", "raise_stmt")

    @classmethod
    def examples(cls) -> Sequence[Any]:
        return ()


class ReturnNone(Operator):
    """`return None` for what a function returns."""

    def mutation_positions(self, node: Any) -> Iterator[tuple[Any, Any]]:
        if node.type == "return_stmt" and node.children[1].get_code().strip() != "None":
            yield node.start_pos, node.end_pos

    def mutate(self, node: Any, index: int) -> Any:
        node.children[1] = syntax.Name("None", node.children[1].start_pos, " ")
        return node

    @classmethod
    def examples(cls) -> Sequence[Any]:
        return ()


class Mutant(NamedTuple):
    """One change of a file. number: which of the places where the operator fits. begin: (line, column)."""

    operator: str
    number: int
    begin: tuple[int, int]

    @property
    def key(self) -> str:
        return f"{self.begin[0]}:{self.begin[1]} {self.operator.removeprefix('core/')} {self.number}"

    def code(self, source: str) -> str:
        changed: str | None = mutate_code(source, operator_of(self.operator), self.number)
        assert changed is not None, f"{self} was found in this source"
        return changed


def operator_of(name: str) -> Operator:
    own = {kind.__name__: kind for kind in (LeaveOutStatement, ReturnNone)}
    return own[name]() if name in own else get_operator(name)()


# ---- Mutants of a file


def unnoticed(source: str) -> list[tuple[tuple[int, int], tuple[int, int]]]:
    """Where no test is meant to notice a change: annotations, asserts, blocks for type checkers; begin and end."""
    found: list[ast.expr | ast.stmt | None] = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.arg | ast.AnnAssign):
            found.append(node.annotation)
        elif isinstance(node, ast.FunctionDef):
            found.append(node.returns)
        elif isinstance(node, ast.Assert) or (isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)):
            found.append(node)
    return [
        ((node.lineno, node.col_offset), (node.end_lineno or 0, node.end_col_offset or 0))
        for node in found
        if node is not None
    ]


def places(source: str) -> list[list[Mutant]]:
    """All places of a file, each with the mutants to choose from, in the order of the text."""
    hidden = unnoticed(source)
    nodes = list(ast_nodes(get_ast(source)))
    found: dict[tuple[Any, str], list[Mutant]] = {}
    for name in OPERATORS:
        operator = operator_of(name)
        positions = [position for node in nodes for position in operator.mutation_positions(node)]
        for number, (begin, end) in enumerate(positions):
            if not any(first <= begin and end <= last for first, last in hidden):
                found.setdefault((begin, name.split("_")[0]), []).append(Mutant(name, number, begin))
    return [found[place] for place in sorted(found)]


def separators(source: str) -> set[tuple[int, int]]:
    """Where `*` and `/` stand between parameters; cosmic-ray takes them for operators."""
    return {node.start_pos for node in ast_nodes(get_ast(source)) if node.parent and node.parent.type == "parameters"}


def sample(file: str, source: str, most: int, seed: int) -> list[Mutant]:
    """At most so many mutants of a file, of different places. A larger sample holds the smaller ones."""
    everywhere, marks = places(source), separators(source)
    order = random.Random(f"{seed} {file}").sample(range(len(everywhere)), len(everywhere))
    chosen = [random.Random(f"{seed} {file} {place}").choice(everywhere[place]) for place in sorted(order[:most])]
    return [mutant for mutant in chosen if mutant.begin not in marks]


def difference(source: str, changed: str) -> tuple[int, str, str]:
    """The first line that differs, and the lines before and after."""
    old, new = source.splitlines(), changed.splitlines()
    blocks = [block for block in difflib.SequenceMatcher(None, old, new, False).get_opcodes() if block[0] != "equal"]
    _, begin, end, new_begin, new_end = blocks[0]
    return begin + 1, "\n".join(old[begin:end]).strip(), "\n".join(new[new_begin:new_end]).strip()


# ---- Running the tests


@contextlib.contextmanager
def copied_tree() -> Iterator[Path]:
    """A copy of what git knows or would add, without results."""
    listed = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z", "src", "tests", "pyproject.toml"]
    names = subprocess.run(listed, cwd=ROOT, capture_output=True, check=True).stdout.decode().split("\0")
    with tempfile.TemporaryDirectory(prefix="mutation-") as folder:
        tree = Path(folder) / "tree"
        for name in filter(None, names):
            (tree / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, tree / name)
        yield tree


def run_tests(tree: Path, tests: Sequence[str], marks: str, limit: float | None) -> int | None:
    """pytest's exit code in a fork of this process, which has not imported the package; None if it took too long."""
    child = os.fork()
    if child == 0:
        os.setsid()
        silence = os.open(os.devnull if limit else tree.parent / "output", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(silence, 1)
        os.dup2(silence, 2)
        os.chdir(tree)
        sys.path.insert(0, str(tree / "src"))
        os.environ["PYTHONPATH"] = str(tree / "src")
        # Of a mutant no bytecode may be left: it could be taken for that of the next one.
        sys.dont_write_bytecode = limit is not None
        if sys.dont_write_bytecode:
            os.environ["PYTHONDONTWRITEBYTECODE"] = "1"
        code = 1
        try:
            import hypothesis
            import pytest

            # A failure is enough; nobody looks for the smallest example of it.
            phases = (hypothesis.Phase.explicit, hypothesis.Phase.generate)
            hypothesis.settings.register_profile("mutants", phases=phases, derandomize=True, database=None)
            hypothesis.settings.load_profile("mutants")
            # Plugins of pytest that were imported before are not rewritten, which is a warning.
            loaded = ("-W", "ignore::pytest.PytestAssertRewriteWarning")
            options = ("-x", "-p", "no:cacheprovider", "-m", marks, "--timeout", "0", "--tb", "short", *loaded)
            code = int(pytest.main([*options, "--basetemp", str(tree.parent / "temporary"), *tests]))
        except BaseException:  # a fork must never go on as its parent would
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    begin = time.monotonic()
    while True:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended or (limit is not None and time.monotonic() - begin > limit):
            with contextlib.suppress(ProcessLookupError):  # and what the tests have started
                os.killpg(child, signal.SIGKILL)
            if ended:
                return os.waitstatus_to_exitcode(status)
            os.waitpid(child, 0)
            return None
        time.sleep(0.02)


class Runner:
    """Runs the tests of one file on mutants of it, in a copy of the tree."""

    def __init__(self, tree: Path, file: str, tests: Sequence[str]):
        self.tree, self.path, self.tests = tree, tree / PACKAGE / file, tests
        self.source = self.path.read_text(encoding="utf-8")
        self._limits: dict[str, float | None] = {}
        self._bytecode = self.path.parent / "__pycache__"

    def limit(self, marks: str) -> float | None:
        """Seconds for the tests with a mark; None where there are none. Ends the program if they fail by themselves."""
        if marks not in self._limits:
            begin = time.monotonic()
            code = run_tests(self.tree, self.tests, marks, None)
            if code not in (0, NO_TESTS):
                output = (self.tree.parent / "output").read_text(encoding="utf-8")
                raise SystemExit(f"{' '.join(self.tests)} ({marks}) fail without a mutant.\n{output}")
            self._limits[marks] = 3 * (time.monotonic() - begin) + 10 if code == 0 else None
            for compiled in self._bytecode.glob(f"{self.path.stem}.*"):
                compiled.unlink()
        return self._limits[marks]

    def outcome(self, mutant: Mutant) -> str:
        changed = mutant.code(self.source)
        try:
            compile(changed, self.path, "exec")
        except SyntaxError:
            return "incompetent"
        for marks in ("not slow", "slow"):
            limit = self.limit(marks)
            if limit is None:
                continue
            self.path.write_text(changed, encoding="utf-8")
            try:
                code = run_tests(self.tree, self.tests, marks, limit)
            finally:
                self.path.write_text(self.source, encoding="utf-8")
            if code != 0:
                return "timeout" if code is None else "incompetent" if code in CANNOT_IMPORT else "killed"
        return "survived"


# ---- Results


def digest(paths: Sequence[Path]) -> str:
    """Of the contents of files, and of the Python files of folders."""
    code = hashlib.sha256()
    for path in paths:
        for file in sorted(path.rglob("*.py")) if path.is_dir() else [path]:
            code.update(file.read_bytes())
    return code.hexdigest()[:16]


def write(path: Path, text: str) -> None:
    """`dyadlm.files` does this too, but nothing of the package may be imported here."""
    staged = path.with_name(f".{path.name}")
    staged.write_text(text, encoding="utf-8")
    staged.replace(path)


def equivalents() -> dict[tuple[str, str, str], str]:
    entries = json.loads(EQUIVALENTS.read_text(encoding="utf-8")) if EQUIVALENTS.exists() else []
    return {(entry["file"], entry["before"], entry["after"]): entry["why"] for entry in entries}


def summary(cells: dict[str, Any]) -> dict[str, Any]:
    """Counts by file and by group, and the survivors."""
    known = equivalents()
    files: dict[str, Any] = {}
    survivors = []
    for group, targets in TARGETS.items():
        for file in filter(cells.__contains__, targets):
            source = (ROOT / PACKAGE / file).read_text(encoding="utf-8")
            if cells[file]["source"] != digest([ROOT / PACKAGE / file]):
                continue
            counts = Counter(cells[file]["outcomes"].values())
            same = 0
            by_key = {mutant.key: mutant for place in places(source) for mutant in place}
            for key, outcome in cells[file]["outcomes"].items():
                if outcome == "survived":
                    line, before, after = difference(source, by_key[key].code(source))
                    why = known.get((file, before, after))
                    same += why is not None
                    survivors.append({"file": file, "line": line, "before": before, "after": after, "equivalent": why})
            files[file] = {
                "group": group,
                "places": cells[file]["places"],
                **{name: counts[name] for name in ("killed", "timeout", "survived", "incompetent")},
                "equivalent": same,
            }
    return {"files": files, "survivors": survivors}


def table(found: dict[str, Any], commit: str, seed: int) -> str:
    """The results as Markdown."""
    numbers = ("killed", "timeout", "survived", "equivalent", "incompetent")
    rows = []
    for group in [*TARGETS, "all"]:
        cells = [cell for cell in found["files"].values() if group in (cell["group"], "all")]
        if cells:
            total = {name: sum(cell[name] for cell in cells) for name in (*numbers, "places")}
            caught = total["killed"] + total["timeout"]
            noticeable = caught + total["survived"] - total["equivalent"]
            total["survived"] -= total["equivalent"]
            shown = " | ".join(str(total[name]) for name in ("places", *numbers))
            rows.append(f"| {group} | {len(cells)} | {shown} | {caught / max(noticeable, 1):.1%} |")
    left = [entry for entry in found["survivors"] if entry["equivalent"] is None]
    same = [entry for entry in found["survivors"] if entry["equivalent"] is not None]

    def described(entry: dict[str, Any]) -> str:
        before, after = (entry[name].replace("\n", " ") for name in ("before", "after"))
        reason = "" if entry["equivalent"] is None else f": {entry['equivalent']}"
        return f"- `{entry['file']}:{entry['line']}` `{before}` → `{after}`{reason}"

    head = "| group | files | places | killed | timeout | survived | equivalent | incompetent | rate |"
    return "\n".join(
        [
            "# Mutants that the tests find",
            "",
            f"`python benchmarks/mutation.py`, at {commit}, seed {seed}. The rate is (killed + timeout) / (killed +",
            "timeout + survived). Equivalent mutants do what the original does; each has its reason below.",
            "",
            head,
            "| --- |" + " ---: |" * 8,
            *rows,
            "",
            "## Survivors",
            "",
            *([described(entry) for entry in left] or ["None."]),
            "",
            "## Equivalent",
            "",
            *([described(entry) for entry in same] or ["None."]),
            "",
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    every = {file: tests for targets in TARGETS.values() for file, tests in targets.items()}
    parser.add_argument("files", nargs="*", default=list(every), metavar="FILE", help=f"of {PACKAGE}; none: all")
    parser.add_argument("--most", type=int, help=f"mutants a file; default {MOST}, of some files more")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    if unknown := set(options.files) - set(every):
        parser.error(f"no target: {', '.join(sorted(unknown))}")
    describe = ["git", "describe", "--always", "--dirty", "--exclude=*"]
    commit = subprocess.run(describe, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
    stored = json.loads(OUTPUT.read_text(encoding="utf-8")) if OUTPUT.exists() else {"cells": {}}
    cells = stored["cells"]
    if stored.get("seed", options.seed) != options.seed:
        parser.error(f"{OUTPUT} was begun with the seed {stored['seed']}; move it away or take that seed.")

    def save() -> None:
        found = summary(cells)
        content = {"commit": commit, "seed": options.seed, **found, "cells": cells}
        write(OUTPUT, json.dumps(content, indent=1, ensure_ascii=False) + "\n")
        write(TABLE, table(found, commit, options.seed))

    for name in PRELOADED:
        __import__(name)
    import torch

    torch.set_num_threads(1)
    gc.collect()
    gc.freeze()  # forks collect garbage often, and need not look at all this
    with copied_tree() as tree:
        for file in options.files:
            source, tests = (
                digest([tree / PACKAGE / file]),
                digest([tree / test.split("::")[0] for test in every[file]]),
            )
            cell = cells.get(file, {})
            if cell.get("source") != source:
                cell = cells[file] = {"source": source, "tests": tests, "outcomes": {}}
            text = (tree / PACKAGE / file).read_text(encoding="utf-8")
            cell["places"] = len(places(text))
            drawn = sample(file, text, options.most or MOST_OF.get(file, MOST), options.seed)
            outcomes = cell["outcomes"]
            if cell["tests"] != tests:
                cell["tests"], known = tests, equivalents()
                for mutant in drawn:
                    if outcomes.get(mutant.key) == "survived":
                        _, before, after = difference(text, mutant.code(text))
                        if (file, before, after) not in known:
                            del outcomes[mutant.key]
            waiting = [mutant for mutant in drawn if mutant.key not in outcomes]
            runner = Runner(tree, file, every[file]) if waiting else None
            for mutant in waiting:
                assert runner is not None
                outcome = outcomes[mutant.key] = runner.outcome(mutant)
                print(f"{file} {mutant.key}: {outcome}", flush=True)
                if outcome == "survived":
                    print("   {1}\n   {2}".format(*difference(text, mutant.code(text))), flush=True)
                save()
    save()


if __name__ == "__main__":
    main()
