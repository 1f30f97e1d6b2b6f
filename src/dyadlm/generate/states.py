"""Which models keep a state that can be saved, and which remember something from one document to the next."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dyadlm.errors import UserError
from dyadlm.files import require_new, require_writable

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from dyadlm.model import DyadConfig


def require_state_files(state_in: Path | None, new_document: bool, state_out: Path | None) -> None:
    """Raise `UserError` for files of states that cannot be read or written, before a model is loaded.

    state_out: a new file, or `state_in` again.
    """
    if new_document and state_in is None:
        raise UserError("A new document recalls a saved state; give one with --state-in, or leave out --new-document.")
    if state_in is not None and not state_in.exists():
        raise UserError(f"There is no state file {state_in}; save one first, with --state-out or /save.")
    if state_out is not None:
        if state_out != state_in:
            require_new(state_out, "the state")
        require_writable(state_out, "the state")


def require_saveable_state(model: "PreTrainedModel") -> "DyadConfig":
    """The configuration of one of our models; raises `UserError` for others, whose state fits no file."""
    from dyadlm.model import DyadConfig

    if not isinstance(model.config, DyadConfig):
        raise UserError(
            f"A {model.config.model_type} model keeps no state that can be saved; leave out --state-in and --state-out."
        )
    return model.config


def require_learnable(model: "PreTrainedModel") -> "DyadConfig":
    """The configuration of one of our models; raises `UserError` for others, which cannot learn while they read."""
    from dyadlm.model import DyadConfig

    if not isinstance(model.config, DyadConfig):
        raise UserError(f"A {model.config.model_type} model cannot learn while it reads; leave out --learn.")
    return model.config


def require_slots(fields: Mapping[str, Any]) -> None:
    """Raise `UserError` unless a model of this configuration has slots."""
    if not fields.get("slot_contexts"):
        raise UserError("This model has no slots (slot_contexts); leave out --slots prompt.")


def require_lasting_slots(fields: Mapping[str, Any]) -> None:
    """Raise `UserError` unless a model of this configuration remembers something from one document to the next."""
    if not fields.get("slot_contexts"):
        raise UserError(
            "This model has no slots (slot_contexts), so a new document would recall nothing of the saved state; "
            "leave out --new-document to continue the old one, or --state-in to begin anew."
        )
    scope = fields.get("slot_scope", "document")
    if scope != "stream":
        raise UserError(
            f"The slots of this model are emptied where a document starts (slot_scope={scope}); "
            "add --set slot_scope=stream to keep them."
        )
