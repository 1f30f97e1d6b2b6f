"""Does the space move from layer to layer?

Dimension letters: B windows, T tokens, M tokens of a window, N tokens compared at once, L layers, D width, V
vocabulary.
"""

from itertools import pairwise
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from dyadlm.diagnose.contract import Subject
from dyadlm.diagnose.material import Material
from dyadlm.diagnose.oracles import Shown, independent
from dyadlm.diagnose.probe import Budget, Control, Expected, Probe, TooLittle
from dyadlm.diagnose.result import Curve, ProbeResult, Reading
from dyadlm.diagnose.states import rows_of, states_at
from dyadlm.diagnose.statistics import mean_interval, percentiles, redrawn

LENGTH, LEAST = 128, 16
SAMPLED = 16  # tokens of a window that are compared; neighbours are no independent sample
AT_ONCE = 256  # tokens in one kernel


class Drift(Probe):
    """Whether what stands at a token stays where it was, turns, or becomes something else from layer to layer.

    Definition: cka = debiased linear CKA of the embedding and the last layer's output: HSIC(X, Y) / √(HSIC(X, X)
        HSIC(Y, Y)) with the unbiased HSIC of Song et al., over tokens of many windows, in batches
        of 256 (which are what is redrawn for its interval); cosine = the mean cosine of
        the same two at the same token, each feature standardised over tokens; adjacent_cka and adjacent_cosine = the
        mean of the same over neighbouring layers; lens_kl = KL(final prediction ‖ the head's reading of a layer's
        output), mean over layers before the last
        and over a quarter of the texts. The first token of a window is left out.
    Units: none, −1 to 1; nats. Direction: cka and cosine higher, lens_kl lower, if a space that keeps its meaning is
        wanted. CKA does not see a rotation, cosine and the lens do: a high cka with a low cosine is a space that turns.
    Paper: Kornblith et al. 2019 (arXiv 1905.00414), Nguyen et al. 2021 (arXiv 2010.15327) for the unbiased estimate in
        batches; nostalgebraist 2020 for the logit lens.
    Pitfalls: a few features of large variance dominate CKA. The last layer's output is normalised in most models, as
        the head reads it. A layer that has to compute has to move: no drift at all is an identity. The lens asks early
        layers in a language that they were not trained in.
    """

    id: ClassVar[str] = "drift"
    failure_mode: ClassVar[str] = "F5"
    question: ClassVar[str] = "Does the space move?"
    meaning: ClassVar[str] = (
        "How alike the embedding and the last layer's output are, from 0 (unrelated) to 1 (the same); lower "
        "means that layers change the space more."
    )
    tokens: ClassVar[int] = 20 * 1024

    def run(self, subject: Subject, material: Material, budget: Budget) -> ProbeResult:
        length = min(LENGTH, subject.context or LENGTH)
        if length < LEAST:
            raise TooLittle(f"a context of {length} tokens is too short to compare layers")
        count, fewer = self.texts(budget, length)
        ids, documents = material.windows(count, length, budget.seed)
        random = np.random.default_rng(budget.seed)
        each = min(SAMPLED, length - 1)
        columns = np.stack([1 + random.permutation(length - 1)[:each] for _ in range(len(ids))])
        by_window = states_at(subject, ids, torch.from_numpy(columns), budget)
        states = [state.flatten(0, 1) for state in by_window]
        order = torch.from_numpy(random.permutation(len(states[0])))
        pairs = [(0, layer) for layer in range(1, len(states))] + list(pairwise(range(len(states))))
        alike = dict(zip(pairs, _cka(states, pairs, order, budget.seed), strict=True))
        standard = [_standardised(state) for state in states]
        cosines = {
            pair: torch.cosine_similarity(standard[pair[0]], standard[pair[1]], dim=1).view(len(ids), each).mean(1)
            for pair in pairs
        }
        last = len(states) - 1
        steps = list(pairwise(range(len(states))))
        between = torch.stack([cosines[step] for step in steps]).mean(0)

        def cosine(values: Tensor) -> Reading:
            figures = values.double().numpy()
            return Reading(float(figures.mean()), "cosine", "higher", mean_interval(figures, documents))

        readings = {}
        known = alike[0, last]
        if known is not None:
            readings["cka"] = Reading(
                float(known[0]), "CKA", "higher", percentiles(known), "embedding to last layer; blind to rotations"
            )
        readings["cosine"] = cosine(cosines[0, last])
        near = [value for step in steps if (value := alike[step]) is not None]
        if near:
            close = np.mean(near, 0)
            readings["adjacent_cka"] = Reading(float(close[0]), "CKA", "higher", percentiles(close))
        readings["adjacent_cosine"] = cosine(between)
        depths = list(range(1, len(states)))
        curves = {
            "cosine with the embedding": Curve(
                depths, [float(cosines[0, layer].mean()) for layer in depths], "layer", "cosine"
            )
        }
        seen = [(layer, value) for layer in depths if (value := alike[0, layer]) is not None]
        if seen:
            curves["CKA with the embedding"] = Curve(
                [layer for layer, _ in seen], [float(value[0]) for _, value in seen], "layer", "CKA"
            )
        left_out = [fewer] if fewer else []
        far = self._lens(subject, ids, torch.from_numpy(columns), by_window, max(8, len(ids) // 4), budget)
        if far is None:
            left_out.append("the logit lens, for the norm and the head of this model are not recognised")
        else:
            by_text = far.mean(0).double().numpy()
            readings["lens_kl"] = Reading(
                float(by_text.mean()), "nats", "lower", mean_interval(by_text, documents[: len(by_text)])
            )
            curves["KL of the final prediction to the lens"] = Curve(
                list(range(len(far))), far.mean(1).tolist(), "layer", "nats"
            )
        said = "" if known is None else f"has a CKA of {known[0]:.2f} with the last layer's output and "
        sentence = f"The embedding {said}lies at a cosine of {readings['cosine'].value:.2f} to it."
        if known is None:
            sentence = f"The embedding lies at a cosine of {readings['cosine'].value:.2f} to the last layer's output."
        settings = {"length": length, "texts": len(ids), "tokens": len(states[0]), "at_once": AT_ONCE}
        return ProbeResult(self.id, readings, curves, sentence, settings, left_out="; ".join(left_out))

    @staticmethod
    def _lens(
        subject: Subject, ids: Tensor, columns: Tensor, states: list[Tensor], count: int, budget: Budget
    ) -> Tensor | None:
        """KL of the final prediction to the head's reading at some tokens of the first `count` windows, (L, B) by layer
        from the embedding to the last but one; None without a lens. columns (B, M), states (B, M, D)."""
        rows, parts = rows_of(subject, budget, ids.shape[1]), []
        for start in range(0, min(count, len(ids)), rows):
            some = slice(start, min(start + rows, count))
            logits = subject.logits(ids[some])
            final = logits.gather(1, columns[some, :, None].expand(-1, -1, logits.shape[-1])).log_softmax(-1)
            found = []
            for state in states[:-1]:
                said = subject.lens(state[some])
                if said is None:
                    return None
                kl = final.exp() * torch.where(final.isfinite(), final - said.log_softmax(-1), 0.0)
                found.append(kl.sum(-1).mean(1))
            parts.append(torch.stack(found))
        return torch.cat(parts, 1)

    def controls(self) -> list[Control]:
        symbols, width = 64, 32
        random = torch.Generator().manual_seed(0)
        table = torch.randn(symbols, width, generator=random)
        head = torch.randn(width, symbols, generator=random)

        def stack(turn: Tensor) -> Shown:
            def hidden(ids: Tensor) -> list[Tensor]:
                states = [table[ids]]
                for _ in range(3):
                    states.append(states[-1] @ turn)
                return states

            return Shown(symbols, "stack", hidden=hidden, head=head)

        quarter = torch.zeros(width, width)  # turns every pair of features by 90°
        even = torch.arange(0, width, 2)
        quarter[even, even + 1], quarter[even + 1, even] = 1.0, -1.0
        text = independent(symbols, 40, 256)
        return [
            Control(
                "three layers that each turn all by 90°",
                True,
                lambda: (stack(quarter), text),
                {
                    "cka": Expected(1.0, 1e-4),
                    "adjacent_cka": Expected(1.0, 1e-4),
                    "cosine": Expected(0.0, 1e-4),
                    "adjacent_cosine": Expected(0.0, 1e-4),
                },
                "CKA is invariant to rotations; x and its quarter turn are orthogonal",
            ),
            Control(
                "three layers that do nothing",
                False,
                lambda: (stack(torch.eye(width)), text),
                {
                    "cka": Expected(1.0, 1e-6),
                    "cosine": Expected(1.0, 1e-5),
                    "adjacent_cosine": Expected(1.0, 1e-5),
                    "lens_kl": Expected(0.0, 1e-5),
                },
                "the same states at every depth",
            ),
            Control(
                "a layer that draws all anew",
                True,
                lambda: (
                    Shown(
                        symbols,
                        "anew",
                        hidden=lambda ids: [10 + table[ids], 10 + table.flip(0)[ids.flip(0)]],
                        head=head,
                    ),
                    text,
                ),
                {"cka": Expected(0.0, 0.05), "cosine": Expected(0.0, 0.05)},
                "debiased CKA of independent states is 0 on average, unlike plain CKA; what all share is no likeness",
            ),
        ]


def _standardised(states: Tensor) -> Tensor:
    """States (N, D) with every feature of mean 0 and variance 1; one that does not vary is 0."""
    spread = states.std(0, correction=0)
    return (states - states.mean(0)) * torch.where(spread > 1e-6, 1 / spread.clamp(min=1e-6), 0.0)


def _cka(states: list[Tensor], pairs: list[tuple[int, int]], order: Tensor, seed: int) -> list[np.ndarray | None]:
    """Debiased linear CKA of pairs of layers, states (N, D) each, from batches of tokens in the given order: as it is,
    then with batches redrawn. None where a layer does not vary."""
    batches = [batch for batch in torch.split(order, AT_ONCE) if len(batch) >= min(AT_ONCE, len(order)) // 2]
    each = []
    for batch in batches:
        kernels = [_kernel(state[batch]) for state in states]
        each.append([_hsic(kernel, kernel) for kernel in kernels] + [_hsic(kernels[a], kernels[b]) for a, b in pairs])
    sums = redrawn(np.array(each), np.arange(len(each)), seed)
    alone, across = sums[:, : len(states)], sums[:, len(states) :]
    return [
        values / np.sqrt(alone[:, a] * alone[:, b]) if (alone[:, [a, b]] > 0).all() else None
        for (a, b), values in zip(pairs, across.T, strict=True)
    ]


def _kernel(states: Tensor) -> Tensor:
    """(N, D) → (N, N) float64, linear, without its diagonal. Centred and scaled first, which HSIC does not see."""
    states = states.double()
    states = states - states.mean(0)
    states = states / states.norm().clamp(min=1e-12)
    return (states @ states.T).fill_diagonal_(0.0)


def _hsic(x: Tensor, y: Tensor) -> float:
    """The unbiased HSIC of Song et al. 2012 from kernels (N, N) without diagonals."""
    count = len(x)
    both = (x * y).sum() + x.sum() * y.sum() / ((count - 1) * (count - 2)) - 2 * (x.sum(0) @ y.sum(0)) / (count - 2)
    return float(both / (count * (count - 3)))
