"""Are topics learned before grammar?

Dimension letters: C checkpoints, B windows, T tokens, U documents.
"""

import math
from collections import Counter
from collections.abc import Sequence
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import one_hot

from dyadlm.data.streams import TokenStream
from dyadlm.diagnose.contract import Subject
from dyadlm.diagnose.material import Material
from dyadlm.diagnose.oracles import BYTES, material_of, spelled
from dyadlm.diagnose.probe import Budget, Control, Expected, NotApplicable, OverTime
from dyadlm.diagnose.result import Curve, ProbeResult, Reading
from dyadlm.diagnose.states import reader
from dyadlm.diagnose.statistics import percentiles, redrawn
from dyadlm.diagnose.tokens import spelled_bytes
from dyadlm.diagnose.trajectory import Trajectory, reached
from dyadlm.evaluate.memorisation import WORD

LENGTH = 256
KINDS = ("theme", "function", "agreement")
LEAST_WORKS, PARTS = 4, 8  # of fewer documents than that, so many equal parts of the text are taken for works
LETTERS, TIMES, SHARE = 4, 3, 0.8  # of a word of a work: at least so long, so often, and so much of it in one work
BEFORE = 64  # tokens before a verb
VERBS = 96
AGREEING = {b"is": b"are", b"was": b"were", b"has": b"have", b"does": b"do"}
FUNCTION = frozenset(
    b"a an the this that these those and or but nor if as than of in on at by for from to with without into "
    b"upon not no i you he she it we they me him her us them my your his its our their who which what when "
    b"where there here then so is are was were be been am do does did has have had will would shall should can "
    b"could may might must ".split()
)


class Theme(OverTime):
    """When in training the words of single works are learned, beside function words and agreement.

    Definition: a theme word has at least 4 letters, stands at least 3 times in the text and 80 % of that in one work;
        function words are a list of 77. Works are the documents, or eight equal parts of a text of fewer than four.
        L(t) = the mean surprise at tokens of such words; of agreement, −log2 of the share of the right one of is/are,
        was/were, has/have, does/do where the text has one of them, after 64 tokens. The gain at step t is L(first) −
        L(t); KIND_half_at = the step at which half of the final gain is reached, linear in log (1 + step) between
        checkpoints. theme_lead = log2(function_half_at / theme_half_at), agreement_lead likewise.
    Units: steps; leads in doublings of the step. Direction: a profile; a positive lead says topics first. final losses
        in bits per token are beside them.
    Paper: Chang et al. 2023 (arXiv 2308.15419), learning curves by word; Evanson et al. 2023 (arXiv 2306.03586), order
        of grammar.
    Evidence: that topics come first is not what others saw: frequent words are learned first, and nouns later than
        verbs (arXiv 2308.15419).
    Pitfalls: frequent words are learned early because they are frequent, and theme words are rare: a negative lead is
        the rule. Half of a gain that is small or still under way is noise: look at the curves. Agreement here is a
        choice between two forms in running text, not a test of grammar. The list is English.
    """

    id: ClassVar[str] = "theme"
    failure_mode: ClassVar[str] = "F11"
    question: ClassVar[str] = "Are topics learned before grammar?"
    meaning: ClassVar[str] = (
        "By how many doublings of the training step the words of single works are learned before function "
        "words; below 0 they come later."
    )
    tokens: ClassVar[int] = 8 * 1024

    def observe(self, subject: Subject, material: Material, budget: Budget) -> np.ndarray:
        """float64 (U, 6): by document, bits and number of tokens of each of `KINDS`."""
        if subject.tokenizer is None:
            raise NotApplicable("it asks for words, and this model has no tokenizer to spell them")
        length = min(LENGTH, subject.context or LENGTH)
        places = material.places(max(8, int(budget.tokens * self.tokens) // length), length, budget.seed)
        table = spelled_bytes(subject.tokenizer, subject.vocabulary, material.text)
        kinds = dict(zip(map(id, material.text), _kinds(material.text, table), strict=True))
        rows = np.stack([stream.tokens(first, first + length).astype(np.int64) for stream, first, _ in places])
        kind = np.stack([kinds[id(stream)][first + 1 : first + length] for stream, first, _ in places])
        if not (kind == 0).any():
            raise NotApplicable("the text has no words that belong to one of its works")
        read = reader(subject, budget)
        bits = read(rows)[0] / math.log(2)
        numbers = np.array([number for *_, number in places])
        sums = np.zeros((sum(len(stream.documents) for stream in material.text), 2 * len(KINDS)))
        for column in range(2):
            np.add.at(sums[:, 2 * column], numbers, (bits * (kind == column)).sum(1))
            np.add.at(sums[:, 2 * column + 1], numbers, (kind == column).sum(1))
        if not budget.fast and (subject.context or LENGTH) >= BEFORE + 8:
            for number, surprise in _agreement(subject, material, table, budget):
                sums[number, 4:] += surprise, 1
        seen: np.ndarray = sums[sums.sum(1) > 0] if len(sums) > 1 else sums
        return seen

    def conclude(self, steps: Sequence[int], seen: Sequence[np.ndarray], budget: Budget) -> ProbeResult:
        every = np.stack(seen, 1)  # (U, C, 6)
        draws = redrawn(every, np.arange(len(every)), budget.seed)  # (1 + draws, C, 6)
        readings: dict[str, Reading] = {}
        curves: dict[str, Curve] = {}
        half: dict[str, np.ndarray] = {}
        finals: dict[str, Reading] = {}
        at = [float(step) for step in steps]
        for column, name in enumerate(KINDS):
            bits, count = draws[..., 2 * column], draws[..., 2 * column + 1]
            if not count[0].all():
                continue
            losses = bits / np.where(count > 0, count, np.nan)
            half[name] = np.array([reached(steps, row[0] - row) for row in losses])
            finals[f"{name}_loss"] = Reading(float(losses[0, -1]), "bits/token", "lower", percentiles(losses[:, -1]))
            curves[f"{name} by step"] = Curve(at, losses[0].tolist(), "step", "bits/token", log_x=min(at) > 0)
        for name in [name for name in ("function", "agreement") if name in half and "theme" in half]:
            lead = np.log2(half[name] / half["theme"])
            if np.isfinite(lead[0]):
                title = "theme_lead" if name == "function" else "agreement_lead"
                note = f"{name} words" if name == "function" else name
                readings[title] = Reading(float(lead[0]), "doublings", "profile", percentiles(lead), f"before {note}")
        for name, steps_of in half.items():
            if np.isfinite(steps_of[0]):
                readings[f"{name}_half_at"] = Reading(float(steps_of[0]), "steps", "profile", percentiles(steps_of))
        if "theme_lead" not in readings:
            raise NotApplicable("the loss has not fallen between its checkpoints, so there is no half of it to reach")
        early, late = readings["theme_half_at"].value, readings["function_half_at"].value
        sentence = (
            f"Words of single works reach half of what they gain at step {early:,.0f}, "
            f"function words at step {late:,.0f}."
        )
        counts = {name: float(draws[0, 0, 2 * column + 1]) for column, name in enumerate(KINDS)}
        settings = {"steps": list(steps), "length": LENGTH, "tokens": counts}
        left_out = "agreement" if "agreement" not in half else ""
        return ProbeResult(self.id, readings | finals, curves, sentence, settings, left_out=left_out)

    def controls(self) -> list[Control]:
        words = (4.0, 3.0, 2.0, 1.0, 0.0, 0.0)
        grammar = (4.0, 4.0, 3.5, 3.0, 2.0, 0.0)
        return [
            Control(
                "scripted: topics by step 4, grammar by step 16",
                True,
                lambda: (_scripted(words, grammar), _works()),
                {
                    "theme_lead": Expected(2.0, 1e-3),
                    "theme_half_at": Expected(4.0, 0.01),
                    "function_half_at": Expected(16.0, 0.01),
                },
                "half of four bits is reached at the third and at the fifth checkpoint",
            ),
            Control(
                "scripted: all at once",
                False,
                lambda: (_scripted(words, words), _works()),
                {"theme_lead": Expected(0.0, 1e-6), "theme_half_at": Expected(4.0, 0.01)},
                "one curve for both",
            ),
        ]


def _kinds(streams: Sequence[TokenStream], table: Sequence[bytes]) -> list[np.ndarray]:
    """By stream, int64 (tokens,): 0 for tokens of theme words, 1 of function words, −1 of others."""
    texts, edges = [], []
    for stream in streams:
        pieces = [table[token] or b"\0" for token in stream.tokens(0, len(stream)).tolist()]
        texts.append(b"".join(pieces))
        edges.append(np.cumsum([len(piece) for piece in pieces]))
    works, number = [], 0  # of each stream, where works begin, in bytes, and the first one's number
    for stream, ends in zip(streams, edges, strict=True):
        starts = [int(ends[start - 1]) if start else 0 for start, *_ in stream.documents]
        works.append((starts, number))
        number += len(starts)
    if number < LEAST_WORKS:
        parts = [np.linspace(0, len(text), PARTS + 1)[:-1].astype(int).tolist() for text in texts]
        works = [(starts, PARTS * place) for place, starts in enumerate(parts)]
    found: list[list[tuple[int, bytes, int]]] = []
    for text, (starts, first) in zip(texts, works, strict=True):
        matches = list(WORD.finditer(text))
        at = first + np.searchsorted(starts, [match.start() for match in matches], side="right") - 1
        found.append(
            [(match.start(), match.group().lower(), int(work)) for match, work in zip(matches, at, strict=True)]
        )
    times = Counter(word for spans in found for _, word, _ in spans)
    inside = Counter((word, work) for spans in found for _, word, work in spans)
    most: dict[bytes, int] = {}
    for (word, _), count in inside.items():
        most[word] = max(most.get(word, 0), count)
    kinds = []
    for text, ends, spans in zip(texts, edges, found, strict=True):
        of_bytes = np.full(len(text) + 1, -1)
        for start, word, _ in spans:
            if word in FUNCTION:
                of_bytes[start : start + len(word)] = 1
            elif len(word) >= LETTERS and times[word] >= TIMES and most[word] >= SHARE * times[word]:
                of_bytes[start : start + len(word)] = 0
        kinds.append(of_bytes[ends - 1])  # a token is of the word that its last byte is in
    return kinds


def _agreement(subject: Subject, material: Material, table: Sequence[bytes], budget: Budget) -> list[tuple[int, float]]:
    """The document and the bits of the right form against the other, of verbs spread over the text."""
    assert subject.tokenizer is not None
    found, number = [], 0
    forms = {**AGREEING, **{other: form for form, other in AGREEING.items()}}
    spelt = {form: subject.tokenizer.encode(" " + form.decode(), add_special_tokens=False) for form in forms}
    if any(b"".join(table[token] for token in tokens) != b" " + form for form, tokens in spelt.items()):
        return []
    for stream in material.text:
        tokens = stream.tokens(0, len(stream)).astype(np.int64)
        for start, stop, _ in stream.documents:
            for form, other in forms.items():
                mine = spelt[form]
                inside = tokens[start + BEFORE : stop - 1]
                if len(inside) < len(mine):
                    continue
                same = (np.lib.stride_tricks.sliding_window_view(inside, len(mine)) == mine).all(1)
                for place in (np.flatnonzero(same) + start + BEFORE).tolist():
                    after = int(tokens[place + len(mine)])
                    if not table[after][:1].isalpha():
                        before = tokens[place - BEFORE : place].tolist()
                        found.append((number, [[*before, *spelt[each], after] for each in (form, other)]))
            number += 1
    chosen = [found[i] for i in np.linspace(0, len(found) - 1, min(VERBS, len(found))).astype(int).tolist()]
    if not chosen:
        return []
    longest = max(len(row) for _, pair in chosen for row in pair)
    rows = np.array([[*row, *[0] * (longest - len(row))] for _, pair in chosen for row in pair], dtype=np.int64)
    scored = np.array([[BEFORE <= t < len(row) for t in range(1, longest)] for _, pair in chosen for row in pair])
    nats = (reader(subject, budget)(rows)[0] * scored).sum(1).reshape(-1, 2)
    bits = np.logaddexp(0, nats[:, 0] - nats[:, 1]) / math.log(2)
    return [(number, float(surprise)) for (number, _), surprise in zip(chosen, bits, strict=True)]


# ---- Controls

PERIOD = 16
WORKS = (b"kingly", b"queens", b"battle", b"forest")


def _works() -> Material:
    phrases = [b"the " + word + b" of a " for word in WORKS]  # 16 letters, which divide a window
    assert all(len(phrase) == PERIOD for phrase in phrases)
    return material_of([np.frombuffer(phrase * 64, dtype=np.uint8) for phrase in phrases], "four works")


def _scripted(words: Sequence[float], grammar: Sequence[float]) -> Trajectory:
    """Checkpoints at 1, 2, 4 … with these losses, in bits, at letters of the work's word and at all else."""

    def load(step: int) -> Subject:
        number = step.bit_length() - 1
        place = torch.arange(1, PERIOD + 1) % PERIOD
        losses = torch.where((place >= 4) & (place < 10), words[number], grammar[number]).clamp(min=1e-6)

        def logits(ids: Tensor) -> Tensor:
            following = torch.cat([ids[:, 1:], ids[:, -PERIOD, None]], 1)
            bits = losses.repeat(ids.shape[1] // PERIOD + 1)[: ids.shape[1]].double()
            sure = torch.exp2(-bits)
            unlikely = ((1 - sure) / (BYTES - 1)).log()
            return (unlikely[:, None] + (sure.log() - unlikely)[:, None] * one_hot(following, BYTES)).float()

        return spelled(logits, "script")

    return Trajectory([2**number for number in range(len(words))], load)
