"""A saved model that reads through the engine, without torch, and turns to torch where hidden states are asked for,
or where there is much to read without numba.

Dimension letters: T tokens, V vocabulary.
"""

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dyadlm.data.encoding import SPECIAL_TOKENS, ByteTokenizer, backend_identity, byte_identity
from dyadlm.engine import Engine, EngineState, unsupported
from dyadlm.errors import UserError
from dyadlm.generate.reader import nats_of
from dyadlm.generate.sampling import Sampling
from dyadlm.generate.states import require_lasting_slots
from dyadlm.shipped import place_of_model
from dyadlm.state_file import SLOTS_AT_USE

if TYPE_CHECKING:
    from dyadlm.generate.torch_reader import TorchReader

# Tokens whose logits are held at once; longer texts go through in pieces, at constant memory.
CHUNK = 2048
# Where numba is missing, a text of so many tokens is worth the time that loading torch takes.
LONG_TEXT = 512

log = logging.getLogger("dyadlm.engine")


class EngineModel:
    """A model folder and its engine.

    folder: as `dyadlm train` wrote it. tokenizer: of bytes. fields: of its configuration. end_tokens: the ids that end
    a text.
    """

    def __init__(self, folder: Path, changed: Mapping[str, Any] | None = None, compile_after: int = 0):
        """changed: fields of its configuration. compile_after: tokens, see `Engine`. Raises `UserError` if the weights
        are missing or damaged."""
        self.folder, self._changed = folder, dict(changed or {})
        self.engine = Engine.from_folder(folder, fields=self._changed, compile_after=compile_after)
        self.fields = self.engine.fields
        self.end_tokens = _end_tokens(folder, self.fields)
        self.tokenizer = ByteTokenizer(_splits_special_tokens(folder))
        self._torch: Any = None

    def reader(self) -> "EngineReader":
        """A reader at its beginning."""
        return EngineReader(self)

    def in_torch(self) -> Any:
        """The same model in torch, on the CPU."""
        from dyadlm.generate.pretrained import load_model

        if self._torch is None:
            self._torch = load_model(self.folder, "cpu", "float32", self._changed)[0]
        return self._torch


class EngineReader:
    """An engine and its state. See `dyadlm.generate.reader.Reader`.

    It becomes a `TorchReader`, with its state, once hidden states are asked for, or for a long text without numba.
    """

    def __init__(self, model: EngineModel):
        self.end_tokens = model.end_tokens
        self._model, self._engine = model, model.engine
        self._state: EngineState = self._engine.start()
        self._logits: np.ndarray | None = None
        self._in_torch: TorchReader | None = None

    @property
    def room(self) -> None:
        """There is no limit."""
        return None

    @property
    def logits(self) -> np.ndarray | None:
        """Of the next token, float32 (V,)."""
        return self._logits if self._in_torch is None else self._in_torch.logits

    @property
    def state(self) -> Any:
        """Of the engine, or of torch once it has taken over."""
        return self._state if self._in_torch is None else self._in_torch.state

    def read(self, ids: np.ndarray) -> np.ndarray:
        """Read ids int64 (T,); returns nats float32 (T,)."""
        if self._in_torch is None and len(ids) >= LONG_TEXT and not self._engine.is_compiled:
            self._turn_to_torch()
        if self._in_torch is not None:
            return self._in_torch.read(ids)
        nats = np.empty(len(ids), np.float32)
        for at in range(0, len(ids), CHUNK):
            some = ids[at : at + CHUNK]
            logits = self._engine.read(self._state, some)
            nats[at : at + CHUNK] = nats_of(self._logits, logits, some)
            self._logits = logits[-1].copy()
        return nats

    @property
    def hidden(self) -> np.ndarray | None:
        """From which the logits come, float32 (D,); of torch, which `read_inside` turns to."""
        return None if self._in_torch is None else self._in_torch.hidden

    def read_inside(self, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Read ids int64 (T,) in torch from here on; the engine shows no hidden states."""
        if self._in_torch is None:
            self._turn_to_torch()
        assert self._in_torch is not None
        return self._in_torch.read_inside(ids)

    def read_next(self, token: int, first: bool) -> None:
        """Read one token of a continuation."""
        if self._in_torch is not None:
            self._in_torch.read_next(token, first)
        else:
            self._logits = self._engine.step(self._state, token)

    def speculation(self, sampling: Sampling, drafts: Any) -> Any:
        """The engine runs no model with a planner."""
        raise UserError("Speculation needs proposals of the token after next, which a model with a planner makes.")

    def take_over(self, speculation: Any) -> None:
        """There is none to take over from."""
        raise NotImplementedError

    def expect(self, logits: np.ndarray, hidden: np.ndarray | None) -> None:
        """Take these logits (V,), and the hidden state (D,) they come from, for those that predict the next token."""
        if hidden is not None and self._in_torch is None:
            self._turn_to_torch()
        if self._in_torch is not None:
            self._in_torch.expect(logits, hidden)
        else:
            self._logits = logits

    def save(self, path: Path, beside: Mapping[str, np.ndarray] | None = None) -> None:
        """Write the state as safetensors, replacing the file."""
        if self._in_torch is not None:
            self._in_torch.save(path, beside)
        else:
            self._engine.save_state(self._state, path, beside)

    def load(self, path: Path) -> None:
        """Take up a saved state."""
        state = self._engine.load_state(path)
        if state.rows > 1:
            raise UserError(f"{path} holds {state.rows} rows, but a session reads one text.")
        self._state, self._logits, self._in_torch = state, None, None

    def skip_slot_write(self) -> None:
        """Let the next token leave the tables of slots as they are."""
        if self._in_torch is not None:
            self._in_torch.skip_slot_write()
        else:
            self._state.skip_slot_write()

    def start_document(self) -> None:
        """Keep the tables of slots alone."""
        require_lasting_slots(self._model.fields)
        if self._in_torch is not None:
            self._in_torch.start_document()
        else:
            self._state.start_document()
        self._logits = None

    def snapshot(self) -> tuple[EngineState, np.ndarray | None, Any]:
        """The state, the logits, and the snapshot of torch where it has taken over."""
        return self._state.copy(), self._logits, None if self._in_torch is None else self._in_torch.snapshot()

    def restore(self, snapshot: tuple[EngineState, np.ndarray | None, Any]) -> None:
        """Stand where `snapshot` was called."""
        state, self._logits, in_torch = snapshot
        self._state = state.copy()
        if in_torch is None:
            self._in_torch = None
        else:
            if self._in_torch is None:
                self._turn_to_torch()
            assert self._in_torch is not None
            self._in_torch.restore(in_torch)

    @property
    def position(self) -> int:
        """Tokens read so far."""
        return self._state.columns_seen if self._in_torch is None else self._in_torch.position

    @property
    def state_bytes(self) -> int | None:
        """Bytes of all arrays."""
        if self._in_torch is not None:
            return self._in_torch.state_bytes
        return sum(array.nbytes for array in self._state.arrays().values())

    def _turn_to_torch(self) -> None:
        from dyadlm.engine.bridge import cache_of
        from dyadlm.generate.torch_reader import TorchReader

        log.info("Torch reads on from here.")
        self._in_torch = TorchReader(self._model.in_torch(), cache_of(self._state), self._logits)
        self._state = self._engine.start()


def engine_model(
    path_or_name: str | Path,
    device: str,
    dtype: str,
    fields: Mapping[str, Any] | None = None,
    compile_after: int = 0,
) -> EngineModel | None:
    """The model of a folder, or one that comes with the package, if the engine can run it without torch, as it was
    asked for; else None. compile_after: tokens, see `Engine`.

    fields: of its configuration, to change. The log `dyadlm.engine` says why not.
    """
    folder, changed = Path(place_of_model(path_or_name)), dict(fields or {})
    reason = _refusal(folder, device, dtype, changed)
    if reason is not None:
        log.info("The model runs in torch, since %s.", reason)
        return None
    return EngineModel(folder, changed, compile_after)


def _refusal(folder: Path, device: str, dtype: str, changed: Mapping[str, Any]) -> str | None:
    """Why torch has to load a model, as the end of a sentence. Its loader also says what is wrong with a folder."""
    try:
        fields = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        tokenizer = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
        options = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return "there is no such folder with a configuration and a tokenizer"
    if not all(isinstance(part, dict) for part in (fields, tokenizer, options)) or fields.get("model_type") != "dyadlm":
        return "it is no dyadlm model"
    if device != "cpu" and (device != "auto" or Path("/dev/nvidiactl").exists()):
        return f"it runs on the device {device}"
    if dtype not in ("auto", "float32") or (dtype == "auto" and fields.get("dtype", "float32") != "float32"):
        return "its weights are not in float32"
    names = [options.get(key) for key in ("pad_token", "bos_token", "eos_token")]
    try:
        alike = backend_identity(tokenizer, ByteTokenizer.eos_token_id) == byte_identity()
    except (KeyError, TypeError):
        alike = False
    if not alike or names != list(SPECIAL_TOKENS):
        return "its tokens are not bytes"
    if not changed.keys() <= {*SLOTS_AT_USE, "slot_evict"}:
        return "fields are changed that torch checks"
    try:
        reason = unsupported(fields)
    except (KeyError, TypeError, ValueError):
        return "its configuration is incomplete"
    if reason is None and changed:
        try:
            reason = unsupported({**fields, **changed})
        except UserError:  # which torch says in a sentence of its own
            reason = "what is changed does not fit"
    return reason


def _splits_special_tokens(folder: Path) -> bool:
    """Whether a text that spells a special token stays text, by the saved tokenizer."""
    try:
        options = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return bool(options.get("split_special_tokens")) if isinstance(options, dict) else False


def _end_tokens(folder: Path, fields: Any) -> frozenset[int]:
    """What transformers would take from generation_config.json, or from the configuration where there is none."""
    ends = fields.get("eos_token_id")
    try:
        ends = json.loads((folder / "generation_config.json").read_text(encoding="utf-8")).get("eos_token_id")
    except FileNotFoundError:
        pass
    except (OSError, ValueError, AttributeError) as error:
        raise UserError(
            f"generation_config.json in {folder} cannot be read ({error}); save the model again."
        ) from error
    ids = [] if ends is None else ends if isinstance(ends, list) else [ends]
    if not all(isinstance(token, int) and not isinstance(token, bool) for token in ids):
        raise UserError(f"eos_token_id in {folder} is {ends!r}, no id or list of ids; save the model again.")
    return frozenset(ids)
