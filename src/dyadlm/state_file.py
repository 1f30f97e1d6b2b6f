"""The file of a saved state: safetensors with the shape of the model it belongs to. The engine and torch share it."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from dyadlm.errors import UserError

FORMAT = "dyadlm-state"


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
    if fields["slot_contexts"]:
        also += ["vocab_size", "slot_layers", "slot_entries", "slot_ways", "slot_width"]
    if fields["selector_margin"] or fields["decision_slots"]:
        also += ["selector_heads", "selector_margin"]
    if fields["tower"] != "layer":
        also.append("tower")
    if fields["planner"] != "none":
        also.append("planner_width")
    shared |= {name: fields[name] for name in also if fields[name]}
    return json.dumps(shared, sort_keys=True)


def metadata_of(signature: str, columns_seen: int) -> dict[str, str]:
    """What stands in the head of the file. columns_seen: tokens read, padding included."""
    return {"format": FORMAT, "model": signature, "columns_seen": str(columns_seen)}


def read_state(path: str | Path, signature: str, framework: str, device: str = "cpu") -> tuple[dict[str, Any], int]:
    """The tensors by name, and the columns seen. framework: `pt` for torch, `np` for numpy.

    Raises:
        UserError: no such file, no state file, or the state of a model with another signature.
    """
    try:
        with safe_open(str(path), framework=framework, device=device) as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
    except FileNotFoundError:
        raise UserError(f"There is no state file {path}; write one with --state-out first.") from None
    except (SafetensorError, OSError):
        raise UserError(f"{path} is not a readable state file; write a new one with --state-out.") from None
    if metadata.get("format") != FORMAT:
        raise UserError(f"{path} is a safetensors file but holds no dyadlm state; give a file written by --state-out.")
    if metadata.get("model") != signature:
        raise UserError(f"{path} is the state of a model of another shape; use it with the model that wrote it.")
    seen = metadata.get("columns_seen", "")
    if not seen.isdecimal():
        raise UserError(f"{path} does not say how much was read; write a new state with --state-out.")
    return tensors, int(seen)
