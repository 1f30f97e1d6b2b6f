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
from dyadlm.diagnose.statistics import percentiles, redrawn
from dyadlm.diagnose.tokens import spelled_bytes

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
    meaning: ClassVar[str] = (
        "How well the segments of the model agree with words, from 0 (never) to 1 (always); a model without "
        "segments has no such figure."
    )
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
        table = spelled_bytes(subject.tokenizer, subject.vocabulary, material.text)
        texts = [_texts(row, table) for row in ids.tolist()]
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
            "gain": Reading(
                best.gain, "F1", "higher", best.gain_interval, "over chance or a fixed stride at the same rate"
            ),
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
        strides = _strides(float(begins.mean()), begins.shape[1])
        counts = [array.sum(1) for array in (begins & reference, begins, reference)]
        met = [(stride & reference).sum(1) for stride in strides]
        drawn = redrawn(np.stack([*counts, *met, np.ones(len(begins))], 1), documents)
        hits, found, wanted, windows = drawn[:, 0], drawn[:, 1], drawn[:, 2], drawn[:, -1]
        f1 = _f1(hits, found, wanted)
        # 2pq / (p + q), of rates: what there is, found and wanted, by all tokens
        random = _f1(found * wanted / (windows * begins.shape[1]), found, wanted)
        even = np.stack(
            [_f1(each, windows * stride.sum(), wanted) for each, stride in zip(drawn.T[3:-1], strides, strict=True)]
        )
        stride = even.max(0)
        gain = f1 - np.maximum(random, stride)
        self.f1, self.random, self.stride, self.gain = (float(each[0]) for each in (f1, random, stride, gain))
        self.interval, self.gain_interval = percentiles(f1), percentiles(gain)
        recall = hits[0] / wanted[0]
        self.over = float(found[0] / wanted[0] - 1)
        distances = math.hypot(1 - recall, self.over) + abs(recall - 1 - self.over) / math.sqrt(2)
        self.r_value = float(1 - distances / 2)


def _f1(hits: np.ndarray, found: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """Of sums over the same texts; 0 where there is neither a boundary nor a reference."""
    scores: np.ndarray = 2 * hits / np.maximum(found + wanted, 1)
    return scores


def _strides(rate: float, length: int) -> list[np.ndarray]:
    """A boundary every 1 / rate tokens, in eight phases: (T,) bool each."""
    steps = np.arange(length + 1) * rate
    return [np.diff(np.floor(steps + phase)) > 0 for phase in np.arange(8) / 8]


def _texts(row: list[int], table: list[bytes]) -> list[str]:
    """The text of each token; of a character in several tokens the last has it all."""
    texts, open_bytes = [], b""
    for token in row:
        open_bytes += table[token]
        try:
            texts.append(open_bytes.decode())
            open_bytes = b""
        except UnicodeDecodeError as error:
            broken = error.reason != "unexpected end of data"
            texts.append(open_bytes.decode(errors="replace") if broken else "")
            open_bytes = b"" if broken else open_bytes
    return texts


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
