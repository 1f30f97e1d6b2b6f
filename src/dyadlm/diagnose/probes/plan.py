"""Is the future represented, beyond what counts of tokens foretell?

Dimension letters: B windows, T tokens, M tokens of a window whose states are read, N examples, D width, O outcomes,
K levels.
"""

import math
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import one_hot

from dyadlm.diagnose.contract import Subject
from dyadlm.diagnose.material import Material
from dyadlm.diagnose.ngram import Counts
from dyadlm.diagnose.oracles import Shown, independent, material_of
from dyadlm.diagnose.probe import Budget, Control, Expected, Probe, TooLittle
from dyadlm.diagnose.result import Curve, ProbeResult, Reading
from dyadlm.diagnose.states import by_frequency, hidden_states, rows_of
from dyadlm.diagnose.statistics import mean_interval, percentiles, redrawn
from dyadlm.evaluate.linear_probe import fitted_on, ridge

AHEAD = (2, 4, 8, 16)  # 1 is the next token, which a language model is trained to know
LENGTH = 128
OUTCOMES = 64
READ = 32  # tokens of a window whose states are read
SHARPNESS = (0.0, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0)
LONGEST = 3  # tokens of the n-gram's contexts


class Plan(Probe):
    """What the last hidden state knows of tokens farther ahead than the next, and whether forecasts foresee.

    Definition: of the token k ahead the 63 most frequent are told apart, and all others are one outcome. NLL_probe =
        its surprise under softmax(s · ridge(h_t) + log frequency), ridge regression of the outcome on the last hidden
        state, s chosen on a fifth of the windows it is fitted on; NLL_ngram = under interpolated counts of x_{t+k}
        after the last 0 to 3 tokens, the number chosen likewise, both of the same windows. Λ_k = NLL_ngram − NLL_probe
        on other documents. ahead_k = Λ_k − max(0, Λ_k of the same model with random weights); beyond_k = Λ_k and
        untrained_k are its parts. Headline: ahead_2. skill_LEVEL = 1 − squared error of the forecasts of a level's next
        node / that of foreseeing no change, of models that have such forecasts.
    Units: bits per token; skills are shares. Direction: higher.
    Paper: Pal et al. 2023 (arXiv 2311.04897), Future Lens; Wu et al. 2024 (arXiv 2404.00859); Bachmann and Nagarajan
        2024 (arXiv 2403.06963), path-star, which has to be trained for: `dyadlm recall`.
    Evidence: that small models do not plan is supported: what their states tell of later tokens serves the next one;
        computing ahead is seen in larger models (arXiv 2404.00859).
    Pitfalls: a linear map finds less than there is. What a long context betrays of the future is no plan: a model that
        copies from far back knows what the copy will say. Random weights remember the last tokens, so they reach the
        n-gram or pass it; hence the difference. A few thousand examples bound what counts of three tokens learn.
    """

    id: ClassVar[str] = "plan"
    failure_mode: ClassVar[str] = "F10"
    question: ClassVar[str] = "Is the future represented?"
    meaning: ClassVar[str] = (
        "What the state tells of the token two ahead beyond counts of the last tokens and beyond random "
        "weights; above 0 it knows more."
    )
    tokens: ClassVar[int] = 60 * 1024

    def run(self, subject: Subject, material: Material, budget: Budget) -> ProbeResult:
        length = min(LENGTH, subject.context or LENGTH)
        if length < 2 * AHEAD[-1]:
            raise TooLittle(f"a context of {length} tokens holds no two times {AHEAD[-1]} ahead")
        count, fewer = self.texts(budget, length, least=32)
        ids, documents = material.windows(count, length, budget.seed)
        fit = fitted_on(documents)
        if len(ids) < 16 or not bool((~fit).any()):
            raise TooLittle(f"{material.name} has {len(ids)} windows of {length} tokens, and 16 are needed")
        tune = torch.arange(len(ids)) % 5 == 4
        parts = (fit & ~tune, fit & tune, ~fit)  # fitted on, chosen on, asked
        places = torch.linspace(LONGEST, length - AHEAD[-1] - 1, min(READ, length - AHEAD[-1] - LONGEST)).long()
        known = torch.full((max(subject.vocabulary, int(ids.max()) + 1),), OUTCOMES - 1)
        frequent = by_frequency(ids[parts[0]])[: OUTCOMES - 1]
        known[frequent] = torch.arange(len(frequent))
        outcomes = known[ids]
        untrained = None if budget.fast else subject.untrained()
        models = [model for model in (subject, untrained) if model is not None]
        states = [_states(model, ids, places, budget) for model in models]
        readings: dict[str, Reading] = {}
        asked = documents[parts[2].numpy()]
        for k in AHEAD:
            target = outcomes[:, places + k]
            counted = _ngram(ids, outcomes, k, places, parts)
            gained = [counted - _probe(state, target, parts) for state in states]  # bits (windows asked, M)
            beyond = gained[0].mean(1)
            readings |= _readings(k, beyond, gained[1].mean(1) if untrained is not None else None, asked)
        readings = {name: readings[name] for name in sorted(readings, key=_order)}
        readings |= _skills(subject, ids[parts[2]], asked, budget)
        head = readings[f"ahead_{AHEAD[0]}"].value
        than = "counts of the last tokens" + " and random weights" * (untrained is not None)
        more = "more" if head >= 0 else "less"
        sentence = f"Of the token {AHEAD[0]} ahead the states tell {abs(head):.3f} bits {more} than {than}."
        at = [float(k) for k in AHEAD]
        values = [readings[f"ahead_{k}"] for k in AHEAD]
        intervals = [value.interval for value in values if value.interval is not None]
        whole = len(intervals) == len(values)
        curve = Curve(
            at,
            [value.value for value in values],
            "tokens ahead",
            "bits/token beyond n-grams",
            [low for low, _ in intervals] if whole else None,
            [high for _, high in intervals] if whole else None,
            log_x=True,
        )
        settings = {"windows": len(ids), "length": length, "states": len(places), "outcomes": OUTCOMES, "ahead": AHEAD}
        left_out = "; ".join(filter(None, [fewer, "the comparison with random weights" * (untrained is None)]))
        return ProbeResult(
            self.id, readings, {"the future in the states": curve}, sentence, settings, left_out=left_out
        )

    def controls(self) -> list[Control]:
        symbols = 16

        def knows(ids: Tensor) -> list[Tensor]:
            """The script: what is to come."""
            shifted = [one_hot(ids.roll(-k, 1), symbols).float() for k in AHEAD]
            return [one_hot(ids, symbols).float(), torch.cat(shifted, -1)]

        def sees(ids: Tensor) -> list[Tensor]:
            return [one_hot(ids, symbols).float()] * 2

        def right(ids: Tensor) -> tuple[Tensor, Tensor]:
            return torch.zeros(*ids.shape, 1), torch.ones(*ids.shape, 1)

        def stays(ids: Tensor) -> tuple[Tensor, Tensor]:
            return torch.ones(*ids.shape, 1), torch.ones(*ids.shape, 1)

        def blind() -> Subject:
            return Shown(symbols, "blind", hidden=sees)

        silent = {"one": blind()}
        dull = Shown(symbols, "dull", hidden=lambda ids: [torch.zeros(*ids.shape, 1)] * 2)
        return [
            Control(
                "a script that is known",
                True,
                lambda: (
                    Shown(
                        symbols,
                        "script",
                        hidden=knows,
                        forecasts=right,
                        untrained=blind(),
                        silenced=silent,
                    ),
                    independent(symbols, 60, 2 * LENGTH),
                ),
                {
                    **{f"ahead_{k}": Expected(math.log2(symbols), 0.05) for k in AHEAD},
                    "skill_one": Expected(1.0, 1e-6),
                },
                "counts know nothing of it, log2 16 bits, and the script all",
            ),
            Control(
                "independent tokens, and forecasts that nothing changes",
                False,
                lambda: (
                    Shown(symbols, "sees", hidden=sees, forecasts=stays, untrained=blind(), silenced=silent),
                    independent(symbols, 60, 2 * LENGTH),
                ),
                {**{f"ahead_{k}": Expected(0.0, 0.05) for k in AHEAD}, "skill_one": Expected(0.0, 1e-6)},
                "there is nothing to know; and no change foreseen is persistence itself",
            ),
            Control(
                "a clock",
                False,
                lambda: (Shown(symbols, "clock", hidden=sees, untrained=dull), _clock(symbols, 40, LENGTH)),
                {
                    **{f"ahead_{k}": Expected(0.0, 0.05) for k in AHEAD},
                    "untrained_2": Expected(-math.log2(symbols), 0.05),
                },
                "counts know all of it; that random weights know less than counts is no merit",
            ),
        ]


def _clock(symbols: int, documents: int, length: int) -> Material:
    """Each token is one more than the last, modulo the symbols."""
    return material_of([(np.arange(length) + start) % symbols for start in range(documents)], "a clock")


def _states(subject: Subject, ids: Tensor, places: Tensor, budget: Budget) -> Tensor:
    """The last hidden states at some places of windows (B, T): (B, M, D)."""
    rows, parts = budget.rows(ids.shape[1]), []
    for start in range(0, len(ids), rows):
        parts.append(hidden_states(subject, ids[start : start + rows])[-1][:, places])
        budget.progress(min(start + rows, len(ids)), len(ids))
    return torch.cat(parts)


def _probe(states: Tensor, target: Tensor, parts: tuple[Tensor, Tensor, Tensor]) -> np.ndarray:
    """Bits (windows asked, M) of outcomes (B, M) under a probe of states (B, M, D)."""
    fit, tune, asked = parts
    shown = one_hot(target[fit].flatten(), OUTCOMES).double()
    prior = ((shown.sum(0) + 0.5) / (len(shown) + 0.5 * OUTCOMES)).log()
    others = torch.cat([states[tune], states[asked]]).flatten(0, 1)
    said = ridge(states[fit].flatten(0, 1), shown, others)
    labels = torch.cat([target[tune], target[asked]]).flatten()
    first = int(tune.sum()) * target.shape[1]

    def nats(sharpness: float, part: slice) -> Tensor:
        return torch.nn.functional.cross_entropy(sharpness * said[part] + prior, labels[part], reduction="none")

    best = min(SHARPNESS, key=lambda sharpness: float(nats(sharpness, slice(0, first)).mean()))
    bits: np.ndarray = (nats(best, slice(first, None)).view(-1, target.shape[1]) / math.log(2)).numpy()
    return bits


def _ngram(ids: Tensor, outcomes: Tensor, k: int, places: Tensor, parts: tuple[Tensor, Tensor, Tensor]) -> np.ndarray:
    """Bits (windows asked, M) of the outcomes (B, T) k after some places, under counts of the tokens before."""
    fit, tune, asked = (ids[part].numpy() for part in parts)
    counts = Counts(fit[:, :-k], outcomes[parts[0], k:].numpy(), OUTCOMES, LONGEST)

    def bits(part: int, tokens: np.ndarray, order: int) -> np.ndarray:
        labels = outcomes[parts[part]][:, places + k].numpy()
        found = []
        for row, label in zip(tokens, labels, strict=True):  # by row: outcomes of all places are many
            chances = counts.chances(row[None], order)[0, places.numpy()]
            found.append(-np.log2(np.take_along_axis(chances, label[:, None], 1)[:, 0]))
        return np.stack(found)

    best = min(range(LONGEST + 1), key=lambda order: bits(1, tune, order).mean())
    return bits(2, asked, best)


def _readings(k: int, beyond: np.ndarray, untrained: np.ndarray | None, documents: np.ndarray) -> dict[str, Reading]:
    """By windows (B,): Λ_k, that of random weights, and the first less what is above zero of the second."""
    found = {f"beyond_{k}": Reading(float(beyond.mean()), "bits/token", "higher", mean_interval(beyond, documents))}
    ahead = found[f"beyond_{k}"]
    if untrained is not None:
        draws = redrawn(np.stack([beyond, untrained, np.ones_like(beyond)], 1), documents)
        less = draws[:, 0] / draws[:, 2] - np.maximum(0, draws[:, 1] / draws[:, 2])
        ahead = Reading(float(less[0]), "bits/token", "higher", percentiles(less))
        interval = mean_interval(untrained, documents)
        found[f"untrained_{k}"] = Reading(float(untrained.mean()), "bits/token", "profile", interval)
    found[f"ahead_{k}"] = ahead
    return found


def _order(name: str) -> tuple[int, int]:
    kind, _, k = name.partition("_")
    return ("ahead", "beyond", "untrained").index(kind), int(k)


def _skills(subject: Subject, ids: Tensor, documents: np.ndarray, budget: Budget) -> dict[str, Reading]:
    """The skill of each level's forecasts on windows (B, T); nothing of a model that has none."""
    if subject.forecasts(ids[:1]) is None:
        return {}
    rows, parts = rows_of(subject, budget, ids.shape[1]), []
    for start in range(0, len(ids), rows):
        errors = subject.forecasts(ids[start : start + rows])
        assert errors is not None
        parts.append(torch.stack([error.double().sum(1) for error in errors], 1))  # (B, 2, K)
    draws = redrawn(torch.cat(parts).numpy(), documents, budget.seed)
    found = {}
    for level in range(draws.shape[2]):
        missed, stayed = draws[:, 0, level], draws[:, 1, level]
        if stayed[0] > 0:
            skill = 1 - missed / np.where(stayed > 0, stayed, np.nan)
            name = subject.levels[level] if level < len(subject.levels) else str(level)
            found[f"skill_{name}"] = Reading(float(skill[0]), "share", "higher", percentiles(skill))
    return found
