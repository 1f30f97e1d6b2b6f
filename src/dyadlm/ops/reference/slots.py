"""Identity slots as plain Python: one row, one table, lists and dictionaries. Integers are Python's, so none wraps.

Dimension letters: T time, M width of a value, W ways.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

WORD = 2**64
Tag = tuple[int, ...]
Tables = dict[int, list[tuple[Tag, Tensor]]]


def mixed(x: int) -> int:
    """The finaliser of SplitMix64, of the integer mod 2^64."""
    x %= WORD
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 % WORD
    x = (x ^ x >> 27) * 0x94D049BB133111EB % WORD
    return x ^ x >> 31


def word_tag(tokens: Sequence[int]) -> Tag:
    """The tag of a word: two sums of mixed (token, place) mod 2^64, without their lowest bits."""
    seeds = (0x243F6A8885A308D3, 0x13198A2E03707344)
    return tuple(sum(mixed((x * 2**32 + i) ^ seed) for i, x in enumerate(tokens)) % WORD >> 1 for seed in seeds)


def tokens_tag(tokens: Sequence[int], vocab_size: int) -> Tag:
    """The tag of the last tokens: as numbers of base `vocab_size` below 2^63, newest first, newest the lowest digit."""
    base, fits = max(vocab_size, 2), 1
    while base ** (fits + 1) <= 2**63:
        fits += 1
    newest_first = list(reversed(tokens))
    parts = [newest_first[i : i + fits] for i in range(0, len(tokens), fits)]
    return tuple(sum(x * base**i for i, x in enumerate(part)) for part in parts)


def context_at(document: Sequence[int], begins: Sequence[bool], context: int | str, vocab_size: int) -> Tag | None:
    """The tag of the context that ends with the document's last token; None if the document is too short.

    Args:
        document: the tokens so far.
        begins: whether each begins a word.
    """
    if context == "word":
        start = max(i for i in range(len(document)) if i == 0 or begins[i])
        return word_tag(document[start:])
    assert isinstance(context, int)
    return tokens_tag(document[-context:], vocab_size) if len(document) >= context else None


def slot_set(tag: Tag, sets: int) -> int:
    """The set of a tag whose parts are padded as the table's are."""
    code = 0
    for part in tag:
        code = mixed((code ^ part) + 0x9E3779B97F4A7C15)
    return code % sets


def slot_reads(
    tags: Sequence[Tag | None],
    values: Tensor,
    starts: Sequence[bool],
    *,
    ways: int,
    evict: str,
    scope: str,
    set_of: Callable[[Tag], int],
    writes: Sequence[bool] | None = None,
) -> tuple[list[bool], Tensor, Tables]:
    """One table over one row of documents, token by token.

    Args:
        tags: of the context that ends at each token; None where it is not known.
        values: (T, M), what is written at each position.
        starts: whether each token begins a document.
        writes: whether the write at each token takes place; None: all do.

    Returns:
        Whether something was found at each token; what was read there (T, M), zero where nothing was; and the sets at
        the end, newest entry first.
    """
    tables: Tables = {}
    found, reads = [], []
    for t, tag in enumerate(tags):
        hit = None
        if starts[t]:
            if scope == "document":
                tables = {}
        else:
            before = tags[t - 1]
            if before is not None and (writes is None or writes[t]):
                entries = tables.get(set_of(before), [])
                if evict == "lru":
                    entries = [entry for entry in entries if entry[0] != before]
                tables[set_of(before)] = [(before, values[t]), *entries][:ways]
            if tag is not None:
                hit = next((value for own, value in tables.get(set_of(tag), []) if own == tag), None)
        found.append(hit is not None)
        reads.append(torch.zeros_like(values[t]) if hit is None else hit)
    return found, torch.stack(reads), tables
