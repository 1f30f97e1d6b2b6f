"""Does generation collapse into repeating itself?"""

from collections.abc import Sequence
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from dyadlm.diagnose.contract import Subject
from dyadlm.diagnose.material import Material
from dyadlm.diagnose.oracles import Automaton, independent
from dyadlm.diagnose.probe import Budget, Control, Expected, Probe, Published, TooLittle
from dyadlm.diagnose.result import Curve, ProbeResult, Reading
from dyadlm.diagnose.statistics import mean_interval, percentiles, redrawn

PROMPT, WRITTEN = 64, 256
PUBLISHED = 100  # tokens of the continuations that Welleck et al. measure
LONGEST_PERIOD = 64
REPEATS = 16
PLACES = list(range(0, WRITTEN + 1, 16))  # of the continuation, at which the loops begun are counted


def repeated_fours(tokens: np.ndarray) -> float:
    """seq-rep-4 of tokens (L,): 1 − distinct 4-grams / 4-grams."""
    grams = np.lib.stride_tricks.sliding_window_view(tokens, 4)
    return 1.0 - len(np.unique(grams, axis=0)) / len(grams)


def loop_onset(tokens: np.ndarray) -> int | None:
    """Where tokens (L,) begin to repeat with one period of at most `LONGEST_PERIOD` up to their end, at least three
    times; None if they do not."""
    best = None
    for period in range(1, min(LONGEST_PERIOD, len(tokens) // 3) + 1):
        differs = np.flatnonzero(tokens[period:] != tokens[:-period])
        onset = 0 if len(differs) == 0 else int(differs[-1]) + 1
        if len(tokens) - onset >= 3 * period and (best is None or onset < best):
            best = onset
    return best


class Loop(Probe):
    """Greedy continuations of prompts from the text, and how a sentence fares that is repeated.

    Definition: seq_rep_4 = 1 − distinct 4-grams / 4-grams of a greedy continuation of 256 tokens, mean over prompts;
        seq_rep_4_of_100 = the same of its first 100 tokens, as published;
        terminal_loops = the share of continuations that end in a cycle of a period of at most 64 tokens, seen three
        times or more (the curve: the share of all that are in one which begins at a position or before it);
        self_reinforcement = the mean log-probability per token of a passage at its 16th repetition − at its 1st; echo =
        the share of 8-grams of the continuation that stand in the prompt.
    Units: shares; bits per token. Direction: lower.
    Paper: Welleck et al. 2020 (arXiv 1908.04319; greedy .442 for their transformer on Wikitext-103, from prompts of 50
        tokens continued by 100); Xu et al. 2022 (arXiv 2206.02369) for self-reinforcement.
    Evidence: that models repeat short phrases before they write coherent text is supported (arXiv 2308.15419).
    Pitfalls: a temperature hides repetition without curing it; greedy is asked on purpose. Repetition grows with the
        length asked, so lengths are part of the definition. Copying from the context is a skill: self_reinforcement is
        no fault by itself.
    """

    id: ClassVar[str] = "loop"
    failure_mode: ClassVar[str] = "F4"
    question: ClassVar[str] = "Does generation collapse into repeating itself?"
    meaning: ClassVar[str] = (
        "The share of repeated groups of four tokens in greedy continuations; 0 means no repetition, near 1 "
        "the text runs in a circle."
    )
    tokens: ClassVar[int] = 28 * 1024
    published: ClassVar[Sequence[Published]] = (
        Published(
            "seq_rep_4_of_100 = 0.442",
            "a transformer of 16 layers trained on Wikitext-103, prompts of 50 tokens from its test set",
            "Welleck et al. 2020, arXiv 1908.04319",
            "dyadlm diagnose MODEL --probe loop --data wiki.test.raw",
        ),
    )

    def run(self, subject: Subject, material: Material, budget: Budget) -> ProbeResult:
        written = WRITTEN if subject.context is None else min(WRITTEN, subject.context - PROMPT)
        if written < 32:
            raise TooLittle(f"a context of {subject.context} tokens leaves no room to continue a prompt of {PROMPT}")
        count, fewer = self.texts(budget, PROMPT + written)
        prompts, documents = material.windows(count, PROMPT, budget.seed)
        rows = budget.rows(PROMPT)  # of what is written, no more than one token's logits are held
        parts = []
        for start in range(0, len(prompts), rows):
            parts.append(subject.greedy(prompts[start : start + rows], written))
            budget.progress(min(start + rows, len(prompts)), len(prompts))
        continuations = torch.cat(parts).numpy()
        fours = np.array([repeated_fours(row) for row in continuations])
        onsets = [loop_onset(row) for row in continuations]
        looping = np.array([onset is not None for onset in onsets], dtype=float)
        echo = np.array([_echo(prompt, row) for prompt, row in zip(prompts.numpy(), continuations, strict=True)])
        readings = {
            "seq_rep_4": Reading(float(fours.mean()), "share", "lower", mean_interval(fours, documents)),
            "terminal_loops": Reading(float(looping.mean()), "share", "lower", mean_interval(looping, documents)),
            "echo": Reading(float(echo.mean()), "share", "lower", mean_interval(echo, documents)),
        }
        if written >= PUBLISHED:
            short = np.array([repeated_fours(row[:PUBLISHED]) for row in continuations])
            readings["seq_rep_4_of_100"] = Reading(
                float(short.mean()), "share", "lower", mean_interval(short, documents), "of the first 100 tokens"
            )
        places = [place for place in PLACES if place <= written]
        begun = np.array([[onset is not None and onset <= place for place in places] for onset in onsets], dtype=float)
        drawn = redrawn(np.concatenate([begun, np.ones((len(begun), 1))], 1), documents)
        shares = drawn[:, :-1] / drawn[:, -1:]
        known = [interval for share in shares.T if (interval := percentiles(share)) is not None]
        curve = Curve(
            places,
            shares[0].tolist(),
            "token written at which the loop has begun",
            "share of continuations in a terminal loop",
            [low for low, _ in known] or None,
            [high for _, high in known] or None,
        )
        found = [onset for onset in onsets if onset is not None]
        if found:
            readings["median_onset"] = Reading(float(np.median(found)), "tokens", "profile", note="of those that loop")
        passage = 16
        if subject.context is None or subject.context >= passage * (REPEATS + 1):
            gain = self._reinforcement(subject, prompts[:, :passage], budget)
            readings["self_reinforcement"] = Reading(
                float(gain.mean()), "bits/token", "lower", mean_interval(gain, documents)
            )
        ends = [f"all after {written} tokens, as the context ends there"] if written < WRITTEN else []
        sentence = (
            f"{100 * fours.mean():.0f} % of the 4-grams of a greedy continuation have stood in it before, and "
            f"{100 * looping.mean():.0f} % of the continuations end in a loop."
        )
        settings = {"prompts": len(prompts), "prompt": PROMPT, "written": written, "decoding": "greedy"}
        return ProbeResult(
            self.id,
            readings,
            {"terminal loops by onset": curve},
            sentence,
            settings,
            left_out="; ".join(filter(None, [fewer, *ends])),
        )

    @staticmethod
    def _reinforcement(subject: Subject, passages: Tensor, budget: Budget) -> np.ndarray:
        """How much more likely (bits per token) passages (B, P) are at their last repetition than at their first."""
        length = passages.shape[1]
        repeated = passages.repeat(1, REPEATS + 1)  # the first one has no context and is not scored
        rows = budget.rows(repeated.shape[1])
        nats = torch.cat([subject.nats(repeated[i : i + rows]) for i in range(0, len(repeated), rows)])
        first, last = nats[:, length - 1 : 2 * length - 1].mean(1), nats[:, -length:].mean(1)
        gained: np.ndarray = ((first - last) / np.log(2)).double().numpy()
        return gained

    def controls(self) -> list[Control]:
        period, states = 7, 2**11
        return [
            Control(
                "an automaton of period 7",
                True,
                lambda: (
                    Automaton(16, lambda ids: (ids + 1) % period, "period 7"),
                    independent(16, 40, PROMPT),
                ),
                {
                    "seq_rep_4": Expected(1 - period / (WRITTEN - 3), 1e-9),
                    "seq_rep_4_of_100": Expected(1 - period / (PUBLISHED - 3), 1e-9),
                    "terminal_loops": Expected(1.0, 0.0),
                },
                "L − 3 four-grams, of which p are distinct",
            ),
            Control(
                "a walk that never returns",
                False,
                lambda: (
                    Automaton(states, lambda ids: (ids + 1) % states, "never returns"),
                    independent(states, 40, PROMPT),
                ),
                {"seq_rep_4": Expected(0.0, 0.0), "terminal_loops": Expected(0.0, 0.0)},
                "no token comes twice, and so no 4-gram",
            ),
        ]


def _echo(prompt: np.ndarray, written: np.ndarray) -> float:
    """The share of 8-grams of what was written that stand in the prompt."""
    known = {tuple(gram) for gram in np.lib.stride_tricks.sliding_window_view(prompt, 8)}
    grams = np.lib.stride_tricks.sliding_window_view(written, 8)
    return float(np.mean([tuple(gram) in known for gram in grams]))
