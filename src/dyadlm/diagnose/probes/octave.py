"""Which scales of context does a model use?

Dimension letters: B blocks of targets, T tokens, S targets of a block, C the longest context.
"""

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from dyadlm.diagnose.contract import Subject
from dyadlm.diagnose.material import Material
from dyadlm.diagnose.oracles import NEVER, Oracle, Shown, copied, copier, material_of, uniform
from dyadlm.diagnose.probe import Budget, Control, Expected, NotApplicable, OverTime, Published, TooLittle
from dyadlm.diagnose.result import Better, Curve, ProbeResult, Reading
from dyadlm.diagnose.states import all_nats, rows_of
from dyadlm.diagnose.statistics import percentiles, redrawn
from dyadlm.diagnose.trajectory import Trajectory, reached
from dyadlm.evaluate.bootstrap import ratio_interval

LONGEST = 1024
LEAST = 8
BLOCK = 32  # targets scored on the same windows, at most


class Octave(OverTime):
    """What each doubling of the context is worth, on the same targets; and each level of a model that has levels.

    Definition: L(c) = the mean surprise at targets that are read after c tokens from a fresh start, where c stands for
        contexts from 3/4 c to c (exactly c up to 4); gain_A_to_B = G_k = L(2^k) − L(2^(k+1)) on the same targets; total
        = L(1) − L(longest); half_at = the context at which half of the total is gained, interpolated in log c;
        without_NAME = how much the loss rises when that level of the model is silenced in every block, at targets with
        at least a quarter of the window before them. Over checkpoints: learned_A_to_B = the step that first reaches
        half of the final gain of this octave, linear in log (1 + step) in between; of the rest, the last checkpoint's.
    Units: bits per byte, and tokens for half_at. Direction: a profile; of total, higher; bits_per_byte, the loss after
        the longest context, is printed beside it, for a poor model has much to gain.
    Paper: Khandelwal et al. 2018 (arXiv 1805.04623), effective context; the octaves are the position paper's scales.
    Pitfalls: a model that was never shown texts that begin anywhere pays for that at the shortest contexts; beyond the
        length it was trained on, a negative gain says that it cannot extrapolate. Silencing a level asks a model for
        what it was never trained to do: it is what the others cannot make up for at once, not what the level is worth.
        Bits per byte compare across tokenizers, contexts in tokens do not.
    """

    id: ClassVar[str] = "octave"
    failure_mode: ClassVar[str] = "F2"
    question: ClassVar[str] = "Which scales of context are used?"
    meaning: ClassVar[str] = (
        "How much the loss falls from one token of context to the longest one; more means that the model "
        "uses more of what it has read."
    )
    tokens: ClassVar[int] = 130 * 1024
    published: ClassVar[Sequence[Published]] = (
        Published(
            "0.571 bits per token from 256 to 1024 tokens: (gain_256_to_512 + gain_512_to_1024) × bytes per token",
            "GPT-2 (124M) on WikiText-2",
            "recalled, without a paper",
            "dyadlm diagnose openai-community/gpt2 --probe octave --data wiki.test.raw",
        ),
    )

    def run(self, subject: Subject, material: Material, budget: Budget) -> ProbeResult:
        longest = _longest(material, min(LONGEST, subject.context or LONGEST))
        contexts = [2**k for k in range(int(math.log2(longest)) + 1)]
        block = _targets(longest)
        cost = sum(context * block // _targets(context) for context in contexts)  # tokens that a block is read with
        count, fewer = self.texts(budget, cost, least=8 if budget.tokens >= 0.25 else 4)
        ids, documents, sizes = _blocks(material, count, longest + 1, block, budget.seed)
        losses = []
        for done, context in enumerate(contexts):
            losses.append(_after(subject, ids, context, block, budget))
            budget.progress(done + 1, len(contexts) + len(subject.levels))
        bits = np.stack(losses)  # (contexts, B): sums over each block

        def per_byte(sums: np.ndarray, better: Better = "profile", note: str = "") -> Reading:
            return _ratio(sums, sizes, documents, better, note)

        loss = bits.sum(1) / sizes.sum()
        gains = -np.diff(loss)
        total = float(loss[0] - loss[-1])
        readings = {"total": per_byte(bits[0] - bits[-1], "higher", f"gained from 1 to {longest} tokens")}
        if total > 0:
            half = np.array([_half(fallen) for fallen in redrawn((bits[0] - bits).T, documents, budget.seed)])
            readings["half_at"] = Reading(
                float(half[0]), "tokens", "profile", percentiles(half), "of context give half of the total"
            )
        for k, (near, far) in enumerate(pairwise(contexts)):
            readings[f"gain_{near}_to_{far}"] = per_byte(bits[k] - bits[k + 1])
        readings["bits_per_byte"] = per_byte(bits[-1], "lower", f"the loss after {longest} tokens")
        few = max(4, int(budget.tokens * self.tokens) // (longest * max(1, len(subject.levels))))
        for level, name in enumerate(subject.levels):
            rise, places, widths = _silenced(subject, level, material, few, longest, budget)
            readings[f"without_{name}"] = _ratio(rise, widths, places, "profile", "the rise of the loss without it")
            budget.progress(len(contexts) + level + 1, len(contexts) + len(subject.levels))
        best = int(gains.argmax())
        sentence = (
            f"From 1 to {longest:,} tokens of context the loss falls by {total:.3f} bits per byte, "
            f"{gains[best]:.3f} of it from {contexts[best]:,} to {contexts[best + 1]:,}."
        )
        left_out = [fewer] if fewer else []
        if longest < LONGEST:
            left_out.append(f"octaves beyond {longest} tokens, where the context or the documents end")
        intervals = [readings[f"gain_{near}_to_{far}"].interval for near, far in pairwise(contexts)]
        known = [interval for interval in intervals if interval is not None]
        whole = len(known) == len(gains)
        curve = Curve(
            [float(far) for far in contexts[1:]],
            [float(gain) for gain in gains],
            "tokens of context, doubled to",
            "bits/byte gained",
            low=[low for low, _ in known] if whole else None,
            high=[high for _, high in known] if whole else None,
            log_x=True,
        )
        settings = {"contexts": contexts, "blocks": len(ids), "targets": block, "level_windows": few}
        return ProbeResult(
            self.id, readings, {"gain by octave": curve}, sentence, settings, left_out="; ".join(left_out)
        )

    def observe(self, subject: Subject, material: Material, budget: Budget) -> ProbeResult:
        return self.run(subject, material, budget)

    def conclude(self, steps: Sequence[int], seen: Sequence[ProbeResult], budget: Budget) -> ProbeResult:
        last, at = seen[-1], [float(step) for step in steps]
        readings, curves = dict(last.readings), dict(last.curves)
        order = []
        for name in [name for name in last.readings if name.startswith("gain_")]:
            values = np.array([each.readings[name].value for each in seen])
            octave = name.removeprefix("gain_").replace("_", " ")
            curves[f"gain {octave} by step"] = Curve(at, values.tolist(), "step", "bits/byte", log_x=min(at) > 0)
            interval = last.readings[name].interval
            if values[-1] > 0 and (interval is None or interval[0] > 0):  # half of nothing is no step
                learned = reached(steps, values)
                order.append((learned, octave))
                readings[f"learned_{name.removeprefix('gain_')}"] = Reading(learned, "steps", "profile")
        sentence = last.sentence
        if len(order) > 1:
            sentence += (
                f" The gain from {min(order)[1]} tokens was the first to be half learned, at step "
                f"{min(order)[0]:,.0f}, that from {max(order)[1]} the last, at step {max(order)[0]:,.0f}."
            )
        settings = {**last.settings, "steps": list(steps)}
        return ProbeResult(self.id, readings, curves, sentence, settings, left_out=last.left_out)

    def controls(self) -> list[Control]:
        lag, symbols = 24, 64
        octaves = [(2**k, 2 ** (k + 1)) for k in range(7)]
        noise = 1 / 16
        rate = _entropy_rate(8, noise)

        def copies() -> tuple[Subject, Material]:
            source = copier(symbols, lag)
            same = Shown(symbols, "copier", logits=source.logits)
            levels = {"copy": uniform(symbols), "idle": same}
            model = Shown(symbols, "copier 24", logits=source.logits, silenced=levels, context=128)
            return model, copied(symbols, lag, 40, 160)

        return [
            Control(
                "a copier at lag 24",
                True,
                copies,
                {
                    **{f"gain_{near}_to_{far}": Expected(6.0 * (near == 16), 1e-4) for near, far in octaves},
                    "total": Expected(6.0, 1e-4),
                    "without_copy": Expected(6.0, 1e-4),
                    "without_idle": Expected(0.0, 0.0),
                },
                "the source stands 24 tokens back, between 16 and 32: there lies all of log2 64",
            ),
            Control(
                "a copier that grows sure",
                True,
                lambda: (
                    Trajectory(
                        [1, 2, 4, 8], lambda step: _copying(symbols, lag, (0.0, 0.25, 0.5, 1.0)[step.bit_length() - 1])
                    ),
                    copied(symbols, lag, 40, 160),
                ),
                {"gain_16_to_32": Expected(6.0, 1e-4), "learned_16_to_32": Expected(4.0, 1e-3)},
                "half of the surprise is gone at step 4",
            ),
            Control(
                "a Markov chain of order 3",
                False,
                lambda: (_markov(8, noise), _markov_text(8, noise, 40, 160)),
                {
                    "gain_1_to_2": Expected(0.0, 1e-4),
                    "gain_2_to_4": Expected(3.0 - rate, 0.15),
                    **{f"gain_{near}_to_{far}": Expected(0.0, 1e-5) for near, far in octaves if near >= 4},
                    "bits_per_byte": Expected(rate, 0.15),
                },
                "what is farther back than 3 tokens says nothing; two of the three alone say nothing either",
            ),
        ]


def _copying(symbols: int, lag: int, share: float) -> Subject:
    """A copier whose surprise is that share nearer to nothing than that of whoever knows nothing."""
    source = copier(symbols, lag)
    likely = symbols ** (share - 1)
    unlikely = math.log(max(1 - likely, math.exp(NEVER)) / (symbols - 1))

    def logits(ids: Tensor) -> Tensor:
        known = source.logits(ids)
        return known / NEVER * unlikely + (1 - known / NEVER) * math.log(likely) if share else known * 0

    return Oracle(symbols, lambda ids: torch.where(_known(ids, lag), logits(ids), 0.0), "copying", context=128)


def _known(ids: Tensor, lag: int) -> Tensor:
    """(T, 1) bool: where the token to copy has been read."""
    return torch.arange(ids.shape[1])[:, None] >= lag - 1


def _longest(material: Material, limit: int) -> int:
    """The largest power of two, `limit` at most, that some document is longer than."""
    longest = 1 << int(math.log2(limit))
    while longest >= LEAST:
        try:
            material.places(1, longest + 1)
        except TooLittle:
            longest //= 2
        else:
            return longest
    raise TooLittle(f"neither a context of {limit} tokens nor any document of {material.name} holds three octaves")


def _targets(context: int) -> int:
    """How many targets are scored at once after so many tokens."""
    return max(1, min(BLOCK, context // 4))


def _blocks(
    material: Material, count: int, length: int, scored: int, seed: int
) -> tuple[Tensor, np.ndarray, np.ndarray]:
    """Windows (B, T) int64, their documents (B,) int64, and the bytes (B,) of the last `scored` tokens of each.

    Raises `NotApplicable` if these tokens stand for no text.
    """
    places = material.places(count, length, seed)
    rows = [stream.tokens(first, first + length).astype(np.int64) for stream, first, _ in places]
    sizes = [stream.bytes_of(first + length - scored, first + length) for stream, first, _ in places]
    if not sum(sizes):
        raise NotApplicable("the tokens stand for no text, so that nothing can be said per byte")
    return torch.from_numpy(np.stack(rows)), np.array([number for *_, number in places]), np.array(sizes, dtype=float)


def _after(subject: Subject, ids: Tensor, context: int, block: int, budget: Budget) -> np.ndarray:
    """Bits (B,) at the last `block` tokens of windows (B, C + 1), each read after `context` tokens at most."""
    at_once = _targets(context)
    ends = range(ids.shape[1] - block + at_once, ids.shape[1] + 1, at_once)
    groups = torch.stack([ids[:, end - context - 1 : end] for end in ends], 1)  # (B, groups, context + 1)
    nats = all_nats(subject, groups.flatten(0, 1), budget)[:, -at_once:].double().sum(1)
    bits: np.ndarray = (nats.view(len(ids), -1).sum(1) / math.log(2)).numpy()
    return bits


def _half(fallen: np.ndarray) -> float:
    """The context at which half of what the loss falls in all is reached, of what it has fallen at 1, 2, 4 ..."""
    return float(2 ** np.interp(fallen[-1] / 2, np.maximum.accumulate(fallen), np.arange(len(fallen))))


def _silenced(
    subject: Subject, level: int, material: Material, count: int, length: int, budget: Budget
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """By window: how many bits one level is worth, the document, and the bytes of its targets."""
    scored = length - length // 4
    ids, documents, sizes = _blocks(material, count, length, scored, budget.seed)
    quieter = subject.without_level(level)
    assert quieter is not None, "a level that is named can be silenced"
    rows, parts = rows_of(subject, budget, length), []
    for start in range(0, len(ids), rows):
        some = ids[start : start + rows]
        rise = quieter.nats(some)[:, -scored:].double() - subject.nats(some)[:, -scored:].double()
        parts.append(rise.sum(1) / math.log(2))
    return torch.cat(parts).numpy(), documents, sizes


def _ratio(sums: np.ndarray, sizes: np.ndarray, documents: np.ndarray, better: Better, note: str) -> Reading:
    """Σ bits / Σ bytes, with its interval by documents; of one document alone, by blocks."""
    units = documents if len(np.unique(documents)) > 1 else np.arange(len(sums))
    _, place = np.unique(units, return_inverse=True)
    interval = ratio_interval(np.bincount(place, weights=sums), np.bincount(place, weights=sizes))
    return Reading(float(sums.sum() / sizes.sum()), "bits/byte", better, interval, note)


def _entropy_rate(symbols: int, noise: float) -> float:
    sure, rest = 1 - noise + noise / symbols, noise / symbols
    return -sure * math.log2(sure) - (symbols - 1) * rest * math.log2(rest)


def _markov(symbols: int, noise: float) -> Oracle:
    """Knows that the next token is the sum of the last three, modulo the symbols, but for noise."""

    def logits(ids: Tensor) -> Tensor:
        known = torch.zeros(*ids.shape, symbols)
        if ids.shape[1] > 2:
            likely = (ids[:, 2:] + ids[:, 1:-1] + ids[:, :-2]) % symbols
            chance = (1 - noise) * torch.nn.functional.one_hot(likely, symbols).float() + noise / symbols
            known[:, 2:] = chance.log().clamp(min=NEVER)
        return known

    return Oracle(symbols, logits, "Markov 3", context=128)


def _markov_text(symbols: int, noise: float, documents: int, length: int, seed: int = 0) -> Material:
    random = np.random.default_rng(seed)
    drawn = random.integers(symbols, size=(documents, length))
    noisy = random.random((documents, length)) < noise
    for t in range(3, length):
        drawn[:, t] = np.where(noisy[:, t], drawn[:, t], drawn[:, t - 3 : t].sum(1) % symbols)
    return material_of(list(drawn), "a Markov chain of order 3")
