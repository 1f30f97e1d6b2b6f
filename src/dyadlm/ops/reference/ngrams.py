"""Hashed n-grams as plain Python: one document, one table. Integers are Python's, so none wraps."""

from collections.abc import Sequence

from dyadlm.ops.reference.slots import WORD, mixed

SEED = 0x243F6A8885A308D3


def ngram_row(document: Sequence[int], begins: Sequence[bool], size: int | str, entries: int) -> int | None:
    """The row of a table for the n-gram that ends with the document's last token; None if the document is too short.

    Args:
        document: the tokens so far.
        begins: whether each begins a word.
        size: a number of tokens, or "word" for the open word.
    """
    if size == "word":
        start = max(i for i in range(len(document)) if i == 0 or begins[i])
        placed = list(document[start:])
    else:
        assert isinstance(size, int)
        if len(document) < size:
            return None
        placed = list(reversed(document[-size:]))
    hashed = sum(mixed((token * 2**32 + place) ^ SEED) for place, token in enumerate(placed)) % WORD
    return hashed // 2 % entries
