"""Does the future reach the past?"""

import copy
import math
from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import one_hot

from dyadlm.diagnose.causality import (
    GAIN_LIMIT,
    chosen_length,
    cuts,
    fixed_chance,
    future_gradient,
    module_logits,
    ordinary_tokens,
    perturb,
    stream_gain,
    unpredictable,
)
from dyadlm.diagnose.contract import Subject
from dyadlm.diagnose.material import Material
from dyadlm.diagnose.oracles import NEVER, Oracle, independent, uniform
from dyadlm.diagnose.probe import Budget, Control, Expected, NotApplicable, Probe, Published, TooLittle
from dyadlm.diagnose.result import ProbeResult, Reading

LENGTH, STEPS, SYMBOLS = 256, 12, 8
ROUNDING = 1e-4  # changes below this many standard deviations of the logits are no leak


class Leak(Probe):
    """What happens to logits at and before t when the tokens after t are exchanged; and what is gained where nothing
    can be.

    Definition: largest_change = max |Δ logit ≤ t| over cuts t (ten or more of a text of random tokens), of the model as
        it is and after a few steps of training on a copy; relative_change = the same in standard deviations of the
        logits; gradient = max |∂ logits ≤ t / ∂ embedding > t| over the same for embeddings ≤ t; gain = the highest
        running sum of ln S − loss over fresh symbols (uniform; and copied later, the copies not scored), in nats,
        while a copy of the model trains on them (as it is, where there is no module to train).
    Units: logits; standard deviations; none; nats. Direction: lower; causal models show 0 but for rounding, and a gain
        above 20.7 nats by chance once in 10^9.
    Paper: none; for gains, Ville's inequality.
    Pitfalls: what a model does on long texts only (windows, blocks, hashing) is not seen on short ones, so the length
        follows its configuration; weights that are zero at the start hide a path, hence the steps of training; a few
        steps seldom suffice to learn to use a leak, so a gain of 0 proves nothing by itself.
    """

    id: ClassVar[str] = "leak"
    failure_mode: ClassVar[str] = "all"
    question: ClassVar[str] = "Does the future reach the past?"
    meaning: ClassVar[str] = (
        "How much an earlier prediction changes when only later tokens are exchanged; a causal model shows 0 "
        "but for rounding, anything more is a fault."
    )
    tokens: ClassVar[int] = 16 * LENGTH
    published: ClassVar[Sequence[Published]] = (
        Published(
            "largest_change = 0.015",
            "Reformer of transformers",
            "measured elsewhere, configuration not recorded",
            "dyadlm audit --architecture reformer",
        ),
        Published(
            "largest_change = 0.0065",
            "block-sparse BigBird of transformers, on more than (5 + 2 × random blocks) × block size tokens",
            "measured elsewhere, configuration not recorded",
            "dyadlm audit --architecture big_bird",
        ),
    )

    def run(self, subject: Subject, material: Material, budget: Budget) -> ProbeResult:
        module = subject.module
        length, left_out = chosen_length(getattr(module, "config", None), subject.context, LENGTH)
        if length < 16:
            raise TooLittle(f"a context of {length} tokens leaves no future to exchange")
        symbols = ordinary_tokens(subject)
        if len(symbols) < 2:
            raise TooLittle("a vocabulary of one token leaves nothing to exchange")
        few = symbols[torch.linspace(0, len(symbols) - 1, min(SYMBOLS, len(symbols))).long()]
        steps = STEPS // 4 if budget.fast else STEPS
        number, total = len(cuts(length)), 2 * len(cuts(length)) + steps
        change = perturb(subject.logits, symbols, length, 1, budget.seed, lambda i, _: budget.progress(i, total))
        if not change.is_number:
            raise NotApplicable(f"{subject.name} returns values that are not numbers")
        readings, lost = {}, ""
        if module is None:
            gain = stream_gain(
                subject.logits, few, length, steps, None, budget.seed, lambda i, _: budget.progress(number + i, total)
            )
            worst, when = change, "as it is"
            left_out = "; ".join(filter(None, [left_out, "steps of training and the gradient: there is no module"]))
        else:
            pupil, gain = self._trained(module, few, length, steps, budget, number, total)
            positions = [1, length // 2, length - 2]
            draw = torch.randint(len(symbols), (1, length), generator=torch.Generator().manual_seed(budget.seed))
            gradient = future_gradient(pupil, symbols[draw], positions)
            with torch.no_grad():
                later = perturb(
                    lambda ids: module_logits(pupil, ids).float().cpu(),
                    symbols,
                    length,
                    1,
                    budget.seed,
                    lambda i, _: budget.progress(number + steps + i, total),
                )
            worst, when = (later, "after training") if later.largest > change.largest else (change, "as it is")
            if not (later.is_number and math.isfinite(gain)):
                lost = "all that needs steps of training, which made its logits no numbers"
                worst, when, gain = change, "as it is", gain if gain > GAIN_LIMIT else math.nan
            elif gradient is not None:
                readings["gradient"] = Reading(gradient, "of that of the past", "lower")
        readings = {
            "largest_change": Reading(worst.largest, "logits", "lower", note=when),
            "relative_change": Reading(worst.relative, "standard deviations of the logits", "lower"),
            **readings,
        }
        if not math.isnan(gain):
            readings["gain"] = Reading(gain, "nats", "lower", note=f"above {GAIN_LIMIT:.1f} by chance once in 10^9")
        if worst.relative > ROUNDING:
            sentence = (
                f"The future reaches the past: exchanging the tokens from {worst.cut} on changes the logits at "
                f"{worst.position} by up to {worst.largest:.2g}."
            )
        elif gain > GAIN_LIMIT:
            sentence = f"It gains {gain:.0f} nats on streams that cannot be predicted: some future reaches it."
        else:
            sentence = f"No leak: exchanging later tokens changes no earlier logit by more than {worst.largest:.1g}."
        settings = {
            "length": length,
            "cuts": cuts(length),
            "steps": steps,
            "symbols": few.tolist(),
            "seed": budget.seed,
        }
        fewer = f"{STEPS - steps} of {STEPS} steps of training" if budget.fast else ""
        left_out = "; ".join(filter(None, [left_out, fewer, lost]))
        return ProbeResult(self.id, readings, {}, sentence, settings, left_out=left_out)

    @staticmethod
    def _trained(
        module: nn.Module, symbols: Tensor, length: int, steps: int, budget: Budget, done: int, total: int
    ) -> tuple[nn.Module, float]:
        """A copy after a few steps on streams, in evaluation mode, and what it gained on them."""
        pupil = copy.deepcopy(module).train()
        weights = [weight for weight in pupil.parameters() if weight.is_floating_point()]
        for weight in weights:
            weight.requires_grad_()
        # Its state is small: a copy and its gradients are all that a large model costs. Steps do not shrink with the
        # weights, so that those which are zero move.
        optimizer = torch.optim.Adafactor(weights, lr=3e-3, eps=(None, 1.0))

        def learn(loss: Tensor) -> None:
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()  # type: ignore[no-untyped-call]

        with fixed_chance(budget.seed):
            gain = stream_gain(
                lambda ids: module_logits(pupil, ids),
                symbols,
                length,
                steps,
                learn,
                budget.seed,
                lambda i, _: budget.progress(done + i, total),
            )
        optimizer.zero_grad()
        return pupil.eval(), gain

    def controls(self) -> list[Control]:
        glimpse = 0.015

        def next_token(ids: Tensor) -> Tensor:
            return one_hot(torch.roll(ids, -1, 1), 64).float()

        fresh = sum(_scored(step) for step in range(STEPS))
        return [
            Control(
                "a faint glimpse of the next token",
                True,
                lambda: (Oracle(64, lambda ids: glimpse * next_token(ids), "glimpse"), independent(64, 2, LENGTH)),
                {"largest_change": Expected(glimpse, 1e-6)},
                "the logit of the next token is 0.015 higher, and no other",
            ),
            Control(
                "sure of the next token",
                True,
                lambda: (Oracle(64, lambda ids: (1 - next_token(ids)) * NEVER, "seer"), independent(64, 2, LENGTH)),
                {"largest_change": Expected(-NEVER, 1e-6), "gain": Expected(fresh * math.log(SYMBOLS), 1e-3)},
                "each fresh symbol is worth ln 8 nats to whoever knows it",
            ),
            Control(
                "knows nothing",
                False,
                lambda: (uniform(64), independent(64, 2, LENGTH)),
                {"largest_change": Expected(0.0, 0.0), "gain": Expected(0.0, 1e-3)},
                "ln 8 nats on every symbol, whatever the tokens",
            ),
        ]


def _scored(step: int) -> int:
    return int(unpredictable(LENGTH, SYMBOLS, step)[1][:, 1:].sum())
