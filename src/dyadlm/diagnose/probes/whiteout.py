"""Is local skill learned, and then lost?

Dimension letters: C checkpoints, B windows, T tokens, U documents, D width.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import one_hot

from dyadlm.diagnose.contract import Subject
from dyadlm.diagnose.material import Material
from dyadlm.diagnose.oracles import BYTES, material_of, spelled
from dyadlm.diagnose.probe import Budget, Control, Expected, NotApplicable, OverTime
from dyadlm.diagnose.result import Curve, ProbeResult, Reading
from dyadlm.diagnose.states import reader
from dyadlm.diagnose.statistics import percentiles, redrawn
from dyadlm.diagnose.tokens import spelled_bytes
from dyadlm.diagnose.trajectory import Trajectory
from dyadlm.evaluate.memorisation import WORD, forced_tokens, lexicon

LENGTH = 256
PROMPT, WRITTEN = 32, 64
PROMPTS = 16
LEXICON_TOKENS = 2**20  # of the training text
RANK_TOKENS = 2048


@dataclass(frozen=True)
class Seen:
    """One checkpoint by document: bits, right guesses and bytes at forced positions, (3, U); bits and tokens of all,
    (2, U). valid: of words written, those in the lexicon. rank: of the states. Neither if it was not measured."""

    forced: np.ndarray
    whole: np.ndarray
    valid: float | None
    rank: float | None


class Whiteout(OverTime):
    """Whether what follows of the letters of a word alone is known for a while and then no more.

    Definition: a position is forced if the letters of its word so far leave one completion in the lexicon: the words of
        the text asked and of the beginning of the training text. L(t) = bits per character at forced positions, at the
        checkpoint of step t. regained = W = L(final) − min over t of L(t). forgotten = the best accuracy at forced
        positions − the final one. total_regained = the same as W of the loss at all tokens (bits per token): whiteout
        is W above zero while the total goes on falling. word_validity = the share of words written greedily after
        prompts that are in the lexicon, at the end; word_validity_lost = the best − that. effective_rank = e^H of the
        shares of variance of the last layer's states, at the end; its curve shows whether their range washes out.
    Units: bits per character, shares, bits per token, dimensions. Direction: lower.
    Paper: Belrose et al. 2024 (arXiv 2402.04362); Chang et al. 2023 (arXiv 2308.15419). Effective rank: Roy and
        Vetterli 2007.
    Evidence: that local skill is learned, then lost is supported in part: early in training models do as well on text
        made of n-gram statistics alone, later worse (arXiv 2402.04362), and some tokens are learned and forgotten
        (arXiv 2308.15419). Neither says that a completion which only one word allows is forgotten.
    Pitfalls: the least of several noisy losses is too low, so W is never below zero and drawn upwards; the interval
        finds the least anew. Overfitting raises W too: look at total_regained. A small lexicon calls letters forced
        that the language leaves open. Under tokens longer than a letter only those wholly forced count, so W of
        different tokenizers are of different letters.
    """

    id: ClassVar[str] = "whiteout"
    failure_mode: ClassVar[str] = "F8"
    question: ClassVar[str] = "Is local skill learned, then lost?"
    meaning: ClassVar[str] = (
        "How much the loss at letters that only one word allows has risen again since its lowest point in "
        "training; 0 means that nothing was lost."
    )
    tokens: ClassVar[int] = 8 * 1024

    def observe(self, subject: Subject, material: Material, budget: Budget) -> Seen:
        if subject.tokenizer is None:
            raise NotApplicable("it asks for words, and this model has no tokenizer to spell them")
        length = min(LENGTH, subject.context or LENGTH)
        places = material.places(max(8, int(budget.tokens * self.tokens) // length), length, budget.seed)
        table = spelled_bytes(subject.tokenizer, subject.vocabulary, material.text)
        words = _words(material, table)
        begins = {id(stream): forced_tokens(stream, words, table) for stream in material.text}
        rows = np.stack([stream.tokens(first, first + length).astype(np.int64) for stream, first, _ in places])
        forced = np.stack([begins[id(stream)][first + 1 : first + length] >= first for stream, first, _ in places])
        if not forced.any():
            raise NotApplicable("no token of the text follows of the letters of its word alone")
        sizes = np.vectorize(lambda token: len(table[token]), otypes=[float])(rows[:, 1:])
        nats, likeliest = reader(subject, budget)(rows)
        bits = nats / math.log(2)
        _, unit = np.unique([document for *_, document in places], return_inverse=True)
        if unit.max() == 0:  # of one document the windows are what is drawn anew
            unit = np.arange(len(rows))
        of_documents = [
            np.bincount(unit, weights=each.sum(1))
            for each in (bits * forced, likeliest * forced * sizes, forced * sizes, bits, np.ones_like(bits))
        ]
        ids = torch.from_numpy(rows)
        valid = None if budget.fast else _validity(subject, ids[:PROMPTS, :PROMPT], table, words)
        return Seen(np.stack(of_documents[:3]), np.stack(of_documents[3:]), valid, _effective_rank(subject, ids))

    def conclude(self, steps: Sequence[int], seen: Sequence[Seen], budget: Budget) -> ProbeResult:
        forced, whole = (np.stack([getattr(each, name) for each in seen]) for name in ("forced", "whole"))
        # By draw, (1 + draws, C): the first draw is all documents as they are.
        bits, right, count, total, tokens = np.moveaxis(
            redrawn(np.concatenate([forced, whole], 1).transpose(2, 1, 0), np.arange(forced.shape[2])),
            1,
            0,
        )
        known = count[:, 0] > 0  # a draw of documents without any forced position says nothing
        losses, accuracy = bits[known] / count[known], right[known] / count[known]
        totals = total / tokens
        regained, forgotten = losses[:, -1] - losses.min(1), accuracy.max(1) - accuracy[:, -1]
        overall = totals[:, -1] - totals.min(1)
        best = int(losses[0].argmin())

        def reading(draws: np.ndarray, unit: str, note: str = "") -> Reading:
            return Reading(float(draws[0]), unit, "lower", percentiles(draws), note)

        readings = {
            "regained": reading(regained, "bits/character", f"since the best, at step {steps[best]}"),
            "forgotten": reading(forgotten, "share of characters"),
            "total_regained": reading(overall, "bits/token", "the same of the loss at all tokens"),
            "final_loss": reading(losses[:, -1], "bits/character"),
            "final_accuracy": Reading(float(accuracy[0, -1]), "share", "higher", percentiles(accuracy[:, -1])),
        }
        at = [float(step) for step in steps]
        curves = {
            "loss where the lexicon decides": _curve(at, losses, "bits/character"),
            "accuracy where the lexicon decides": _curve(at, accuracy, "share"),
            "loss at all tokens": _curve(at, totals, "bits/token"),
        }
        valid = [each.valid for each in seen if each.valid is not None]
        if len(valid) == len(seen):
            readings["word_validity"] = Reading(
                valid[-1], "share of words", "higher", note="of those written at the end"
            )
            readings["word_validity_lost"] = Reading(max(valid) - valid[-1], "share of words", "lower")
            curves["words written that are words"] = Curve(at, valid, "step", "share", log_x=_log(at))
        ranks = [each.rank for each in seen if each.rank is not None]
        if len(ranks) == len(seen):
            readings["effective_rank"] = Reading(ranks[-1], "dimensions", "profile", note="of the states at the end")
            curves["effective rank of the states"] = Curve(at, ranks, "step", "dimensions", log_x=_log(at))
        sentence = "Where the lexicon leaves one completion, the last checkpoint is the best."
        if regained[0] > 0:
            sentence = (
                f"Where the lexicon leaves one completion, the loss rose by {regained[0]:.3f} bits per character after "
                f"its best at step {steps[best]:,}; at all tokens it rose by {overall[0]:.3f} bits per token."
            )
        settings = {
            "steps": list(steps),
            "length": LENGTH,
            "characters": int(count[0, 0]),
            "documents": forced.shape[2],
        }
        left_out = "words that the model writes" if budget.fast else ""
        return ProbeResult(self.id, readings, curves, sentence, settings, left_out=left_out)

    def controls(self) -> list[Control]:
        losses, accuracy = (0.9, 0.5, 0.2, 0.5), (0.2, 0.6, 0.9, 0.5)
        return [
            Control(
                "scripted losses .9, .5, .2, .5",
                True,
                lambda: (_scripted([_alphabet(loss=loss) for loss in losses]), _alphabets()),
                {"regained": Expected(0.3, 1e-4), "final_loss": Expected(0.5, 1e-4)},
                "the loss of the last less the least of all",
            ),
            Control(
                "scripted accuracies .2, .6, .9, .5",
                True,
                lambda: (_scripted([_alphabet(right=share) for share in accuracy]), _alphabets()),
                {"forgotten": Expected(0.4, 1e-6), "final_accuracy": Expected(0.5, 1e-6)},
                "the best of all less the last",
            ),
            Control(
                "scripted losses that only fall",
                False,
                lambda: (_scripted([_alphabet(loss=loss) for loss in (0.9, 0.5, 0.4, 0.1)]), _alphabets()),
                {
                    "regained": Expected(0.0, 0.0),
                    "forgotten": Expected(0.0, 0.0),
                    "total_regained": Expected(0.0, 0.0),
                    "word_validity": Expected(1.0, 0.0),
                },
                "the last is the best",
            ),
            Control(
                "bigrams, and then better",
                False,
                lambda: (_scripted([_pairs(1), _pairs(2)]), _pair_text()),
                {"regained": Expected(0.0, 0.0), "forgotten": Expected(0.0, 0.0), "final_loss": Expected(0.0, 1e-4)},
                "to leave bigrams behind takes nothing away: what a bigram leaves open, two letters decide",
            ),
        ]


def _words(material: Material, table: Sequence[bytes]) -> set[bytes]:
    """Those of the text asked, and of the beginning of the training text."""
    words: set[bytes] = set()
    for streams, most in ((material.text, None), (material.train or (), LEXICON_TOKENS)):
        for stream in streams:
            stop = len(stream) if most is None else min(most, len(stream))
            words |= lexicon(b"".join(table[token] or b"\0" for token in stream.tokens(0, stop).tolist()))
    return words


def _validity(subject: Subject, prompts: Tensor, table: Sequence[bytes], words: set[bytes]) -> float | None:
    """The share of words after prompts (B, T) that are in the lexicon; the first and last are cut and do not count."""
    room = WRITTEN if subject.context is None else min(WRITTEN, subject.context - prompts.shape[1])
    if room < WRITTEN // 2:
        return None
    found = []
    for row in subject.greedy(prompts, room).tolist():
        found += WORD.findall(b"".join(table[token] or b"\0" for token in row))[1:-1]
    return float(np.mean([word in words for word in found])) if found else 0.0


def _effective_rank(subject: Subject, ids: Tensor) -> float | None:
    """e^H of the shares of variance of the last states at windows (B, T)."""
    states = subject.hidden(ids[: max(1, RANK_TOKENS // ids.shape[1])])
    if not states:
        return None
    flat = states[-1].flatten(0, 1).double()
    variances = torch.linalg.svdvals(flat - flat.mean(0)).square()
    shares = variances / variances.sum().clamp(min=1e-300)
    return float(torch.exp(-(shares * shares.clamp(min=1e-300).log()).sum()))


def _curve(at: list[float], draws: np.ndarray, label: str) -> Curve:
    low, high = np.percentile(draws[1:] if len(draws) > 1 else draws, [2.5, 97.5], axis=0).tolist()
    return Curve(at, draws[0].tolist(), "step", label, low, high, log_x=_log(at))


def _log(at: Sequence[float]) -> bool:
    return min(at) > 0


# ---- Controls

ALPHABET, GAP = b"abcdefghijk", b",;:. "  # 16 together, which divides a window: 10 letters of each word are forced


def _scripted(checkpoints: Sequence[Subject]) -> Trajectory:
    return Trajectory(
        [2**number for number in range(len(checkpoints))], lambda step: checkpoints[step.bit_length() - 1]
    )


def _alphabets() -> Material:
    text = np.frombuffer((ALPHABET + GAP) * 32, dtype=np.uint8)
    return material_of([text] * 6, "one word")


def _alphabet(loss: float = 1e-6, right: float = 1.0) -> Subject:
    """Knows each next letter of the one word, or of the first share of its letters, at this loss in bits."""
    cycle = ALPHABET + GAP
    following = _table(dict(zip(cycle, cycle[1:] + cycle[:1], strict=True)))
    known = round(right * (len(ALPHABET) - 1))
    for letter in ALPHABET[known:-1]:
        following[letter] = ord("?")
    return _sure(lambda ids: following[ids], loss)


def _pairs(order: int) -> Subject:
    """Knows the text of `_pair_text` by one letter, or by two."""
    one = _table({ord("a"): ord("n"), ord("c"): ord("n"), ord(" "): ord("a")})

    def following(ids: Tensor) -> Tensor:
        before = torch.nn.functional.pad(ids[:, :-1], (1, 0), value=ord(" "))
        end = torch.where(before == ord("a"), ord("b"), ord("d"))
        return torch.where(ids == ord("n"), end, one[ids])

    if order == 2:
        return _sure(following, 1e-6)
    chances = torch.full((BYTES, BYTES), -30.0)
    for letter, nexts in {"a": "n", "c": "n", "n": "bd", "b": " ", "d": " ", " ": "ac"}.items():
        chances[ord(letter), list(nexts.encode())] = -math.log(len(nexts))
    return spelled(lambda ids: chances[ids], "bigrams")


def _pair_text() -> Material:
    random = np.random.default_rng(0)
    texts = [b" ".join(random.choice([b"anb", b"cnd"], 256).tolist()) for _ in range(6)]
    return material_of([np.frombuffer(text, dtype=np.uint8) for text in texts], "two words")


def _table(following: Mapping[int, int]) -> Tensor:
    table = torch.full((BYTES,), ord(" "))
    for letter, after in following.items():
        table[letter] = after
    return table


def _sure(following: Callable[[Tensor], Tensor], loss: float) -> Subject:
    """Gives what follows the probability 2^-loss, and all else alike the rest."""
    sure = 2.0**-loss
    likely, unlikely = math.log(sure), math.log((1 - sure) / (BYTES - 1))
    return spelled(lambda ids: unlikely + (likely - unlikely) * one_hot(following(ids), BYTES).float(), "script")
