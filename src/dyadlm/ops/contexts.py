"""Which context stands at each token, as an exact tag: the addresses of the identity slots.

A number c is the context of the last c tokens; its tag holds the tokens themselves, so that two tags are equal exactly
if the contexts are. "word" is what has been read of the current word, of any length; its tag is a hash.

Dimension letters: B batch, T time, N contexts, P parts (int64 words) of a tag, H tokens of history.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from dyadlm.errors import UserError
from dyadlm.ops.pyramid import Clock, next_position

# The longest context: its tokens are part of the state and of each tag.
LONGEST_CONTEXT = 65_536
SEEDS = (0x243F6A8885A308D3, 0x13198A2E03707344)  # digits of pi: two hashes that know nothing of each other


class Contexts(NamedTuple):
    """The context that ends at each token, for N tables of slots."""

    words: Tensor  # (B, T, N, P) int64 >= 0, with 0 beyond the parts that a context needs; all -1 where not known
    known: Tensor  # (B, T, N) bool: the document is long enough, and the token is none of the padding


class TokenHistory(NamedTuple):
    """The tokens of a chunk with those before it, and the open word."""

    tokens: Tensor  # (B, H + T) int64; -1 where the document had not begun
    word: Tensor | None  # (B, T, 2) int64: two hashes of the open word at each token; None if nobody needs it


class ContextState(NamedTuple):
    """What contexts carry from chunk to chunk; sized by the contexts alone."""

    tokens: Tensor  # (B, H) int64: the last tokens of the open document, H = longest context - 1; -1 where none
    word: Tensor  # (B, 3) int64: both sums over the open word, and its tokens so far; (B, 0) without that context


def mix(x: Tensor) -> Tensor:
    """A bijection of 64 bits in which every bit of the input moves every bit of the output: int64 -> int64.

    The finaliser of SplitMix64 (Steele, Lea, Flood 2014), in arithmetic that wraps around.
    """
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        x = (x ^ shifted(x, shift)) * (factor - 2**64)
    return x ^ shifted(x, 31)


def shifted(x: Tensor, by: int) -> Tensor:
    """To the right, without copies of the sign."""
    return (x >> by) & (2 ** (64 - by) - 1)


def tokens_per_word(vocab_size: int) -> int:
    """How many whole tokens fit into the 63 bits of an int64 that is not negative."""
    count = 1
    while max(vocab_size, 2) ** (count + 1) <= 2**63:
        count += 1
    return count


def tag_words(contexts: Sequence[int | str], vocab_size: int) -> int:
    """P: the int64 words in which the tag of every one of these contexts, one or more, fits.

    Raises:
        UserError: a context is neither a positive number nor "word".
    """
    for context in contexts:
        number = isinstance(context, int) and not isinstance(context, bool) and 1 <= context <= LONGEST_CONTEXT
        if context != "word" and not number:
            raise UserError(
                f"A slot context is a number of tokens from 1 to {LONGEST_CONTEXT:,}, 'word' or 'code'; "
                f"replace {context!r}."
            )
    fits = tokens_per_word(vocab_size)
    return max(-(-c // fits) if isinstance(c, int) else len(SEEDS) for c in contexts)


@torch.no_grad()
def context_tags(
    ids: Tensor,
    contexts: Sequence[int | str],
    vocab_size: int,
    clock: Clock,
    *,
    word_begins: Tensor | None = None,
    state: ContextState | None = None,
) -> tuple[Contexts, ContextState]:
    """The tags of all contexts at every token, continuing from a state.

    Args:
        ids: (B, T) int64 in 0 .. vocab_size - 1; anything in the padding.
        contexts: numbers of tokens, and "word".
        word_begins: (B, T) bool, True where a token begins a word; for "word" only. A document begins one too.
        state: as returned for the chunk before; None at the start.

    Returns:
        The contexts, and the state after each row's last real token.

    Raises:
        UserError: a context is neither a positive number nor "word".
    """
    tag_words(contexts, vocab_size)
    history, state = token_history(ids, contexts, clock, word_begins=word_begins, state=state)
    return history_tags(history, contexts, vocab_size, clock), state


@torch.no_grad()
def token_history(
    ids: Tensor,
    contexts: Sequence[int | str],
    clock: Clock,
    *,
    word_begins: Tensor | None = None,
    state: ContextState | None = None,
) -> tuple[TokenHistory, ContextState]:
    """What is known of the past at every token, as far as these contexts need it, and the state after the chunk.

    Arguments as of `context_tags`.
    """
    batch = len(ids)
    carried = max([1, *(c for c in contexts if isinstance(c, int))]) - 1
    if state is None:
        word_state = ids.new_zeros(batch, 3 if "word" in contexts else 0)
        state = ContextState(ids.new_full((batch, carried), -1), word_state)
    tokens, word, hashes = torch.cat([state.tokens, ids], 1), state.word, None
    if "word" in contexts:
        assert word_begins is not None, "the word as context needs to know where words begin"
        hashes, word = _word_hashes(ids, word_begins, clock, state.word)
    slots = torch.arange(carried, device=ids.device)
    last = tokens.gather(1, clock.length[:, None] + slots)
    kept = torch.where(next_position(clock)[:, None] >= carried - slots, last, -1)
    return TokenHistory(tokens, hashes), ContextState(kept, word)


@torch.no_grad()
def history_tags(history: TokenHistory, contexts: Sequence[int | str], vocab_size: int, clock: Clock) -> Contexts:
    """The tags of contexts, from a history that is long enough for them."""
    time = clock.index.shape[1]
    parts = tag_words(contexts, vocab_size)
    lengths = [c for c in contexts if isinstance(c, int)]
    carried = history.tokens.shape[1] - time
    packed = _packed(history.tokens, lengths, vocab_size)
    real = torch.arange(time, device=clock.index.device) < clock.length[:, None]
    nothing = torch.zeros_like(clock.index)
    words, known = [], []
    for context in contexts:
        if isinstance(context, int):
            fits = tokens_per_word(vocab_size)
            # The first part holds the newest tokens, each later part those before.
            own = [
                packed[min(fits, context - older)][:, carried - older :][:, :time] for older in range(0, context, fits)
            ]
            known.append(real & (clock.index >= context - 1))
        else:
            assert history.word is not None, "the history has the open word"
            own = list(shifted(history.word, 1).unbind(-1))
            known.append(real)
        words.append(torch.stack(own + [nothing] * (parts - len(own)), -1))
    there = torch.stack(known, 2)
    return Contexts(torch.where(there[..., None], torch.stack(words, 2), -1), there)


def _packed(history: Tensor, lengths: Sequence[int], vocab_size: int) -> dict[int, Tensor]:
    """The last n tokens at every token as one number, the newest its lowest digit, for each n that a part may hold.

    history (B, H + T) -> {n: (B, H + T) int64}. Where n tokens reach beyond the document, the number means nothing.
    """
    fits, radix = tokens_per_word(vocab_size), max(vocab_size, 2)
    sizes = {min(fits, c - older) for c in lengths for older in range(0, c, fits)}
    packed, number = {}, torch.zeros_like(history)
    for n in range(1, max([0, *sizes]) + 1):
        number = number + torch.nn.functional.pad(history, (n - 1, 0))[:, : history.shape[1]] * radix ** (n - 1)
        if n in sizes:
            packed[n] = number
    return packed


def _word_hashes(ids: Tensor, begins: Tensor, clock: Clock, carried: Tensor) -> tuple[Tensor, Tensor]:
    """Two hashes of the open word at every token (B, T, 2), and the word state after the chunk (B, 3).

    A hash is the sum of mix(token, place in the word) mod 2^64: sums over a word are differences of prefix sums, and
    unlike a polynomial mod 2^64 no pattern of places (Thue-Morse) makes terms cancel. The tag leaves out the lowest bit
    of each, so that it is not negative. Words that differ, differ in some (token, place): two of them share a tag with
    probability 2^-126, and any two of n words with at most n^2 2^-127, for words not made to collide.
    """
    column = torch.arange(ids.shape[1], device=ids.device)
    start = torch.where(begins | (clock.index == 0), column, -1).cummax(1).values
    place = column - torch.where(start >= 0, start, -carried[:, 2:])
    letter = (ids << 32) + place
    terms = torch.stack([mix(letter ^ seed) for seed in SEEDS], -1)
    sums = terms.cumsum(1)
    first = start.clamp(min=0)[..., None].expand(-1, -1, 2)
    hashes = sums - torch.where(start[..., None] >= 0, (sums - terms).gather(1, first), -carried[:, None, :2])
    after = torch.cat([hashes, place[..., None] + 1], -1)
    # Row 0 is the state before the chunk, which stays where no token is real.
    after = torch.cat([carried[:, None], after], 1)
    return hashes, after.gather(1, clock.length[:, None, None].expand(-1, 1, 3)).squeeze(1)
