"""Does more past help? The loss by position in the context."""

import math
from itertools import pairwise
from typing import ClassVar

import numpy as np
import torch

from dyadlm.diagnose.contract import Subject
from dyadlm.diagnose.material import Material
from dyadlm.diagnose.oracles import dirichlet, independent, laplace, uniform
from dyadlm.diagnose.probe import Budget, Control, Expected, Probe, TooLittle
from dyadlm.diagnose.result import Curve, ProbeResult, Reading
from dyadlm.diagnose.statistics import mean_interval, percentiles, redrawn

NEAR, FAR = 50, 500  # Olsson et al. 2022 compare these positions
LEAST = 150  # tokens, below which far would be near
AROUND = 0.1  # a position stands for those within a tenth of it


class Position(Probe):
    """How the loss falls as more tokens have been read.

    Definition: L(t) = the mean surprise at the t-th token of windows of length T (t counted from 1), in bits per token.
        far_minus_near = L(500) − L(50), each averaged over positions within 10 % of it; slope = the least-squares slope
        of L in ln t from position 10 on; late_rise = max(0, L in the last tenth of the window − the lowest tenth).
    Units: bits per token; slope: bits per token per e-fold of the context. Direction: lower; more negative says that
        the past helps, and a late_rise of 0 that what is far does no harm.
    Paper: Olsson et al. 2022 (arXiv 2209.11895), in-context learning score.
    Pitfalls: where the context ends before 550 tokens, far is the last position that it has room for (the note says
        which), and below 150 tokens there is none; windows start anywhere in a document, so the first positions lack a
        past that the text has; a model that was trained on shorter windows than it is asked to read shows a late rise
        for that reason alone; the text's own difficulty by position averages out over windows only.
    """

    id: ClassVar[str] = "position"
    failure_mode: ClassVar[str] = "F4"
    question: ClassVar[str] = "Does more past help?"
    meaning: ClassVar[str] = (
        "The loss at position 500 of a window minus that at position 50; below 0 the longer past helps, "
        "above 0 it does harm."
    )
    tokens: ClassVar[int] = 128 * 1024

    def run(self, subject: Subject, material: Material, budget: Budget) -> ProbeResult:
        length = min(1024, subject.context or 1024)
        if length < LEAST:
            raise TooLittle(f"a context of {length} tokens has no position that is far from {NEAR}")
        count, fewer = self.texts(budget, length)
        ids, documents = material.windows(count, length, budget.seed)
        rows = budget.rows(length)
        parts = []
        for start in range(0, len(ids), rows):
            parts.append(subject.nats(ids[start : start + rows]))
            budget.progress(min(start + rows, len(ids)), len(ids))
        bits = torch.cat(parts).double().numpy() / math.log(2)  # (B, T - 1): of positions 2 to T
        far = FAR if length > 1.1 * FAR else int((length - 1) / 1.1)

        def around(position: int) -> np.ndarray:
            low, high = int(position * (1 - AROUND)), int(position * (1 + AROUND))
            mean: np.ndarray = bits[:, low - 2 : high - 1].mean(1)
            return mean

        by_position = bits.mean(0)
        positions = np.arange(2, length + 1)
        late = positions >= 10
        spread = np.log(positions[late]) - np.log(positions[late]).mean()
        slopes = bits[:, late] @ (spread / (spread**2).sum())  # of each window: least squares are linear in the loss
        tenths = np.stack([part.mean(1) for part in np.array_split(bits, 10, 1)], 1)
        drawn = redrawn(np.concatenate([tenths, np.ones((len(bits), 1))], 1), documents)
        means = drawn[:, :-1] / drawn[:, -1:]
        rises = means[:, -1] - means.min(1)  # not below 0, as the last tenth is one of them
        difference = around(far) - around(NEAR)
        edges = np.unique(np.geomspace(1, len(by_position), 25).astype(int))
        binned = [by_position[low:high].mean() for low, high in pairwise(edges)]
        middles = [float(positions[low:high].mean()) for low, high in pairwise(edges)]
        fall = float(difference.mean())
        moves = "falls" if fall < 0 else "rises"
        ends = [] if far == FAR else [f"the context ends at {length} tokens; far is position {far}"]
        return ProbeResult(
            self.id,
            {
                "far_minus_near": Reading(
                    fall, "bits/token", "lower", mean_interval(difference, documents), f"far is position {far}"
                ),
                "slope": Reading(
                    float(slopes.mean()), "bits/token per e-fold", "lower", mean_interval(slopes, documents)
                ),
                "late_rise": Reading(float(rises[0]), "bits/token", "lower", percentiles(rises)),
            },
            {"loss by position": Curve(middles, [float(b) for b in binned], "position", "bits/token", log_x=True)},
            f"From position {NEAR} to {far} the loss {moves} by {abs(fall):.3f} bits per token.",
            {"length": length, "windows": len(ids), "near": NEAR, "far": far},
            left_out="; ".join(filter(None, [fewer, *ends])),
        )

    def controls(self) -> list[Control]:
        return [
            Control(
                "a predictor that counts, V = 64",
                True,
                lambda: (laplace(64), dirichlet(64, 64, 1024)),
                {"far_minus_near": Expected(counted_bits(64, FAR - 1) - counted_bits(64, NEAR - 1), 0.03)},
                "Dirichlet(1): the mean of its predictive entropy after 49 and after 499 tokens",
            ),
            Control(
                "independent tokens",
                False,
                lambda: (uniform(64), independent(64, 16, 1024)),
                {"far_minus_near": Expected(0.0, 1e-6), "slope": Expected(0.0, 1e-6), "late_rise": Expected(0.0, 1e-6)},
                "nothing can be learned from the past",
            ),
        ]


def counted_bits(vocabulary: int, seen: int) -> float:
    """The expected surprise, in bits, at the next of independent tokens to who has counted `seen` of them, if their
    frequencies are drawn from Dirichlet(1): a token's count c is then beta-binomial, and its chance (c + 1) / (n + V).
    """
    total = 0.0
    for count in range(seen + 1):
        ways = math.comb(seen - count + vocabulary - 2, vocabulary - 2) / math.comb(seen + vocabulary - 1, seen)
        chance = (count + 1) / (seen + vocabulary)
        total -= vocabulary * ways * chance * math.log2(chance)
    return total
