"""The loops of the memory: contexts are looked up, predictions mixed, the mixture's weights learned, counts updated.

Written for numba, which compiles the functions where it is installed; without it they run as they stand, slowly.

Dimension letters: T tokens, V vocabulary, L lengths of contexts, S sets, W ways, F followers, N, D bands of how often
and with how many followers a context was seen.
"""

from collections.abc import Callable
from typing import Any, TypeVar, cast

import numpy as np

from dyadlm.compilation import announced

Array = np.ndarray
Function = TypeVar("Function", bound=Callable[..., Any])
try:
    from numba import njit
except ImportError:  # no numba for this Python
    COMPILED = False

    def compiled(function: Function) -> Function:
        """The function as it is."""
        return function
else:
    COMPILED = True
    announced()

    def compiled(function: Function) -> Function:
        """The function, compiled when it is first called."""
        return cast(Function, njit(cache=True, error_model="numpy", nogil=True)(function))


GOLDEN = np.uint64(0x9E3779B97F4A7C15)
FACTOR = np.uint64(0xD6E8FEB86659FD93)
ONE, HALF_WORD, WORD = np.uint64(1), np.uint64(32), np.uint64(64)
# From this many sightings on a context is in the next band.
BANDS = np.array([2.0, 3.0, 5.0, 9.0, 17.0, 65.0])
# A follower with a smaller count is dropped.
FORGOTTEN = 1e-6
# No context is believed more than by sigmoid of this, or less than by that of its negative.
MOST_BELIEF = 20.0
# Worth of the entries of a set that stay when one has to go: what is not seen again goes in the end.
AGING = 0.9


@compiled
def tag_of(history: Array, length: int) -> Any:
    """The number that stands for the last `length` tokens; 0 where fewer were read. history: the newest first."""
    if history[length - 1] < 0:
        return np.uint64(0)
    tag = np.uint64(length) * GOLDEN
    for back in range(length):
        tag = (tag ^ np.uint64(history[back] + 1)) * FACTOR
        tag ^= tag >> HALF_WORD
    return tag | ONE


@compiled
def find(history: Array, lengths: Array, tags: Array, bits: np.uint64, found: Array) -> None:
    """Where each context stands now: found (L, 2) gets its set and way; the way is -1 where it was never seen, the set
    where it is too short."""
    for level in range(len(lengths)):
        found[level, 0] = found[level, 1] = -1
        tag = tag_of(history, lengths[level])
        if tag == np.uint64(0):
            continue
        # Two shifts: one by 64 bits, for a table of one set, is undefined.
        place = np.int64((tag >> ONE) >> (WORD - ONE - bits))
        found[level, 0] = place
        for way in range(tags.shape[2]):
            if tags[level, place, way] == tag:
                found[level, 1] = way


@compiled
def weigh(followers: Array, counts: Array) -> tuple[float, int, int]:
    """Of an entry (F,): how often it was seen in all, and its bands by that and by its number of followers."""
    total, different = 0.0, 0
    for place in range(len(followers)):
        if followers[place] >= 0:
            total += counts[place]
            different += 1
    band = 0
    while band < len(BANDS) and total >= BANDS[band]:
        band += 1
    return total, band, different - 1


@compiled
def mix(
    probabilities: Array,
    history: Array,
    lengths: Array,
    tags: Array,
    followers: Array,
    counts: Array,
    mixer: Array,
    bits: np.uint64,
    found: Array,
) -> None:
    """Mix what followed each context into probabilities (V,) of the next token, in place, from short to long."""
    find(history, lengths, tags, bits, found)
    for level in range(len(lengths)):
        place, way = found[level, 0], found[level, 1]
        if way < 0:
            continue
        names, numbers = followers[level, place, way], counts[level, place, way]
        total, band, different = weigh(names, numbers)
        share = 1.0 / (1.0 + np.exp(-mixer[level, band, different]))
        for token in range(len(probabilities)):
            probabilities[token] *= 1.0 - share
        for follower in range(len(names)):
            if 0 <= names[follower] < len(probabilities):
                probabilities[names[follower]] += share * numbers[follower] / total


@compiled
def read(
    tokens: Array,
    nats: Array,
    mixed: Array,
    history: Array,
    lengths: Array,
    tags: Array,
    followers: Array,
    counts: Array,
    worth: Array,
    mixer: Array,
    slopes: Array,
    bits: np.uint64,
    fade: float,
    rate: float,
    found: Array,
) -> None:
    """Read tokens (T,): each is predicted before anything learns of it.

    nats (T,): of the model alone; NaN where it predicted nothing. mixed (T,) gets those of the mixture.
    """
    levels = len(lengths)
    shares, before, told = np.zeros(levels), np.zeros(levels), np.zeros(levels)
    bands = np.zeros((levels, 2), np.int64)
    for at in range(len(tokens)):
        token = tokens[at]
        find(history, lengths, tags, bits, found)
        predicted = not np.isnan(nats[at])
        chance, left = np.exp(-nats[at]) if predicted else 0.0, 1.0
        for level in range(levels):
            place, way = found[level, 0], found[level, 1]
            if way < 0:
                continue
            names, numbers = followers[level, place, way], counts[level, place, way]
            total, band, different = weigh(names, numbers)
            bands[level, 0], bands[level, 1] = band, different
            told[level] = 0.0
            for follower in range(len(names)):
                if names[follower] == token:
                    told[level] = numbers[follower] / total
            shares[level] = 1.0 / (1.0 + np.exp(-mixer[level, band, different]))
            before[level] = chance
            chance = (1.0 - shares[level]) * chance + shares[level] * told[level]
            left *= 1.0 - shares[level]
        # A chance too small for a number is kept as the nats that it had.
        mixed[at] = -np.log(chance) if chance > 0.0 else nats[at] - np.log(left)
        if predicted and rate > 0.0 and chance > 0.0:
            # The gradient of the log of the chance, from the longest context back to the shortest.
            outer = 1.0 / chance
            for level in range(levels - 1, -1, -1):
                if found[level, 1] < 0:
                    continue
                share, band, different = shares[level], bands[level, 0], bands[level, 1]
                slope = outer * (told[level] - before[level]) * share * (1.0 - share)
                slopes[level, band, different] += slope * slope
                belief = mixer[level, band, different] + rate * slope / np.sqrt(slopes[level, band, different])
                mixer[level, band, different] = min(max(belief, -MOST_BELIEF), MOST_BELIEF)
                outer *= 1.0 - share
        for level in range(levels):
            place, way = found[level, 0], found[level, 1]
            if place < 0:
                continue
            if way < 0:
                way = 0
                for other in range(tags.shape[2]):
                    if worth[level, place, other] < worth[level, place, way]:
                        way = other
                for other in range(tags.shape[2]):
                    worth[level, place, other] *= AGING
                tags[level, place, way] = tag_of(history, lengths[level])
                followers[level, place, way, :] = -1
                counts[level, place, way, :] = 0.0
                worth[level, place, way] = 0.0
            worth[level, place, way] += 1.0
            names, numbers = followers[level, place, way], counts[level, place, way]
            chosen = 0
            for follower in range(len(names)):
                if names[follower] == token:
                    chosen = follower
                    break
                if numbers[follower] < numbers[chosen]:
                    chosen = follower
            if names[chosen] != token:
                names[chosen], numbers[chosen] = token, 0.0
            for follower in range(len(names)):
                numbers[follower] *= 1.0 if follower == chosen else fade
                if numbers[follower] < FORGOTTEN and follower != chosen:
                    names[follower], numbers[follower] = -1, 0.0
            numbers[chosen] += 1.0
        for back in range(len(history) - 1, 0, -1):
            history[back] = history[back - 1]
        history[0] = token
