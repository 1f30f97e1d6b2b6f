"""What a model does at each token that it reads or writes, for a page that shows it.

Text is read in chunks, and a continuation is written by the engine, where it can, and looked at some tokens at a time.
Chunks of any size tell the same of every token.

Dimension letters: T tokens, V vocabulary, K levels, N tables of slots, A sets of a table, W ways of a set.
"""

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from dyadlm.causal_lm import Continuation, vocabulary_size
from dyadlm.data.encoding import NUM_BYTES, AnyTokenizer, byte_identity, tokenizer_identity
from dyadlm.engine import Engine
from dyadlm.engine.bridge import decoder_of
from dyadlm.errors import UserError
from dyadlm.evaluate.inspection import level_names
from dyadlm.generate.decoding import INCOMPLETE, IncrementalDecoder
from dyadlm.generate.sampling import Sampler, Sampling
from dyadlm.generate.session import require_numbers
from dyadlm.generate.torch_reader import TorchReader
from dyadlm.model import DyadCache, DyadConfig, DyadForCausalLM
from dyadlm.model.trace import ChunkTrace, pass_over, read_on
from dyadlm.ops.slots import SlotLookup

# Tokens of a text that are read at once: few, so that a reader sees them come and may stop.
CHUNK = 128
# Characters of the text that are kept.
TAIL = 200
# Tokens that are passed over at once.
PASSED = 1024
# Tokens of a continuation that the engine writes before they are looked at: more and more of them, so that the first
# ones come at once and the rest come fast.
AHEAD = (1, 1, 2, 4, 8)


@dataclass(frozen=True)
class Level:
    """name: tokens of the window, or kind of segment. norm: length of what the level adds here, mean over blocks."""

    name: str
    norm: float


@dataclass(frozen=True)
class Slot:
    """table: by its context. hit: whether the context was known. distance: how many tokens ago what was recalled
    stood in the text, counted from the next token; None without a hit, and where the entry came with a saved state."""

    table: str
    hit: bool
    distance: int | None


@dataclass(frozen=True)
class Moment:
    """One token.

    index: its number in the session. text: what it adds to the text, empty within a character. name: what stands for
    it in a list. read: from the request, or written by the model. bits: its surprise; None where nothing predicted it,
    or it had no chance at all. entropy: of the next token, in bits. top: the likeliest next tokens and their
    probabilities. levels, segments, slots: as `read_on` tells; segments names the semantic levels at which a segment
    begins with this token. state_bytes: after it; None where it is not known. ms: milliseconds, with what looking
    takes; of a chunk, the mean.
    """

    index: int
    token: int
    text: str
    name: str
    read: bool
    bits: float | None
    entropy: float
    top: list[tuple[str, float]]
    levels: list[Level]
    segments: list[str]
    slots: list[Slot]
    state_bytes: int | None
    ms: float

    def as_json(self) -> dict[str, Any]:
        """With plain lists and records, and as many digits as are worth sending."""
        found: dict[str, Any] = _rounded(asdict(self))
        return found


def _rounded(part: Any) -> Any:
    if isinstance(part, float):
        return float(f"{part:.5g}")
    if isinstance(part, dict):
        return {name: _rounded(own) for name, own in part.items()}
    return [_rounded(own) for own in part] if isinstance(part, list | tuple) else part


class SlotTimes:
    """When each entry of the tables was written, as the number of its token: the plans of the chunks, replayed.

    Entries that were there before are of unknown time, -1. All of it is integers, so nothing is approximate.
    """

    def __init__(self, tables: int, sets: int, ways: int, written: Tensor | None = None):
        """written: (N, A, W) int64, as `written` was when the session was left."""
        self.written = torch.full((tables, sets, ways), -1) if written is None else written.clone()

    def follow(self, plan: SlotLookup, start: int) -> Tensor:
        """The token whose value is read at each of the T tokens of a chunk, (T, N) int64, -1 where it is not known.

        plan: of one row. start: tokens read before the chunk.
        """
        tables = self.written.shape[0]
        found, column = plan.found[0], plan.column[0]
        number = torch.where(column >= 0, start + column, -1)
        flat = self.written.flatten(1)
        if plan.slot is not None:
            held = flat.gather(1, plan.slot[0].T.clamp(0, flat.shape[1] - 1)).T
            number = torch.where(column >= 0, number, held)
        self._take(plan, start, flat, tables)
        return torch.where(found, number, -1)

    def _take(self, plan: SlotLookup, start: int, flat: Tensor, tables: int) -> None:
        """The tables after the chunk."""
        _, column, slot, changed = plan.survivors
        after = torch.where(column[0] >= 0, start + column[0], -1)
        if slot is not None:
            cells = slot[0].flatten(1).clamp(min=0)
            held = torch.where(slot[0] >= 0, flat.gather(1, cells).view_as(slot[0]), -1)
            after = torch.where(column[0] >= 0, after, held)
        if changed is None:
            self.written = after
        else:
            self.written = self.written.clone()
            self.written[torch.arange(tables), changed[0, :, 0]] = after[:, 0]


class Watcher:
    """A model with the state of all it has read, and what is told of each token.

    state: the `DyadCache` of our models; of others `Continuation`, which grows. logits: of the next token, float32
    (V,); None where nothing predicts it. tokens: how many were read. tail: the end of the text that was read here.
    times: of the slots, for a watcher that goes on; None without slots.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: AnyTokenizer,
        state: DyadCache | Continuation | None = None,
        logits: np.ndarray | None = None,
        tokens: int = 0,
        times: Tensor | None = None,
        top: int = 10,
    ):
        """model: in evaluation mode. state, logits, tokens, times: of the session that it continues. top: how many of
        the next tokens are told."""
        self.model, self.tokenizer, self.tokens, self.top = model, tokenizer, tokens, top
        self.ours = isinstance(model, DyadForCausalLM)
        self.state = state or (DyadCache() if self.ours else Continuation(model))
        self._logits = None if logits is None else torch.from_numpy(logits)
        self.whole = True  # state, logits and tokens are of the same place; not where reading failed
        self._decoder, self._clock, self.tail = IncrementalDecoder(tokenizer), 0.0, ""
        self._names, self._times = _Names(tokenizer), None
        self._ends = TorchReader(model).end_tokens
        if self.ours:
            config = cast(DyadConfig, model.config)
            self._levels = level_names(config)
            self._tables = [str(context) for context in config.slot_contexts or ()]
            if self._tables:
                sets = config.slot_entries // config.slot_ways
                self._times = SlotTimes(len(self._tables), sets, config.slot_ways, times)

    @property
    def logits(self) -> np.ndarray | None:
        """Of the next token, float32 (V,)."""
        return None if self._logits is None else self._logits.cpu().numpy()

    @property
    def times(self) -> Tensor | None:
        """When what the slots hold was written, (N, A, W) int64."""
        return None if self._times is None else self._times.written

    def encode(self, text: str) -> list[int]:
        """The tokens of a text as the session would read it: at its beginning with the specials of the tokenizer."""
        ids: list[int] = self.tokenizer(text, add_special_tokens=not self.tokens)["input_ids"]
        return ids

    def read(self, ids: Sequence[int]) -> Iterator[list[Moment]]:
        """Read tokens, in chunks. Raises `UserError` for a token outside the vocabulary, and if there is no room."""
        self._require_known(ids)
        self._clock = time.perf_counter()
        for at in range(0, len(ids), CHUNK):
            yield self._chunk(ids[at : at + CHUNK], read=True)

    def skip(self, ids: Sequence[int]) -> Iterator[int]:
        """Read tokens without looking; yields how many were read, now and then. Raises as `read` does."""
        self._require_known(ids)
        for at in range(0, len(ids), PASSED):
            yield self._skip(ids[at : at + PASSED])

    def _require_known(self, ids: Sequence[int]) -> None:
        size = vocabulary_size(self.model)
        if not all(0 <= token < size for token in ids):
            raise UserError(f"The vocabulary of the model has {size} tokens, from 0 to {size - 1}; use those alone.")

    def write(self, most: int, sampling: Sampling) -> Iterator[list[Moment]]:
        """Continue with at most so many tokens, one by one or some at a time. An end of text ends it and is not read.

        Raises `UserError` if there is nothing to continue from, and `RunFailed` if logits are not numbers.
        """
        if most and self._logits is None:
            raise UserError("There is nothing to continue from; give a text of at least one character.")
        self._clock = time.perf_counter()
        for tokens in self._written(most, Sampler(sampling)):
            yield self._chunk(tokens, read=False)

    def _written(self, most: int, sampler: Sampler) -> Iterator[list[int]]:
        """The tokens of a continuation, some at once; those handed out are to be read before the next are asked for."""
        decoder = decoder_of(cast(DyadForCausalLM, self.model)) if self.ours else None
        if decoder is not None and isinstance(self.state, DyadCache):
            yield from self._foreseen(most, sampler, decoder.engine, self.state)
            return
        for _ in range(most):
            if isinstance(self.state, Continuation) and self.state.room == 0:
                return
            token = sampler(require_numbers(self.logits))
            if token in self._ends:
                return
            yield [token]

    def _foreseen(self, most: int, sampler: Sampler, engine: Engine, state: DyadCache) -> Iterator[list[int]]:
        """Tokens that the engine writes, from a state of its own; it is much faster than what looks at them."""
        tensors = {name: tensor.numpy() for name, tensor in state.tensors().items()}
        own, logits = engine.state_from(tensors, state.columns_seen), self.logits
        sizes, written = iter(AHEAD), 0
        size = 1
        while written < most:
            size = next(sizes, size)
            tokens: list[int] = []
            while len(tokens) < min(size, most - written):
                token = sampler(require_numbers(logits))
                if token in self._ends:
                    break
                tokens.append(token)
                logits = engine.step(own, token)
            if tokens:
                yield tokens
            if len(tokens) < size:
                return
            written += len(tokens)

    @torch.no_grad()
    def _chunk(self, ids: Sequence[int], read: bool) -> list[Moment]:
        start, self.whole = self.tokens, False
        tokens = torch.tensor([list(ids)], device=self.model.device)
        trace: ChunkTrace | None = None
        if isinstance(self.state, DyadCache):
            trace = read_on(cast(DyadForCausalLM, self.model), tokens, self.state)
            logits = trace.logits.float()
        else:
            logits = self.state.read(tokens)[0].float()
        likely = require_numbers(logits).log_softmax(-1) / math.log(2)
        entropy = -(likely.exp2() * likely).nan_to_num(0.0).sum(-1)  # a token of no chance adds nothing
        before = likely[:-1]
        if self._logits is not None:
            before = torch.cat([self._logits.to(likely.device).log_softmax(-1)[None] / math.log(2), before])
        told = before.gather(-1, tokens[0, len(ids) - len(before) :, None]).squeeze(-1)
        bits: list[float | None] = [-own if math.isfinite(own) else None for own in told.tolist()]
        if len(bits) < len(ids):  # nothing predicted the first
            bits.insert(0, None)
        chances, following = (part.tolist() for part in likely.exp2().topk(min(self.top, likely.shape[-1])))
        levels, segments, slots = self._inside(trace, len(ids))
        self._logits, self.tokens, self.whole = logits[-1].clone(), start + len(ids), True
        size, now = self.state.state_bytes(), time.perf_counter()
        spent, self._clock = (now - self._clock) * 1000 / len(ids), now
        return [
            Moment(
                index=start + number,
                token=token,
                text=self._tell(token),
                name=self._names(token),
                read=read,
                bits=bits[number],
                entropy=float(entropy[number]),
                top=[
                    (self._names(own), chance) for own, chance in zip(following[number], chances[number], strict=True)
                ],
                levels=levels[number],
                segments=segments[number],
                slots=slots[number],
                state_bytes=size,
                ms=spent,
            )
            for number, token in enumerate(ids)
        ]

    @torch.no_grad()
    def _skip(self, ids: Sequence[int]) -> int:
        self.whole = False
        tokens = torch.tensor([list(ids)], device=self.model.device)
        if isinstance(self.state, DyadCache):
            logits, slots = pass_over(cast(DyadForCausalLM, self.model), tokens, self.state)
            if slots is not None and self._times is not None:
                self._times.follow(slots, self.tokens)
        else:
            logits = self.state.read(tokens)[0, -1]
        self._logits, self.tokens, self.whole = logits.float().clone(), self.tokens + len(ids), True
        for token in ids:
            self._tell(token)
        return len(ids)

    def _tell(self, token: int) -> str:
        """What a token adds to the text."""
        text = self._decoder.push(token)
        self.tail = (self.tail + text)[-TAIL:]
        return text

    def _inside(
        self, trace: ChunkTrace | None, count: int
    ) -> tuple[list[list[Level]], list[list[str]], list[list[Slot]]]:
        """What levels, segments and slots did at each token of a chunk."""
        nothing: list[list[Any]] = [[] for _ in range(count)]
        if trace is None:
            return nothing, nothing, nothing
        lengths = trace.contributions.mean(0).T.tolist()
        levels = [[Level(*pair) for pair in zip(self._levels, own, strict=True)] for own in lengths]
        begins = {name: own.tolist() for name, own in trace.begins.items()}
        segments = [[name for name, own in begins.items() if own[number]] for number in range(count)]
        if trace.slots is None or self._times is None:
            return levels, segments, nothing
        hits, written = trace.slots.found[0].tolist(), self._times.follow(trace.slots, self.tokens).tolist()
        slots = [
            [
                Slot(table, hit, self.tokens + number + 1 - when if hit and when >= 0 else None)
                for table, hit, when in zip(self._tables, hits[number], written[number], strict=True)
            ]
            for number in range(count)
        ]
        return levels, segments, slots


class _Names:
    """What stands for a token in a list of tokens: its text, or for a part of a character its byte or its entry."""

    def __init__(self, tokenizer: AnyTokenizer):
        self._tokenizer = tokenizer
        self._bytes = tokenizer_identity(tokenizer) == byte_identity()
        self._known: dict[int, str] = {}

    def __call__(self, token: int) -> str:
        if token not in self._known:
            self._known[token] = self._name(token)
        return self._known[token]

    def _name(self, token: int) -> str:
        text = str(self._tokenizer.decode([token], skip_special_tokens=False, clean_up_tokenization_spaces=False))
        if text and INCOMPLETE not in text:
            return text
        return f"<0x{token:02X}>" if self._bytes and token < NUM_BYTES else f"<token {token}>"
