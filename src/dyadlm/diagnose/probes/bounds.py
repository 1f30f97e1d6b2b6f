"""Are partitions semantic?"""

import math
import re
from collections.abc import Callable, Iterator
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from dyadlm.data.tokenizer import byte_tokenizer
from dyadlm.diagnose.contract import Subject
from dyadlm.diagnose.material import Material
from dyadlm.diagnose.oracles import Oracle, material_of
from dyadlm.diagnose.probe import Budget, Control, Expected, NotApplicable, Probe, TooLittle
from dyadlm.diagnose.result import ProbeResult, Reading
from dyadlm.diagnose.tokens import token_bytes
from dyadlm.evaluate.bootstrap import RESAMPLES

LENGTH = 256
WORD = re.compile(r"\w+(?:['’]\w+)*")
SENTENCE = re.compile(r"(?:^|(?<=[.!?…])[\"'”’)\]]*\s+|\n\s*\n\s*)(?=\S)")


class Bounds(Probe):
    """How well the segments of a model agree with words and sentences.

    Definition: a token is a boundary if a segment begins with it, and a reference if a word (letters, digits,
        apostrophes inside) or a sentence (after . ! ? … and a blank, or after an empty line) begins within it. hits =
        boundaries that are references; precision = hits / boundaries; recall = hits / references; F1 = 2 hits /
        (boundaries + references); over-segmentation OS = boundaries / references − 1; R-value = 1 − (|r1| + |r2|) / 2
        with r1 = √((1 − recall)² + OS²), r2 = (recall − 1 − OS) / √2. gain = F1 − that of boundaries at random at the
        same rate p among references at the rate q, 2pq / (p + q), or of a fixed stride at the rate p in its best phase,
        whichever is higher. The headline is the partition with the highest gain on words.
    Units: none. Direction: higher.
    Paper: Räsänen et al. 2009 for the R-value.
    Pitfalls: F1 is gamed by boundaries everywhere: look at the gain and the over-segmentation beside it. The first
        token of a window begins everything and is not counted. No tolerance: a boundary a token late is a miss.
    """

    id: ClassVar[str] = "bounds"
    failure_mode: ClassVar[str] = "F3"
    question: ClassVar[str] = "Are partitions semantic?"
    tokens: ClassVar[int] = 30 * 1024

    def run(self, subject: Subject, material: Material, budget: Budget) -> ProbeResult:
        if subject.tokenizer is None:
            raise NotApplicable("its tokens are no text")
        length = min(LENGTH, subject.context or LENGTH)
        if length < 16:
            raise TooLittle(f"a context of {length} tokens is too short")
        count, fewer = self.texts(budget, length)
        ids, documents = material.windows(count, length, budget.seed)
        rows = budget.rows(length)
        parts: dict[str, list[Tensor]] = {}
        for start in range(0, len(ids), rows):
            found = subject.bounds(ids[start : start + rows])
            if not found:
                raise NotApplicable("it divides its text into no segments")
            for name, begins in found.items():
                parts.setdefault(name, []).append(begins)
            budget.progress(min(start + rows, len(ids)), len(ids))
        texts = [self._texts(row, subject) for row in ids.tolist()]
        references = {
            "words": np.stack([_within(text, WORD.finditer) for text in texts])[:, 1:],
            "sentences": np.stack([_within(text, SENTENCE.finditer, end=True) for text in texts])[:, 1:],
        }
        agreements = {
            (name, kind): _Agreement(torch.cat(begins).numpy()[:, 1:], reference, documents)
            for name, begins in parts.items()
            for kind, reference in references.items()
            if reference.any()
        }
        if not agreements:
            raise NotApplicable(f"{material.name} has neither words nor sentences")
        kind = "words" if references["words"].any() else "sentences"
        name = max(parts, key=lambda name: agreements[name, kind].gain)
        best = agreements[name, kind]
        readings = {
            "f1": Reading(best.f1, "F1", "higher", best.interval, f"{name}, with {kind}"),
            "gain": Reading(best.gain, "F1", "higher", note="over chance or a fixed stride at the same rate"),
            "r_value": Reading(best.r_value, "R", "higher"),
            "over_segmentation": Reading(best.over, "share of the references", "profile"),
        }
        for (each, reference), agreement in agreements.items():
            label = f"{each} {reference}"
            readings[f"f1 {label}"] = Reading(agreement.f1, "F1", "higher", agreement.interval)
            readings[f"f1 at random {label}"] = Reading(agreement.random, "F1", "profile")
            readings[f"f1 fixed stride {label}"] = Reading(agreement.stride, "F1", "profile")
            readings[f"r_value {label}"] = Reading(agreement.r_value, "R", "higher")
            readings[f"over_segmentation {label}"] = Reading(agreement.over, "share of the references", "profile")
        sentence = (
            f"The partition {name!r} agrees with {kind} at F1 {best.f1:.2f}; chance or a fixed stride at its rate "
            f"would reach {best.f1 - best.gain:.2f}."
        )
        settings = {"length": length, "windows": len(ids), "tolerance": 0, "seed": budget.seed}
        return ProbeResult(self.id, readings, {}, sentence, settings, left_out=fewer)

    def _texts(self, row: list[int], subject: Subject) -> list[str]:
        """The text of each token; of a character in several tokens the last has it all."""
        assert subject.tokenizer is not None
        if getattr(self, "_of", None) is not subject.tokenizer:
            self._of, self._table = subject.tokenizer, token_bytes(subject.tokenizer, subject.vocabulary)
        texts, open_bytes = [], b""
        for token in row:
            open_bytes += self._table[token]
            try:
                texts.append(open_bytes.decode())
                open_bytes = b""
            except UnicodeDecodeError as error:
                broken = error.reason != "unexpected end of data"
                texts.append(open_bytes.decode(errors="replace") if broken else "")
                open_bytes = b"" if broken else open_bytes
        return texts

    def controls(self) -> list[Control]:
        return [
            Control(
                "begins where words do",
                True,
                lambda: (_divider(_word_begins, "words"), _four_letter_words()),
                {"f1": Expected(1.0, 0.0), "r_value": Expected(1.0, 1e-12), "over_segmentation": Expected(0.0, 0.0)},
                "every boundary is a word's first letter, and the reverse",
            ),
            Control(
                "begins at random, every fifth time",
                False,
                lambda: (_divider(_bernoulli, "random"), _four_letter_words()),
                {"f1": Expected(0.2, 0.02), "gain": Expected(0.0, 0.02)},
                "precision and recall are both p = 0.2, the rate of words of four letters",
            ),
        ]


class _Agreement:
    """Boundaries (B, T) bool with a reference (B, T) bool, both without the first token."""

    def __init__(self, begins: np.ndarray, reference: np.ndarray, documents: np.ndarray):
        hits, found, wanted = (array.sum(1).astype(float) for array in (begins & reference, begins, reference))
        self.f1 = _f1(hits.sum(), found.sum(), wanted.sum())
        recall = hits.sum() / wanted.sum()
        self.over = float(found.sum() / wanted.sum() - 1)
        distances = math.hypot(1 - recall, self.over) + abs(recall - 1 - self.over) / math.sqrt(2)
        self.r_value = float(1 - distances / 2)
        p, q = begins.mean(), reference.mean()
        self.random = float(2 * p * q / (p + q))
        self.stride = _stride(float(p), reference)
        self.gain = self.f1 - max(self.random, self.stride)
        self.interval = _interval(hits, found, wanted, documents)


def _f1(hits: float, found: float, wanted: float) -> float:
    return float(2 * hits / (found + wanted)) if found + wanted else 0.0


def _stride(rate: float, reference: np.ndarray) -> float:
    """F1 of a boundary every 1 / rate tokens, in the best of eight phases."""
    if rate == 0:
        return 0.0
    scores = []
    for phase in np.arange(8) / 8:
        counts = np.floor(np.arange(reference.shape[1] + 1) * rate + phase)
        begins = np.broadcast_to(np.diff(counts) > 0, reference.shape)
        scores.append(_f1((begins & reference).sum(), begins.sum(), reference.sum()))
    return max(scores)


def _interval(
    hits: np.ndarray, found: np.ndarray, wanted: np.ndarray, documents: np.ndarray
) -> tuple[float, float] | None:
    """95 % interval of F1 when documents are drawn anew (windows, of fewer than two documents)."""
    units = documents if len(np.unique(documents)) > 1 else np.arange(len(hits))
    _, place = np.unique(units, return_inverse=True)
    number = int(place.max()) + 1
    if number < 2:
        return None
    tops, bottoms = np.bincount(place, weights=2 * hits), np.bincount(place, weights=found + wanted)
    drawn = np.random.default_rng(0).integers(number, size=(RESAMPLES, number))
    low, high = np.percentile(tops[drawn].sum(1) / np.maximum(bottoms[drawn].sum(1), 1), [2.5, 97.5])
    return float(low), float(high)


def _within(texts: list[str], find: Callable[[str], Iterator[re.Match[str]]], end: bool = False) -> np.ndarray:
    """(T,) bool: in which tokens a match begins; what it begins is its end where the match is the gap before it."""
    edges = np.cumsum([0, *map(len, texts)])
    begins = np.zeros(len(texts), dtype=bool)
    for match in find("".join(texts)):
        begins[np.searchsorted(edges, match.end() if end else match.start(), side="right") - 1] = True
    return begins


# ---- controls


def _divider(function: Callable[[Tensor], Tensor], name: str) -> Subject:
    class Divider(Oracle):
        def bounds(self, ids: Tensor) -> dict[str, Tensor]:
            return {name: function(ids)}

    divider = Divider(259, lambda ids: torch.zeros(*ids.shape, 259), name)
    divider.tokenizer = byte_tokenizer()
    return divider


def _word_begins(ids: Tensor) -> Tensor:
    letters = ids != ord(" ")
    before = torch.roll(letters, 1, 1)
    before[:, 0] = False
    return letters & ~before


def _bernoulli(ids: Tensor) -> Tensor:
    return torch.rand(ids.shape, generator=torch.Generator().manual_seed(int(ids.sum()))) < 0.2


def _four_letter_words() -> Material:
    random = np.random.default_rng(0)
    words = random.integers(ord("a"), ord("z") + 1, size=(16, 500, 5))
    words[:, :, 4] = ord(" ")
    # Each document begins elsewhere, so that windows do too.
    return material_of([row.reshape(-1)[number % 5 :] for number, row in enumerate(words)], "words of four letters")
