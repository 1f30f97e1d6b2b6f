"""What a request does with its row: reads a prompt, writes a continuation, holds back what may become a stop string.

Dimension letters: V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from dyadlm.data.encoding import AnyTokenizer
from dyadlm.errors import UserError
from dyadlm.generate.decoding import IncrementalDecoder
from dyadlm.generate.sampling import Sampler, Sampling
from dyadlm.generate.session import Slots, require_numbers
from dyadlm.serve.rows import Row
from dyadlm.serve.scheduler import Do, Job, Read, Step, Work

# Tokens of a prompt whose logits are looked at together: as many times V numbers are held.
LOOKED_AT = 128


@dataclass(slots=True)
class TokenOdds:
    """One token, its log-probability in nats (None for a first one), and those of the likeliest in its place."""

    token: int
    logprob: float | None
    top: list[tuple[int, float]]


@dataclass(slots=True)
class Piece:
    """Text that was decided, and the tokens it came with, where their odds are wanted. prompt: it is an echo."""

    text: str
    odds: list[TokenOdds]
    tokens: int = 0  # written since the piece before


@dataclass(slots=True)
class Ended:
    """The end of an answer. written: all tokens. kept: what a session has read of the answer."""

    reason: Literal["stop", "length"]
    written: int
    end_token: int | None


@dataclass(frozen=True)
class Plan:
    """What an answer is to be. prompt: ids int64 to read first. top: how many likeliest tokens are told with each;
    None: no odds at all. prompt_odds: of the prompt's tokens, too. keep: the row is used on, so that it reads all.
    slots: whether they take in all, or the prompt alone.
    """

    prompt: np.ndarray
    max_tokens: int
    sampling: Sampling
    stop: tuple[str, ...] = ()
    top: int | None = None
    prompt_odds: bool = False
    keep: bool = False
    slots: Slots = "all"


class StopGate:
    """Lets text through up to the first stop string. What may be the beginning of one is held back."""

    def __init__(self, stops: Sequence[str]):
        self._stops, self.held = [stop for stop in stops if stop], ""

    def push(self, text: str) -> tuple[str, bool]:
        """What may be shown, and whether a stop string was found (then nothing follows)."""
        if not self._stops:
            return text, False
        text = self.held + text
        found = [place for stop in self._stops if (place := text.find(stop)) >= 0]
        if found:
            self.held = ""
            return text[: min(found)], True
        keep = max(_overlap(text, stop) for stop in self._stops)
        self.held = text[len(text) - keep :]
        return text[: len(text) - keep], False

    def finish(self) -> str:
        """What was held back, where no stop string came of it."""
        held, self.held = self.held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """The length of the longest end of the text with which the stop string begins."""
    return next((size for size in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:size])), 0)


class OddsOf:
    """Log-probabilities for the tokens of a text. top: how many likeliest ones are told with each."""

    def __init__(self, top: int):
        self._top = top

    def __call__(self, token: int, logits: np.ndarray | None) -> TokenOdds:
        """logits: float32 (V,) before the token; None or NaN where nothing predicted it."""
        if logits is None or np.isnan(logits[0]):
            return TokenOdds(token, None, [])
        top = float(logits.max())
        scores = logits - (top + float(np.log(np.exp(logits - top).sum())))
        count = min(self._top, len(scores))
        likeliest = np.argpartition(scores, -count)[-count:] if count else np.empty(0, np.int64)
        ordered = likeliest[np.argsort(-scores[likeliest], kind="stable")]
        return TokenOdds(token, float(scores[token]), [(int(i), float(scores[i])) for i in ordered])


def read_prompt(job: Job, plan: Plan) -> Work:
    """Read the prompt; emits the odds of its tokens, as lists, where they are wanted."""
    if plan.prompt_odds and plan.top is not None:
        odds = OddsOf(plan.top)
        for at in range(0, len(plan.prompt), LOOKED_AT):
            ids = plan.prompt[at : at + LOOKED_AT]
            reading = yield Read(ids, logits=True)
            job.emit([odds(token, logits) for token, logits in zip(ids.tolist(), reading.logits, strict=True)])
    elif len(plan.prompt):
        yield Read(plan.prompt)


def write(job: Job, plan: Plan, tokenizer: AnyTokenizer, end_tokens: frozenset[int], room: int | None) -> Work:
    """Continue the row; emits `Piece`s and at last `Ended`. Ends at an end token, which is not read, or at a stop
    string, which is not shown. With `plan.keep` the row has read exactly what was shown.
    """
    if plan.max_tokens and job.row.logits is None:
        raise UserError("There is nothing to continue from; give a prompt of at least one character.")
    gate, decoder, sampler = StopGate(plan.stop), IncrementalDecoder(tokenizer), Sampler(plan.sampling)
    odds = None if plan.top is None else OddsOf(plan.top)
    held: list[tuple[int, TokenOdds]] = []  # of tokens that are not shown yet, and the character at which each begins
    decoded = shown = unsent = written = 0
    # As the row stood before it read what is held back, and what was shown that it had not read then.
    mark: Row | None = None
    since = ""
    reason: Literal["stop", "length"] = "length"
    end_token = None
    to_slots = plan.slots == "all"
    most = plan.max_tokens if room is None else min(plan.max_tokens, room)
    while True:
        ends = written == most
        token = -1 if ends else sampler(require_numbers(job.row.logits))
        if token in end_tokens:
            reason, end_token, ends = "stop", token, True
        if ends:
            text = decoder.finish()
        else:
            written, unsent = written + 1, unsent + 1
            if odds is not None:
                held.append((decoded, odds(token, job.row.logits)))
            text = decoder.push(token)
        decoded, undecided = decoded + len(text), not text
        text, stopped = gate.push(text)
        if ends and not stopped:
            text += gate.finish()
        shown += len(text)
        since = text if mark is None else since + text
        told = [one for begin, one in held if begin < shown or not (gate.held or stopped)]
        held = [(begin, one) for begin, one in held if begin >= shown and gate.held]
        if text or told:
            job.emit(Piece(text, told, unsent))
            unsent = 0
        if stopped:
            reason = "stop"
            if plan.keep:
                yield from _stand_at(job, mark, since, tokenizer, to_slots)
        if ends or stopped:
            break
        if not (gate.held or undecided):
            mark = None
        elif mark is None and plan.keep and plan.stop:
            mark = yield Do(job.copy_row)
        if written < most or plan.keep:
            yield Step(token, to_slots)
    job.emit(Ended(reason, written, end_token))


def _stand_at(job: Job, mark: Row | None, text: str, tokenizer: AnyTokenizer, to_slots: bool) -> Work:
    """Let the row have read what was shown, and no more. text: shown, and not read at the mark; without a mark, shown
    of the last token, which was not read."""
    if mark is not None:
        yield Do(lambda row: job.stand_at(mark))
    ids = tokenizer(text, add_special_tokens=False)["input_ids"] if text else []
    if to_slots:
        yield Read(np.asarray(ids, np.int64))
    else:
        yield from (Step(int(token), False) for token in ids)
