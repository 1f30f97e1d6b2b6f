"""The file of a saved state: safetensors whose head names the model it belongs to. The engine and torch share it.

Nothing in a file is believed: its checksum, the shape of its model, the weights that made it and its numbers are
checked before use. The checksum shows damage; it proves no origin.
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from dyadlm.errors import UserError
from dyadlm.files import write_atomically

FORMAT = "dyadlm-state"
# 1 has neither a checksum nor the identity of the weights; before 3, tensors that are alike are written each.
VERSION = "3"
# Numbers of each weight by which a model is told from others: of those of the blocks, and of these.
SAMPLED = 64
WEIGHTS_OUTSIDE_BLOCKS = (
    "model.embed_tokens.weight", "model.norm.weight", "model.ngrams.tables.weight", "model.ngrams.project.weight",
)  # fmt: skip
# What may be chosen when a model is used, and belongs to its states.
SLOTS_AT_USE = {"slot_entries": 1024, "slot_values": "float32"}
# Before the names of numbers that stand beside the state: of whoever reads, not of the model.
BESIDE = "beside."


def state_signature(fields: Mapping[str, Any], alignments: list[str], ranks: list[int]) -> str:
    """What two models must share for a state to fit both, as JSON.

    fields: of the configuration. alignments: of the geometric levels. ranks: of all levels.
    """
    shared: dict[str, Any] = {
        "hidden_size": fields["hidden_size"],
        "num_hidden_layers": fields["num_hidden_layers"],
        "alignments": alignments,
        "ranks": ranks,
        "transport_space": fields["transport_space"],
    }
    also = ["semantic_levels", "salience", "decision_slots", "slot_contexts"]
    if fields.get("ngram_sizes"):
        also.append("ngram_sizes")
    if fields.get("mixers"):
        also.append("mixers")
    if fields["slot_contexts"]:
        also += ["vocab_size", "slot_layers", "slot_entries", "slot_ways", "slot_width"]
        if fields.get("slot_values", "float32") != "float32":
            also.append("slot_values")
    if fields["selector_margin"] or fields["decision_slots"]:
        also += ["selector_heads", "selector_margin"]
    if fields["tower"] != "layer":
        also.append("tower")
    if fields["planner"] != "none":
        also.append("planner_width")
    shared |= {name: fields[name] for name in also if fields[name]}
    return json.dumps(shared, sort_keys=True)


def weights_identity(
    shapes: Mapping[str, tuple[int, ...]], sample: Callable[[str, np.ndarray], np.ndarray], every: bool = False
) -> str:
    """By what the weights of a model are told from those of others, hexadecimal: some numbers of each, rounded to
    bfloat16, so that a model keeps its identity where it is loaded in another dtype.

    shapes: of all tensors by name. sample: float32 numbers of a tensor at the given places of the flattened tensor.
    every: look at all tensors; else at those whose names are of a dyadlm model.
    """
    digest = hashlib.sha256()
    for name in sorted(shapes):
        size = int(np.prod(shapes[name], dtype=np.int64))
        if size and (every or name.startswith("model.layers.") or name in WEIGHTS_OUTSIDE_BLOCKS):
            places = np.linspace(0, size - 1, min(SAMPLED, size)).astype(np.int64)
            bits = np.ascontiguousarray(sample(name, places), np.float32).view(np.uint32).astype(np.uint64)
            rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype("<u2")
            digest.update(f"{name}{tuple(shapes[name])}".encode() + rounded.tobytes())
    return digest.hexdigest()[:32]


def write_state(
    path: Path,
    tensors: Mapping[str, np.ndarray],
    signature: str,
    columns_seen: int,
    weights: str | None = None,
    beside: Mapping[str, np.ndarray] | None = None,
) -> None:
    """Write a state, atomically. columns_seen: tokens read, padding included. weights: `weights_identity`.

    Of tensors that are alike one is written (blocks share the tags of their slots), and the head says which is which.
    beside: other numbers that are kept with the state; `read_state` passes over them, `read_beside` gives them.
    """
    from safetensors.numpy import save

    tensors = {**tensors, **{BESIDE + name: tensor for name, tensor in (beside or {}).items()}}
    first: dict[str, str] = {}
    alike = {name: first.setdefault(_checksum({"": tensor}), name) for name, tensor in tensors.items()}
    alike = {name: other for name, other in alike.items() if other != name}

    head = {
        "format": FORMAT,
        "version": VERSION,
        "model": signature,
        "columns_seen": str(columns_seen),
        "checksum": _checksum(tensors),
        "alike": json.dumps(alike),
    }
    written = {name: tensor for name, tensor in tensors.items() if name not in alike}
    write_atomically(path, save(written, head | ({} if weights is None else {"weights": weights})))


def read_state(path: str | Path, signature: str, weights: str | None = None) -> tuple[dict[str, np.ndarray], int]:
    """The tensors by name, and the columns seen. weights: the identity of the model's; None: not looked at.

    Names, shapes and dtypes are for the caller to check (`require_fitting`).

    Raises:
        UserError: no such file, no state file, a damaged one, or the state of another model.
    """
    tensors, head, seen = _read(path)
    _require_signature(path, head.get("model", ""), signature)
    if None not in (weights, head.get("weights")) and head["weights"] != weights:
        raise UserError(
            f"{path} is the state of a model with other weights; use it with the model that wrote it, as it was then."
        )
    return {name: tensor for name, tensor in tensors.items() if not name.startswith(BESIDE)}, seen


def _require_signature(path: str | Path, written: str, wanted: str) -> None:
    """Raises `UserError` unless a state was written by a model of the same shape, whose slots were the same size."""
    if written == wanted:
        return
    try:
        theirs, mine = ({**SLOTS_AT_USE, **json.loads(one)} for one in (written, wanted))
        different = sorted(name for name in {*theirs, *mine} if theirs.get(name) != mine.get(name))
    except (ValueError, TypeError):  # a head that somebody has changed
        different = []
    if different and set(different) <= SLOTS_AT_USE.keys():
        chosen = " ".join(f"{name}={theirs[name]}" for name in different)
        raise UserError(f"{path} was written with {chosen}; use it with --set {chosen}.")
    raise UserError(f"{path} is the state of a model of another shape; use it with the model that wrote it.")


def read_beside(path: str | Path) -> dict[str, np.ndarray]:
    """The numbers that stand beside a state, by the names they were given; none in a plain file.

    Raises:
        UserError: as `read_state`, but the model is not looked at.
    """
    tensors = _read(path)[0]
    return {name.removeprefix(BESIDE): tensor for name, tensor in tensors.items() if name.startswith(BESIDE)}


# How the tables of a memory are called beside a state, and its options, as the bytes of JSON.
MEMORY_PREFIX = "memory."
MEMORY_OPTIONS = f"{MEMORY_PREFIX}options"


def memory_beside(options: Mapping[str, Any], tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """A memory as numbers that stand beside a state."""
    told = np.frombuffer(json.dumps(options).encode(), np.uint8)
    return {MEMORY_OPTIONS: told} | {f"{MEMORY_PREFIX}{name}": tensor for name, tensor in tensors.items()}


def holds_memory(path: str | Path) -> bool:
    """Whether a state file holds a memory; False where it cannot be read, which loading it will say."""
    if not Path(path).is_file():  # a pipe would be waited for
        return False
    try:
        with safe_open(str(path), framework="np") as file:
            return BESIDE + MEMORY_OPTIONS in file.keys()  # noqa: SIM118 - not a mapping
    except (SafetensorError, OSError):
        return False


def read_memory(path: str | Path) -> tuple[dict[str, Any], dict[str, np.ndarray]] | None:
    """The options and tables of the memory in a state file, None where it holds none. Raises `UserError` if damaged."""
    beside = read_beside(path)
    if MEMORY_OPTIONS not in beside:
        return None
    try:
        options = json.loads(beside.pop(MEMORY_OPTIONS).tobytes())
    except ValueError as error:
        raise UserError(f"{path} holds a damaged memory ({error}); save a new state.") from error
    tables = {name: tensor for name, tensor in beside.items() if name.startswith(MEMORY_PREFIX)}
    return options, {name.removeprefix(MEMORY_PREFIX): tensor for name, tensor in tables.items()}


def require_whole(path: str | Path) -> int:
    """The columns that a state file of any model has seen. Raises `UserError` if it is damaged."""
    return _read(path)[2]


def _read(path: str | Path) -> tuple[dict[str, np.ndarray], dict[str, str], int]:
    """The tensors, the head and the columns seen of a file that agrees with its checksum."""
    if Path(path).exists() and not Path(path).is_file():  # a pipe would be waited for
        raise UserError(f"{path} is not a readable state file; save a new one.")
    try:
        with safe_open(str(path), framework="np") as file:
            head = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
            tensors |= {name: tensors[other] for name, other in json.loads(head.get("alike", "{}")).items()}
    except FileNotFoundError:
        raise UserError(f"There is no state file {path}; save one first, with --state-out or /save.") from None
    # TypeError: numbers that numpy does not have. The others: a head that somebody has changed.
    except (SafetensorError, OSError, TypeError, ValueError, KeyError, AttributeError):
        raise UserError(f"{path} is not a readable state file; save a new one.") from None
    if head.get("format") != FORMAT:
        raise UserError(
            f"{path} is a safetensors file but holds no dyadlm state; give a file that --state-out or /save wrote."
        )
    seen = head.get("columns_seen", "")
    if not seen.isdecimal() or len(seen) > 18:
        raise UserError(f"{path} does not say how much was read; save a new state.")
    if head.get("version", "1") != "1" and head.get("checksum") != _checksum(tensors):
        raise UserError(f"{path} is damaged (its checksum differs); save a new state.")
    if not tensors and int(seen):
        raise UserError(f"{path} holds nothing of what was read; it is damaged, save a new state.")
    for name, tensor in tensors.items():
        if tensor.dtype.kind == "f" and not np.isfinite(tensor).all():
            raise UserError(f"{path} holds values that are not numbers ({name}); save a new state.")
    return tensors, head, int(seen)


def require_fitting(tensors: Mapping[str, np.ndarray], expected: Mapping[str, np.ndarray]) -> None:
    """Check a state against an empty one of the model; only the number of rows may differ.

    Raises:
        UserError: other names, shapes or kinds of numbers, or a count below zero.
    """
    if not tensors:
        return
    remedy = "use it with the model that wrote it"
    slots = {"position"} | {name for name in expected if ".slots." in name}
    if tensors.keys() != expected.keys() and tensors.keys() != slots:
        raise UserError(f"The state does not fit this model ({_first_other(tensors, expected)}); {remedy}.")
    position = tensors["position"]
    rows = len(position) if position.ndim == 1 and len(position) else -1
    for name, found in tensors.items():
        wanted = expected[name]
        if found.shape != (rows, *wanted.shape[1:]) or found.dtype.kind != wanted.dtype.kind:
            raise UserError(f"The state does not fit this model ({name}); {remedy}.")
        if found.dtype.kind != "f" and found.dtype != wanted.dtype:
            raise UserError(f"The state does not fit this model ({name} is {found.dtype}); {remedy}.")
        if found.dtype.kind == "f" and (found.dtype.itemsize == 2) != (wanted.dtype.itemsize == 2):
            raise UserError(f"The state does not fit this model ({name} is {found.dtype}); {remedy}.")
    if tensors.keys() != expected.keys() and position.any():
        raise UserError("The state lacks what was read of its document; it is damaged, write a new one.")
    for name in ("position", "text.counts.0", "text.counts.1"):
        if name in tensors and (tensors[name] < 0).any():
            raise UserError("The state counts tokens below zero; it is damaged, save a new one.")


def _first_other(one: Iterable[str], other: Iterable[str]) -> str:
    return min(set(one) ^ set(other))


def _checksum(tensors: Mapping[str, np.ndarray]) -> str:
    """Of names, dtypes, shapes and numbers, hexadecimal."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name}\0{tensor.dtype.str}\0{tensor.shape}\0".encode())
        digest.update(np.ascontiguousarray(tensor).data)
    return digest.hexdigest()
