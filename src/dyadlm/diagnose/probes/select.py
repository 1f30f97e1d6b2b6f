"""Does the model commit or blend? Its routes where it has some, and how sharply it turns between two inputs.

Dimension letters: B windows, T tokens, L layers, H heads, K levels or experts, P steps of a path, V vocabulary.
"""

from typing import ClassVar

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import one_hot

from dyadlm.diagnose.contract import Subject
from dyadlm.diagnose.material import Material
from dyadlm.diagnose.oracles import Shown, independent, material_of
from dyadlm.diagnose.probe import Budget, Control, Expected, NotApplicable, Probe, TooLittle
from dyadlm.diagnose.result import Curve, ProbeResult, Reading
from dyadlm.diagnose.statistics import mean_interval, percentiles, redrawn
from dyadlm.ops.selection import entropy

LENGTH, LEAST = 256, 16
PREFIX, STEPS = 32, 16

# What configurations of transformers call the number of experts.
EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts", "num_experts_per_tok")


class Select(Probe):
    """What routes say, token by token, and how outputs change on the way from one input to another.

    Definition: of routes, each head's weights over its K levels or experts: entropy = mean H / log K; its choice = what
        weighs most; same_next = P(the choice at t + 1 is that at t); mean_run = 1 / (1 − same_next), the length of a
        run, had windows no ends; same_by_load = Σ load², what same_next would be if choices were drawn
        independently with the same loads; load_cv2 = the squared coefficient of variation of the loads, over levels;
        unused = the share of levels that a head never chooses. Means over heads and layers.
        Of every model whose embeddings can be moved: sharpness = the mean over pairs of the largest slope of d(α) =
        |f(α) − f(0)| / |f(1) − f(0)|, f the centred logits after a text whose last embedding lies α of the way between
        those of two tokens, in 16 steps: 1 if f is linear, 16 if it jumps.
    Units: shares; tokens; none. Direction: entropy and load_cv2 lower, same_next and sharpness higher: sharp,
        persistent and balanced. One dead expert is persistent too: same_by_load and unused are read beside it.
    Paper: Shazeer et al. 2017 (arXiv 1701.06538) for load; Janiak et al. 2024 (arXiv 2409.17113) for sharpness.
    Evidence: that continuous maps cannot choose is challenged: trained transformers have regions in which outputs
        hardly move, with sharp borders between them (arXiv 2409.17113).
    Pitfalls: a sharp router may choose what does not matter. Softmax blurs: routes that do not sum to one choice have a
        choice of little meaning where entropy is high. Sharpness depends on the number of steps, and on how far apart
        the two ends are; models whose parts read tokens themselves move by their embeddings alone.
    """

    id: ClassVar[str] = "select"
    failure_mode: ClassVar[str] = "F7"
    question: ClassVar[str] = "Does it commit or blend?"
    meaning: ClassVar[str] = (
        "How abruptly the output changes on the way from one input to another; 1 means evenly (it blends), "
        "16 in one jump (it chooses)."
    )
    tokens: ClassVar[int] = 60 * 1024

    def run(self, subject: Subject, material: Material, budget: Budget) -> ProbeResult:
        length = min(LENGTH, subject.context or LENGTH)
        if length < LEAST:
            raise TooLittle(f"a context of {length} tokens is too short to see choices last")
        half = int(budget.tokens * self.tokens) // 2
        readings, curves, sentence = self._routes(subject, material, max(8, half // length), length, budget)
        sharpness, path = self._sharpness(subject, material, max(8, half // (PREFIX * (STEPS + 1))), budget)
        left_out = [f"all but {2 * half:,} of {self.tokens:,} tokens"] if 2 * half < self.tokens else []
        if not readings and _has_experts(subject):
            left_out.append("routes, for this model has experts but does not show how it chooses among them")
        if sharpness is not None:
            readings["sharpness"] = sharpness
            curves["way between two tokens"] = path
            turns = f"Between two inputs its output changes {sharpness.value:.1f} times as fast, at most, as a line."
            sentence = sentence or turns
        else:
            left_out.append("sharpness, for this model does not let its embeddings be moved")
        if not readings:
            raise NotApplicable("this model has no routes and does not let its embeddings be moved")
        settings = {"length": length, "prefix": PREFIX, "steps": STEPS, "half_of_tokens": half}
        return ProbeResult(self.id, readings, curves, sentence, settings, left_out="; ".join(left_out))

    @staticmethod
    def _routes(
        subject: Subject, material: Material, count: int, length: int, budget: Budget
    ) -> tuple[dict[str, Reading], dict[str, Curve], str]:
        """The readings of routes, none of a model without."""
        ids, documents = material.windows(count, length, budget.seed)
        rows = budget.rows(length)
        entropies: list[Tensor] = []
        same: list[Tensor] = []
        loads: list[Tensor] = []
        for start in range(0, len(ids), rows):
            routes = subject.routes(ids[start : start + rows])
            if routes is None:
                return {}, {}, ""
            levels = max(route.shape[-1] for route in routes)
            routes = [route for route in routes if route.shape[-1] == levels and levels > 1]
            if not routes:
                return {}, {}, ""
            weights = torch.cat(routes, 2)  # (B, T, L H, K): layers count as heads
            choice = weights.argmax(-1)
            entropies.append(entropy(weights).mean(1))  # (B, L H)
            same.append((choice[:, 1:] == choice[:, :-1]).double().mean(1))
            loads.append(one_hot(choice, levels).double().mean(1))
            budget.progress(min(start + rows, len(ids)), 2 * len(ids))
        blends, stays, each = torch.cat(entropies), torch.cat(same), torch.cat(loads)
        load = redrawn(each.numpy(), documents, budget.seed)  # (1 + draws, L H, K)
        load = load / load.sum(-1, keepdims=True)
        agree = (load**2).sum(-1).mean(1)
        uneven, unused = levels * agree - 1, (load == 0).mean((1, 2))
        by_text = [values.mean(1).double().numpy() for values in (blends, stays)]
        mean = [float(values.mean()) for values in by_text]
        changes = 1 - mean[1]
        readings = {
            "entropy": Reading(mean[0], "share of log K", "lower", mean_interval(by_text[0], documents)),
            "same_next": Reading(
                mean[1], "share", "higher", mean_interval(by_text[1], documents), "read beside same_by_load"
            ),
            "same_by_load": Reading(
                float(agree[0]), "share", "profile", percentiles(agree), "same_next of independent choices"
            ),
            "load_cv2": Reading(float(uneven[0]), "none", "lower", percentiles(uneven), "0 if all are chosen alike"),
            "unused": Reading(float(unused[0]), "share of levels", "lower", percentiles(unused)),
        }
        if changes > 0:
            interval = mean_interval(1 - by_text[1], documents)
            ends = None if interval is None or interval[0] <= 0 else (1 / interval[1], 1 / interval[0])
            readings["mean_run"] = Reading(1 / changes, "tokens", "higher", ends)
        else:
            readings["mean_run"] = Reading(float(length), "tokens", "higher", note="at least: no choice ever changes")
        names = subject.levels if len(subject.levels) == levels else [str(level) for level in range(levels)]
        label = "level: " + ", ".join(f"{number} = {name}" for number, name in enumerate(names))
        curves = {
            "load": Curve(
                [float(level) for level in range(levels)],
                load[0].mean(0).tolist(),
                label if len(label) < 200 else "level",
                "share of choices",
            )
        }
        sentence = (
            f"Routes have {100 * mean[0]:.0f} % of the entropy of an even blend, and the choice at a token is that "
            f"before it {100 * mean[1]:.0f} % of the time ({100 * readings['same_by_load'].value:.0f} % if it were "
            "drawn by load)."
        )
        return readings, curves, sentence

    @staticmethod
    def _sharpness(subject: Subject, material: Material, count: int, budget: Budget) -> tuple[Reading | None, Curve]:
        """How fast the output turns between two last tokens, and the mean way there."""
        nothing = Curve([], [], "", "")
        length = min(PREFIX, subject.context or PREFIX)
        ids, documents = material.windows(count, length, budget.seed)
        other = ids.clone()
        other[:, -1] = ids[:, -1].roll(1)
        differs = (other[:, -1] != ids[:, -1]).nonzero().flatten()
        share = torch.linspace(0, 1, STEPS + 1)
        ways, kept = [], []
        for done, row in enumerate(differs.tolist()):
            pair = [text[row : row + 1].expand(len(share), -1) for text in (ids, other)]
            logits = subject.blend(pair[0], pair[1], share)
            if logits is None:
                return None, nothing
            logits = logits.double()
            logits = logits[:, logits.isfinite().all(0)]
            moved = (logits - logits.mean(1, keepdim=True) - (logits[0] - logits[0].mean())).norm(dim=1)
            if moved[-1] > 1e-6:
                ways.append(moved / moved[-1])
                kept.append(row)
            budget.progress(len(differs) + done + 1, 2 * len(differs))
        if not ways:
            return None, nothing
        way = torch.stack(ways)
        slopes = (way.diff(dim=1).amax(1) * STEPS).numpy()
        reading = Reading(
            float(slopes.mean()), "of a line's slope", "higher", mean_interval(slopes, documents[kept]), "1 if linear"
        )
        return reading, Curve(share.tolist(), way.mean(0).tolist(), "α", "way moved, of all")

    def controls(self) -> list[Control]:
        experts, stay = 8, 0.9

        def router(ids: Tensor) -> list[Tensor]:
            return [one_hot(ids, experts).float()[:, :, None]]

        def even(ids: Tensor) -> list[Tensor]:
            return [torch.full((*ids.shape, 2, experts), 1 / experts)]

        random = torch.Generator().manual_seed(0)
        table = torch.randn(experts, 16, generator=random)

        def line(ids: Tensor, other: Tensor, share: Tensor) -> Tensor:
            return torch.lerp(table[ids[:, -1]], table[other[:, -1]], share[:, None])

        def jump(ids: Tensor, other: Tensor, share: Tensor) -> Tensor:
            return line(ids, other, (share > 0.4).float())

        return [
            Control(
                "a router that stays with probability 0.9, and an output that jumps",
                True,
                lambda: (Shown(experts, "sticky", routes=router, blend=jump), _sticky(experts, stay)),
                {
                    "entropy": Expected(0.0, 1e-6),
                    "same_next": Expected(stay, 0.01),
                    "mean_run": Expected(1 / (1 - stay), 0.8),
                    "sharpness": Expected(STEPS, 1e-6),
                },
                "P = s, and runs are geometric: 1/(1 − s)",
            ),
            Control(
                "a router that draws anew, and a linear output",
                False,
                lambda: (Shown(experts, "draws", routes=router, blend=line), independent(experts, 32, 1024)),
                {
                    "same_next": Expected(1 / experts, 0.01),
                    "same_by_load": Expected(1 / experts, 0.001),
                    "mean_run": Expected(experts / (experts - 1), 0.02),
                    "load_cv2": Expected(0.0, 0.005),
                    "unused": Expected(0.0, 0.0),
                    "sharpness": Expected(1.0, 1e-5),
                },
                "uniform choices agree with 1/E; of a linear map, d(α) = α",
            ),
            Control(
                "a router that weighs all alike",
                False,
                lambda: (Shown(experts, "even", routes=even), independent(experts, 32, 1024)),
                {"entropy": Expected(1.0, 1e-6), "unused": Expected((experts - 1) / experts, 1e-9)},
                "H = log K; and what weighs most is always the first",
            ),
        ]


def _sticky(experts: int, stay: float, seed: int = 0) -> Material:
    """Documents in which a token is that before it with probability `stay`, and else one of the others."""
    random = np.random.default_rng(seed)
    moves = random.integers(1, experts, size=(32, 1024)) * (random.random((32, 1024)) > stay)
    return material_of(list(moves.cumsum(1) % experts), "sticky tokens")


def _has_experts(subject: Subject) -> bool:
    """Whether its configuration says so."""
    config = getattr(subject.module, "config", None)
    return any(isinstance(count := getattr(config, name, None), int) and count > 1 for name in EXPERTS)
