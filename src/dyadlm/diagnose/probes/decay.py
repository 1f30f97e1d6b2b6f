"""Does planted structure survive the layers?

Dimension letters: B windows, T tokens, L layers, D width, C tags.
"""

from typing import ClassVar

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import one_hot

from dyadlm.diagnose.contract import Subject
from dyadlm.diagnose.material import Material
from dyadlm.diagnose.oracles import Shown, independent
from dyadlm.diagnose.probe import Budget, Control, Expected, NotApplicable, Probe, TooLittle
from dyadlm.diagnose.result import Curve, ProbeResult, Reading
from dyadlm.diagnose.states import by_frequency, states_at
from dyadlm.diagnose.statistics import mean_interval
from dyadlm.evaluate.bootstrap import ratio_interval
from dyadlm.evaluate.linear_probe import fitted_on, ridge_classes

LENGTH, PLACE, LATER = 32, 16, 8
TAGS = 4
LEAST_SELECTIVITY = 0.1  # below, there was nothing to lose


class Decay(Probe):
    """A tag is planted in the input, and read at every depth by a linear probe.

    Definition: the 17th token of windows of 32 is replaced by one of four tags, the most frequent tokens of the text;
        a ridge probe tells which from the state at that token (or 8 tokens later), fitted on three quarters of the
        documents and scored on the rest; selectivity = its accuracy − that of the same probe on control labels (the
        same labels dealt out at random). retained = selectivity at the last layer / at the best one; half_depth = the
        first layer from which on selectivity is below half of the best; best, last = those selectivities; later_best,
        later_last = 8 tokens after the tag, where it must have been carried.
    Units: shares, a selectivity of about 0.75 at most; layers, 0 the embedding. Direction: higher.
    Paper: Hewitt and Liang 2019 (arXiv 1909.03368), control tasks; Alain and Bengio 2016 (arXiv 1610.01644), probes.
    Pitfalls: what a linear probe cannot read may still be there. A model that predicts the next token has reason to let
        go of the current one. Four classes are easy: small losses do not show. Where the probe has more numbers than
        examples, the control tells how much of it is fit.
    """

    id: ClassVar[str] = "decay"
    failure_mode: ClassVar[str] = "F6"
    question: ClassVar[str] = "Does planted structure survive?"
    meaning: ClassVar[str] = (
        "How much of a planted tag can still be read in the last layer, as a share of the best layer; 1 "
        "means that nothing was lost."
    )
    tokens: ClassVar[int] = 20 * 1024

    def run(self, subject: Subject, material: Material, budget: Budget) -> ProbeResult:
        if subject.context is not None and subject.context < LENGTH:
            raise TooLittle(f"a context of {subject.context} tokens is shorter than the {LENGTH} that are read")
        count, fewer = self.texts(budget, LENGTH, least=64)
        ids, documents = material.windows(count, LENGTH, budget.seed)
        tokens = by_frequency(ids)
        if len(tokens) < TAGS or len(ids) < 8 * TAGS:
            raise TooLittle(f"{material.name} has too few texts or different tokens to plant {TAGS} tags")
        tags = tokens[:TAGS]
        fits = fitted_on(documents)
        labels = _dealt(fits, budget.seed)
        random = torch.Generator().manual_seed(budget.seed)
        control = labels.clone()
        for part in (fits, ~fits):
            dealt = labels[part]
            control[part] = dealt[torch.randperm(len(dealt), generator=random)]
        ids = ids.clone()
        ids[:, PLACE] = tags[labels]
        where = torch.tensor([PLACE, PLACE + LATER]).expand(len(ids), -1)
        states = states_at(subject, ids, where, budget)

        def selectivity(column: int) -> np.ndarray:
            """(L + 1, tested): 1, 0 or −1 by whether the probe of the tag is right, and that of the control."""
            found = []
            for state in states:
                x = state[:, column]
                told = [ridge_classes(x[fits], each[fits], x[~fits], TAGS) == each[~fits] for each in (labels, control)]
                found.append((told[0].double() - told[1].double()).numpy())
            return np.stack(found)

        here, later = selectivity(0), selectivity(1)
        tested = documents[~fits.numpy()]
        by_depth = here.mean(1)
        best = int(by_depth.argmax())
        if by_depth[best] < LEAST_SELECTIVITY:
            raise NotApplicable("the planted tag cannot be read at any depth, not even from the embedding")
        units = tested if len(np.unique(tested)) > 1 else np.arange(len(tested))
        _, unit = np.unique(units, return_inverse=True)
        left, had = (np.bincount(unit, weights=here[layer]) for layer in (-1, best))
        retained = float(by_depth[-1] / by_depth[best])
        low = np.flatnonzero(by_depth >= by_depth[best] / 2)[-1] + 1
        lost = low < len(by_depth)

        def share(values: np.ndarray, note: str = "") -> Reading:
            return Reading(float(values.mean()), "share", "higher", mean_interval(values, tested), note)

        readings = {
            "retained": Reading(retained, "share of the best layer's", "higher", ratio_interval(left, had)),
            "best": share(here[best], f"layer {best}"),
            "last": share(here[-1]),
            "later_best": share(later[int(later.mean(1).argmax())], f"layer {int(later.mean(1).argmax())}"),
            "later_last": share(later[-1]),
        }
        if lost:
            readings["half_depth"] = Reading(float(low), "layer", "higher", note=f"of {len(by_depth) - 1}")
        depths = [float(depth) for depth in range(len(by_depth))]
        curves = {
            name: Curve(depths, values.mean(1).tolist(), "layer", "accuracy − that on control labels")
            for name, values in (("at the tag", here), (f"{LATER} tokens later", later))
        }
        ends = f"half of it is lost at layer {low}" if lost else "never less than half of it"
        sentence = f"Of what can be read of a planted tag, {100 * retained:.0f} % is left in the last layer; {ends}."
        settings = {
            "length": LENGTH,
            "texts": len(ids),
            "fitted": int(fits.sum()),
            "place": PLACE,
            "later": LATER,
            "tags": tags.tolist(),
        }
        return ProbeResult(self.id, readings, curves, sentence, settings, left_out=fewer)

    def controls(self) -> list[Control]:
        def stack(erased: int, layers: int = 4) -> Shown:
            def hidden(ids: Tensor) -> list[Tensor]:
                embedded = one_hot(ids, 16).float()
                return [embedded * (layer <= erased) for layer in range(layers + 1)]

            return Shown(16, f"erased after {erased}", hidden=hidden)

        text = independent(16, 64, 320)
        return [
            Control(
                "all is erased after layer 2 of 4",
                True,
                lambda: (stack(2), text),
                {
                    "retained": Expected(0.0, 1e-9),
                    "last": Expected(0.0, 1e-9),
                    "half_depth": Expected(3.0, 0.0),
                    "best": Expected(0.75, 0.12),
                },
                "beyond the eraser both probes say one and the same tag, and are right once in four",
            ),
            Control(
                "four layers that do nothing",
                False,
                lambda: (stack(4), text),
                {"retained": Expected(1.0, 1e-9), "last": Expected(0.75, 0.12), "later_last": Expected(0.0, 0.15)},
                "the same at every depth: 1 less the chance of control labels; and nothing carries the tag on",
            ),
        ]


def _dealt(fits: Tensor, seed: int) -> Tensor:
    """A tag for each window (B,) int64, as many of each among the fitted, and among the others."""
    labels = torch.empty(len(fits), dtype=torch.int64)
    random = torch.Generator().manual_seed(seed)
    for part in (fits, ~fits):
        count = int(part.sum())
        labels[part] = (torch.arange(count) % TAGS)[torch.randperm(count, generator=random)]
    return labels
