"""Decoding without torch: one token through the whole model, near the time that reading its weights takes.

An `Engine` has the weights of one model, an `EngineState` what one row carries. `unsupported` says which models the
engine cannot run; torch runs those.

Nothing here imports torch or transformers.
"""

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from dyadlm.compilation import announced
from dyadlm.engine import numpy_step
from dyadlm.engine.layout import Shape, log2_longest, shape_of, unsupported
from dyadlm.engine.pack import FORMATS, Weights
from dyadlm.engine.state import EngineState
from dyadlm.errors import UserError
from dyadlm.state_file import read_state, state_signature, weights_identity, write_state

__all__ = ["Engine", "EngineState", "unsupported"]


# With so many rows one matrix product for all is faster than the compiled step for each: at 1M parameters (0.89 against
# 0.86 ms for 4 rows, 1.7 against 1.0 for 8) as at 12M (9.5 against 11.4, 11.6 against 8.7).
MANY_ROWS = 6

# Tokens that are read in one matrix product. Fewer are read one by one, for which less has to be compiled.
FEWEST_TOKENS, MOST_TOKENS = 8, 256

SCRATCH_INTEGERS = 104  # of the compiled step: segments that begin, sets that are written, entries that are found

NUMPY_KINDS = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "I64": "<i8", "I32": "<i4", "U8": "u1", "BOOL": "?"}

log = logging.getLogger("dyadlm.engine")


class Engine:
    """The weights of one model, packed, and the step that reads a token.

    fields: of the configuration. signature, identity: of the model's shape and of its weights, for the files of
    states. vocab_size: V. weight_bytes: bytes of weights that a token reads.
    """

    def __init__(
        self,
        fields: Mapping[str, Any],
        tensors: Mapping[str, np.ndarray],
        *,
        weights: str = "float32",
        compile_after: int = 0,
    ):
        """tensors: by the names of the model's parameters; copied. weights: how matrices are stored, one of
        float32 | bfloat16 | int8; products are in float32 all the same. compile_after: tokens that numpy reads before
        numba is imported, which takes as long as some hundred tokens, and far longer where nothing is compiled yet.

        Raises:
            UserError: the engine does not support the model, or weights are missing or of another shape.
            RunFailed: weights are not numbers.
        """
        if weights not in FORMATS:
            raise UserError(f"There is no format {weights!r} of weights; choose one of {', '.join(FORMATS)}.")
        reason = unsupported(fields)
        if reason is not None:
            raise UserError(f"The engine cannot run this model, since {reason}; use the model in torch.")
        self.fields, self.shape = fields, shape_of(fields)
        try:
            self.signature = self._signature()
        except KeyError as error:
            raise UserError(f"The configuration of the model is damaged: it lacks {error}.") from error
        self.weights = Weights(self.shape, tensors, weights)
        shapes = {name: tensor.shape for name, tensor in tensors.items()}
        self.identity = weights_identity(shapes, lambda name, places: tensors[name].reshape(-1)[places])
        self.vocab_size, self.weight_bytes = self.shape.vocabulary, self.weights.bytes_per_token
        self._left_to_numpy = compile_after
        self._compiled: Callable[..., None] | None = None
        self._loops = numpy_step.Loops()
        if not compile_after:
            self._compile()
        self._constants = self._arguments()
        self._scratch_size = scratch_size(self.shape)

    @classmethod
    def from_folder(
        cls,
        folder: str | Path,
        *,
        weights: str = "float32",
        fields: Mapping[str, Any] | None = None,
        compile_after: int = 0,
    ) -> "Engine":
        """The engine of a saved model: config.json and safetensors. weights, compile_after: as above.

        fields: of the configuration, to change; those that the weights do not depend on, such as `slot_entries`.

        Raises:
            UserError: no such model, or one that the engine does not support.
        """
        from safetensors import SafetensorError

        folder = Path(folder)
        try:
            saved = json.loads((folder / "config.json").read_text(encoding="utf-8"))
            index = folder / "model.safetensors.index.json"
            names = ["model.safetensors"]
            if not (folder / names[0]).is_file() and index.is_file():  # in the order of transformers
                names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
            if any(Path(name).name != name for name in names):
                raise UserError(f"{index} names files outside the folder; the folder is damaged.")
            tensors: dict[str, np.ndarray] = {}
            for name in names:
                tensors |= read_tensors(folder / name)
        except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
            raise UserError(f"{folder} is no model folder ({error}); give one that `dyadlm train` wrote.") from error
        if not isinstance(saved, dict) or saved.get("model_type") != "dyadlm":
            raise UserError(f"{folder} holds no dyadlm model; give a folder that `dyadlm train` wrote.")
        return cls({**saved, **(fields or {})}, tensors, weights=weights, compile_after=compile_after)

    @property
    def is_compiled(self) -> bool:
        """Whether numba is there."""
        return _compiled_step() is not None if self._left_to_numpy > 0 else self._compiled is not None

    def start(self, rows: int = 1) -> EngineState:
        """An empty state of B rows."""
        state = EngineState(self.shape, rows)
        state.owner = self
        return state

    def step(self, state: EngineState, token: int) -> np.ndarray:
        """Read one token, 0 <= token < V, into a state of one row, which moves on. Returns logits (V,) float32.

        Raises:
            IndexError: a token outside the vocabulary.
        """
        return self.step_rows(state, (token,))[0]

    def step_rows(self, state: EngineState, tokens: Sequence[int]) -> np.ndarray:
        """Read one token in each of B rows; the state moves on. Returns logits (B, V) float32.

        Raises:
            IndexError: a token outside the vocabulary.
            UserError: the state of another engine.
        """
        self._require(state, tokens)
        if len(tokens) != state.rows:
            raise ValueError(f"The state has {state.rows} rows, but there are {len(tokens)} tokens.")
        self._count(len(tokens))
        self._begin(state)
        if self._compiled is None or state.rows >= MANY_ROWS:
            logits = numpy_step.step(self.shape, self.weights, state, np.asarray(tokens, np.int64), self._loops)
        else:
            logits = np.empty((state.rows, self.vocab_size), np.float32)
            # Of this call alone, so that threads may share an engine.
            scratch, integers = np.empty(self._scratch_size, np.float32), np.empty(SCRATCH_INTEGERS, np.int64)
            for row, token in enumerate(tokens):
                parts = state.row(row)
                self._compiled(token, *self._constants, *parts, scratch, integers, logits[row])
        state.columns_seen += 1
        return logits

    def read(self, state: EngineState, tokens: np.ndarray) -> np.ndarray:
        """Read tokens int64 (T,) into a state of one row, many at once where numba is there and weights are in float32.
        The state moves on. Returns logits (T, V) float32; memory grows with T.

        Raises:
            IndexError: a token outside the vocabulary.
            UserError: the state of another engine.
            ValueError: a state of several rows.
        """
        self._require(state, tokens)
        if state.rows != 1:
            raise ValueError(f"The state has {state.rows} rows; a text is read into one.")
        logits = np.empty((len(tokens), self.vocab_size), np.float32)
        if len(tokens) >= self._left_to_numpy:
            self._count(len(tokens))
        fast = self._compiled is not None and self.weights.read.numbers.dtype == np.float32
        for at in range(0, len(tokens), MOST_TOKENS):
            some = tokens[at : at + MOST_TOKENS]
            if fast and len(some) >= FEWEST_TOKENS:
                self._begin(state)
                logits[at : at + len(some)] = numpy_step.step(self.shape, self.weights, state, some, _token_loops())
                state.columns_seen += len(some)
            else:
                for number, token in enumerate(some.tolist(), start=at):
                    logits[number] = self.step(state, token)
        return logits

    def state_from(self, tensors: Mapping[str, np.ndarray], columns_seen: int) -> EngineState:
        """The state that `DyadCache.tensors` describe.

        Raises:
            UserError: names, shapes or numbers are not those of a state of this model.
        """
        state, shape = EngineState.from_named(self.shape, tensors, columns_seen), self.shape
        state.owner = self
        reads, ups = self.weights.node_read.wide(), self.weights.node_up.wide()
        for layer in range(shape.layers):
            for n in range(shape.dual):
                level = shape.sliding + n
                feature = numpy_step.node_feature(state.blocks[:, layer, level - 1], level, reads[layer, n])
                state.nodes[:, layer, n] = feature @ ups[layer, n].T
        state.summed[:] = state.nodes.sum(2)
        return state

    def save_state(self, state: EngineState, path: str | Path, beside: Mapping[str, np.ndarray] | None = None) -> None:
        """Write a state as `DyadCache.save` writes it, atomically."""
        write_state(Path(path), state.tensors(), self.signature, state.columns_seen, self.identity, beside)

    def load_state(self, path: str | Path) -> EngineState:
        """Read a state that `save_state` or `DyadCache.save` wrote.

        Raises:
            UserError: no such file, no state file, a damaged one, or the state of another model.
        """
        return self.state_from(*read_state(path, self.signature, self.identity))

    def _count(self, tokens: int) -> None:
        """So many tokens are read now. After the first ones, numba reads on."""
        if self._left_to_numpy > 0:
            self._left_to_numpy -= tokens
            if self._left_to_numpy <= 0:
                self._compile()

    def _compile(self) -> None:
        self._compiled, self._loops = _compiled_step(), _loops()

    def _require(self, state: EngineState, tokens: Sequence[int] | np.ndarray) -> None:
        """Raise an error for the state of another engine, and for tokens outside the vocabulary."""
        if state.owner is not self:
            raise UserError(
                "The state belongs to another engine; take it over with `engine.state_from(state.tensors(), "
                "state.columns_seen)`."
            )
        for token in tokens:
            if not 0 <= token < self.vocab_size:
                raise IndexError(f"The vocabulary has {self.vocab_size} tokens; this is token {token}.")

    def _begin(self, state: EngineState) -> None:
        """Before a state is written to. A document begins with empty tables of slots, unless they live on."""
        state.own_tables()
        if not self.shape.keeps_slots:
            begins = state.counter == 0
            if begins.any():
                state.tags[begins], state.values[begins] = -1, 0

    def _signature(self) -> str:
        s = self.shape
        alignments = ["sliding"] * s.sliding + ["dual"] * s.dual
        return state_signature(self.fields, alignments, [s.rank] * (s.levels + s.semantic))

    def _arguments(self) -> tuple[Any, ...]:
        """What a step is given besides token and state."""
        s, w = self.shape, self.weights
        word = s.rules.index("word") if "word" in s.rules else -1
        radix = max(s.vocabulary, 2)
        sizes = (
            s.sliding,
            s.semantic,
            s.rank,
            s.slot_width,
            word,
            s.longest,
            s.fits,
            radix,
            int(s.lru),
            s.ngram_entries,
        )
        slots = np.array([s.slot_layers.index(i) if i in s.slot_layers else -1 for i in range(s.layers)], np.int64)
        contexts, ngrams = np.array(s.contexts, np.int64), np.array(s.ngrams, np.int64)
        embedding = (w.embedding, w.ngram_tables, *w.ngram_project)
        first = (*embedding, *w.head, w.norm, w.norms, w.identities, *w.read, w.bias, *w.up, w.age)
        rest = (*w.gates, *w.down, *w.recall, *w.node_read, *w.node_up, w.marks)
        return (sizes, np.float32(s.eps), np.float32(log2_longest(s)), contexts, ngrams, slots, *first, *rest)


def read_tensors(path: Path) -> dict[str, np.ndarray]:
    """The tensors of a safetensors file; float16 and bfloat16, which numpy does not have, as float32.

    Raises:
        SafetensorError: the file is damaged.
    """
    from safetensors import deserialize

    tensors = {}
    for name, stored in deserialize(path.read_bytes()):
        shape, kind, data = stored["shape"], stored["dtype"], stored["data"]
        if kind == "BF16":
            array = (np.frombuffer(data, "<u2").astype(np.uint32) << 16).view(np.float32)
        elif kind in NUMPY_KINDS:
            array = np.frombuffer(data, NUMPY_KINDS[kind])
        else:
            raise ValueError(f"{name} is {kind}")
        tensors[name] = (array.astype(np.float32) if kind == "F16" else array).reshape(shape)
    return tensors


def scratch_size(shape: Shape) -> int:
    """Numbers that a step needs to work with."""
    s = shape
    rows = s.token_levels * s.rank + s.sliding + 1 + s.semantic + s.width + s.slot_width
    levels = s.token_levels * (4 * s.rank + 1) + 2 * s.sliding * (s.rank + 1) + 5 * s.rank
    tables = len(s.contexts) * (s.slot_width + 1)
    tables += len(s.ngrams) * s.ngram_width
    return 4 * s.width + max(rows, 2 * s.inner) + levels + max(s.inner, s.width + 1) + tables + 128 + s.width + 1


@cache
def _compiled_step() -> Callable[..., None] | None:
    """The step that numba compiles, if numba is there."""
    try:
        from dyadlm.engine.numba_step import step
    except ModuleNotFoundError as error:
        log.warning("Tokens are decoded by numpy, several times slower, since %s is not installed.", error.name)
        return None
    except ImportError as error:  # numba refuses versions of numpy that it does not know
        log.warning("Tokens are decoded by numpy, several times slower, since numba cannot be imported: %s", error)
        return None
    except RuntimeError as error:  # there is no folder in which numba may keep what it compiles
        log.warning("Tokens are decoded by numpy, several times slower (%s); set NUMBA_CACHE_DIR to a folder.", error)
        return None
    announced()
    return step


@cache
def _loops() -> numpy_step.Loops:
    """What runs between the matrix products of many rows: compiled, if numba is there."""
    if _compiled_step() is None:
        return numpy_step.Loops()
    from dyadlm.engine.compiled_rows import CompiledLoops

    return CompiledLoops()


@cache
def _token_loops() -> numpy_step.Loops:
    """What runs between the matrix products of many tokens of one row."""
    from dyadlm.engine.compiled_tokens import TokenLoops

    return TokenLoops()
