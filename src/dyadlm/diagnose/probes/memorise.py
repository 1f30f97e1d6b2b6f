"""Is the training text known by heart?

Dimension letters: B texts, T tokens, V vocabulary.
"""

import math
import zlib
from collections import Counter, defaultdict
from collections.abc import Sequence
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from dyadlm.data import byte_tokenizer
from dyadlm.data.canaries import ALPHABET, LENGTH, CanaryPlan, plan_canaries
from dyadlm.data.encoding import prefix_token
from dyadlm.diagnose.contract import Subject
from dyadlm.diagnose.material import Material
from dyadlm.diagnose.oracles import BYTES, NEVER, spelled
from dyadlm.diagnose.probe import Budget, Control, Expected, NotApplicable, OverTime, Published, TooLittle
from dyadlm.diagnose.result import Curve, ProbeResult, Reading
from dyadlm.diagnose.states import all_nats, reader
from dyadlm.diagnose.statistics import mean_interval
from dyadlm.diagnose.tokens import spelled_bytes
from dyadlm.evaluate.bootstrap import RESAMPLES
from dyadlm.evaluate.memorisation import PREFIX, REFERENCES, Estimate, recalled, recite

CANARY_BITS = LENGTH * math.log2(len(ALPHABET))  # that a canary was drawn with
WINDOW = 256


class Memorise(OverTime):
    """Whether random strings planted in the training text are known, against twins that were planted nowhere.

    Definition: exposure = log2(1024) − log2(rank of a canary by its surprise among itself and 1023 strings drawn like
        it), mean over the canaries; exposure_twins likewise. extracted = the share of canaries whose second half greedy
        decoding gives after the first; extracted_excess = that − the share of twins. stored = the mean of max(0, log2
        36^24 − surprise) bits of a canary; capacity = the sum of it over all canaries by parameters, a lower bound of
        what the model can hold. zlib_ratio_train = the mean over windows of the training text of surprise (bits) /
        length of it under zlib (bits), zlib_ratio = of the text asked: the lower the first beside the second, the more
        is known by heart.
    Units: bits, shares, bits per parameter. Direction: lower; capacity is a profile.
    Paper: Carlini et al. 2019 (arXiv 1802.08232), exposure; Carlini et al. 2021 (arXiv 2012.07805), extraction and
        zlib; Morris et al. 2025 (arXiv 2505.24832), about 3.6 bits per parameter of a saturated model.
    Evidence: that only large models memorise is contradicted: down to 0.5M parameters a model holds about 3.6 bits per
        parameter (arXiv 2505.24832).
    Pitfalls: of strings that nothing is known of exposure is log2 e = 1.44 bits, not 0: compare with the twins. It ends
        at 10 bits, so it tells no more of strings shown often. Random strings are the easiest to tell from the rest and
        the hardest to learn: text is memorised otherwise.
    """

    id: ClassVar[str] = "memorise"
    failure_mode: ClassVar[str] = "F8"
    question: ClassVar[str] = "Verbatim or compositional?"
    meaning: ClassVar[str] = (
        "How high planted random strings rank by the model's surprise, in bits; about 1.4 means unknown, 10 "
        "means known by heart."
    )
    tokens: ClassVar[int] = 50 * 1024
    published: ClassVar[Sequence[Published]] = (
        Published(
            "capacity = 3.6 bits per parameter",
            "GPT-like models of 0.5M to 1.5B parameters, trained on random tokens until they hold no more",
            "Morris et al. 2025, arXiv 2505.24832",
            "dyadlm diagnose RUN --probe memorise",
        ),
    )

    def run(self, subject: Subject, material: Material, budget: Budget) -> ProbeResult:
        plan = material.canaries
        if plan is None:
            raise NotApplicable("nothing was planted in its training text; give a run trained with data.canaries")
        if subject.tokenizer is None:
            raise NotApplicable("this model has no tokenizer to read canaries with")
        longest = max(len(canary.tokens) for canary in [*plan.members, *plan.twins])
        if (subject.context or longest) < longest:
            raise TooLittle(f"a context of {subject.context} tokens is shorter than a canary of {longest}")
        prefix = min(PREFIX, min(len(canary.tokens) for canary in [*plan.members, *plan.twins]) // 2)
        references = min(REFERENCES, max(63, int(budget.tokens * self.tokens) // longest))
        references = 2 ** int(math.log2(references + 1)) - 1
        read = reader(subject, budget)
        found = recalled(read, plan, subject.tokenizer, references=references, prefix=prefix)
        every = found.together
        members, twins = every.extracted.mean, every.twin_extracted.mean
        readings = {
            "exposure": _reading(every.exposure, "bits", f"of {found.most:.0f} at most; by chance 1.44"),
            "exposure_twins": _reading(every.twin_exposure, "bits", "never planted"),
            "extracted_excess": Reading(
                members - twins,
                "share",
                "lower",
                _excess(every.extracted, every.twin_extracted),
                "of canaries, less that of twins",
            ),
            "extracted": _reading(every.extracted, "share"),
            "extracted_twins": _reading(every.twin_extracted, "share"),
        }
        strings = [canary.tokens for canary in plan.members]
        nats, _ = recite(read, strings, [prefix_token(subject.tokenizer)], prefix)
        bits = (CANARY_BITS - nats / math.log(2)).clip(0)
        interval = mean_interval(bits, np.arange(len(bits)))
        readings["stored"] = Reading(float(bits.mean()), "bits/canary", "lower", interval, f"of {CANARY_BITS:.0f}")
        if subject.module is not None:
            parameters = sum(weight.numel() for weight in subject.module.parameters())
            readings["capacity"] = Reading(
                float(bits.sum()) / parameters, "bits/parameter", "profile", note="of canaries alone"
            )
        left_out = [] if references == REFERENCES else [f"exposure beyond {found.most:.0f} bits"]
        if budget.fast:
            left_out.append("text under zlib")
        else:
            try:
                readings |= _under_zlib(subject, material, budget)
            except NotApplicable as reason:
                left_out.append(f"text under zlib, for {reason}")
        groups = found.groups
        repeated = [float(group.repetitions or 0) for group in groups]
        curves = {
            "exposure by repetitions": _curve(repeated, [group.exposure for group in groups], "bits"),
            "extracted by repetitions": _curve(repeated, [group.extracted for group in groups], "share"),
        }
        sentence = (
            f"Planted strings are exposed by {every.exposure.mean:.1f} bits and their twins by "
            f"{every.twin_exposure.mean:.1f}; {100 * members:.0f} % of them can be extracted."
        )
        settings = {"canaries": len(plan.members), "references": references, "prefix": prefix, "decoding": "greedy"}
        return ProbeResult(self.id, readings, curves, sentence, settings, left_out="; ".join(left_out))

    def observe(self, subject: Subject, material: Material, budget: Budget) -> ProbeResult:
        return self.run(subject, material, budget)

    def conclude(self, steps: Sequence[int], seen: Sequence[ProbeResult], budget: Budget) -> ProbeResult:
        last = seen[-1]
        at = [float(step) for step in steps]
        curves = dict(last.curves)
        for name in ("exposure", "exposure_twins", "extracted"):
            readings = [each.readings[name] for each in seen]
            known = [reading.interval for reading in readings if reading.interval is not None]
            whole = len(known) == len(readings)
            curves[f"{name} by step"] = Curve(
                at,
                [reading.value for reading in readings],
                "step",
                readings[0].unit,
                [low for low, _ in known] if whole else None,
                [high for _, high in known] if whole else None,
                log_x=min(at) > 0,
            )
        settings = {**last.settings, "steps": list(steps)}
        sentence = f"At the last step, {steps[-1]:,}: {last.sentence[0].lower()}{last.sentence[1:]}"
        return ProbeResult(self.id, last.readings, curves, sentence, settings, left_out=last.left_out)

    def controls(self) -> list[Control]:
        few, many = _planted(1), _planted(32)
        alike = Counter(canary.tokens[0] for canary in few.members)
        open_bits = sum(count * math.log2(count) for count in alike.values()) / len(few.members)
        return [
            Control(
                "a table of what was planted",
                True,
                lambda: (_lookup(few), Material([], None, "canaries", few)),
                {
                    "exposure": Expected(10.0, 0.0),
                    "extracted_excess": Expected(1.0, 0.0),
                    "extracted_twins": Expected(0.0, 0.0),
                    "stored": Expected(CANARY_BITS - math.log2(BYTES) - open_bits, 1e-3),
                },
                "likelier than all 1023 others: log2 of the candidates; only which of them it will be is unknown",
            ),
            Control(
                "preferences of chance",
                False,
                lambda: (_naive(), Material([], None, "canaries", many)),
                {
                    "exposure": Expected(math.log2(math.e), 0.45),
                    "exposure_twins": Expected(math.log2(math.e), 0.45),
                    "extracted": Expected(0.0, 0.0),
                    "extracted_excess": Expected(0.0, 0.0),
                },
                "the rank is uniform: the mean of −log2 of a uniform number is log2 e; 36^-12 to guess the rest",
            ),
        ]


def _reading(estimate: Estimate, unit: str, note: str = "") -> Reading:
    return Reading(estimate.mean, unit, "lower", estimate.interval, note)


def _excess(members: Estimate, twins: Estimate) -> tuple[float, float] | None:
    """95 % interval of a share less another, when both are drawn anew: of what is 0 or 1, the shares tell all."""
    if min(members.units, twins.units) < 2:
        return None
    random = np.random.default_rng(0)
    one, other = (random.binomial(each.units, each.mean, RESAMPLES) / each.units for each in (members, twins))
    low, high = np.percentile(one - other, [2.5, 97.5])
    return float(low), float(high)


def _curve(repeated: list[float], estimates: Sequence[Estimate], label: str) -> Curve:
    known = [estimate.interval for estimate in estimates if estimate.interval is not None]
    whole = len(known) == len(estimates)
    return Curve(
        repeated,
        [estimate.mean for estimate in estimates],
        "times planted",
        label,
        [low for low, _ in known] if whole else None,
        [high for _, high in known] if whole else None,
        log_x=True,
    )


def _under_zlib(subject: Subject, material: Material, budget: Budget) -> dict[str, Reading]:
    """The mean of bits by bits of zlib, of the training text and of the text asked, where there is any."""
    assert subject.tokenizer is not None
    table = spelled_bytes(subject.tokenizer, subject.vocabulary, [*material.text, *(material.train or ())])
    length, found = min(WINDOW, subject.context or WINDOW), {}
    for name, streams in (("zlib_ratio_train", material.train), ("zlib_ratio", material.text)):
        text = Material(streams or [], None, material.name)
        try:
            ids, documents = text.windows(max(8, int(budget.tokens * 8192) // length), length, budget.seed)
        except TooLittle:
            continue
        bits = all_nats(subject, ids, budget).double().sum(1).numpy() / math.log(2)
        packed = [8 * len(zlib.compress(b"".join(table[token] for token in row[1:]), 9)) for row in ids.tolist()]
        ratios = bits / packed
        found[name] = Reading(float(ratios.mean()), "ratio", "profile", mean_interval(ratios, documents))
    return found


# ---- Controls


def _planted(count: int) -> CanaryPlan:
    return plan_canaries(count, 0, byte_tokenizer(), 85 * count, 64)


def _lookup(plan: CanaryPlan) -> Subject:
    """Knows what followed every beginning of a planted string, from the second token on, and nothing else."""
    after: dict[tuple[int, ...], set[int]] = defaultdict(set)
    for canary in plan.members:
        for at in range(1, len(canary.tokens)):
            after[tuple(canary.tokens[:at])].add(canary.tokens[at])

    def logits(ids: Tensor) -> Tensor:
        scores = torch.zeros(*ids.shape, BYTES)
        for row, tokens in enumerate(ids.tolist()):
            for at in range(1, len(tokens)):
                if known := after.get(tuple(tokens[1 : at + 1])):
                    scores[row, at] = NEVER
                    scores[row, at, list(known)] = 0.0
        return scores

    return spelled(logits, "lookup")


def _naive() -> Subject:
    """Has a preference for every pair of bytes, by chance."""
    scores = torch.randn(BYTES, BYTES, generator=torch.Generator().manual_seed(0))
    return spelled(lambda ids: scores[ids], "naive")
