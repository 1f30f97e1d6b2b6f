"""Is mixing uniform? The entropy of attention, and how much of its sharpness is a sink.

Dimension letters: B windows, T tokens, L layers, H heads.
"""

from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from dyadlm.diagnose.contract import Subject
from dyadlm.diagnose.material import Material
from dyadlm.diagnose.oracles import Shown, independent
from dyadlm.diagnose.probe import Budget, Control, Expected, NotApplicable, Probe, TooLittle
from dyadlm.diagnose.result import Better, Curve, ProbeResult, Reading
from dyadlm.diagnose.statistics import mean_interval

LENGTH, LEAST = 256, 32
SINK = 0.3  # a head is a sink if the first token has more than this of its attention on average
NUMBERS_AT_ONCE = 2**25  # attention weights held at once: 128 MiB
FIRST = 8  # from this token on: among fewer, entropy says little


class Diffuse(Probe):
    """How evenly attention is spread over the tokens so far.

    Definition: H(t) = the entropy of a head's attention at the t-th token (t counted from 1), from the 8th on; entropy
        = mean of H / log t; effective = mean of e^H over the last quarter of the window; slope = the least-squares
        slope of the mean H in log t; sink_rate = the share of heads whose attention to the first token is above 0.3 on
        average over a window; first_token = that attention itself; entropy_without_first = mean of H' / log(t − 1) of
        attention renormalised without the first token. Means over layers, heads and texts.
    Units: shares; tokens; nats per e-fold. Direction: lower, and not through sinks: a sink lowers the entropy without
        choosing anything, so sink_rate and entropy_without_first are read beside it.
    Paper: Gu et al. 2024 (arXiv 2410.10781) for sinks; Zhai et al. 2023 (arXiv 2303.06296) for attention entropy.
    Pitfalls: attention is not importance. A low entropy may be a fixed position (the previous token). Models without
        attention are not applicable; they are not sharp for it.
    """

    id: ClassVar[str] = "diffuse"
    failure_mode: ClassVar[str] = "F4"
    question: ClassVar[str] = "Is mixing uniform?"
    meaning: ClassVar[str] = (
        "How evenly attention is spread over the past, from 0 (one token) to 1 (all tokens alike); a low "
        "value may come from resting on the first token."
    )
    tokens: ClassVar[int] = 32 * 1024

    def run(self, subject: Subject, material: Material, budget: Budget) -> ProbeResult:
        length = min(LENGTH, subject.context or LENGTH)
        if length < LEAST:
            raise TooLittle(f"a context of {length} tokens is too short to see attention spread")
        count, fewer = self.texts(budget, length)
        ids, documents = material.windows(count, length, budget.seed)
        rows, start, parts = 1, 0, []
        while start < len(ids):  # the first text tells how much attention there is
            some = _attention(subject, ids[start : start + rows])
            parts.append([_measure(layer) for layer in some])
            start += rows
            numbers = sum(layer[0].numel() for layer in some)
            rows = max(1, min(budget.rows(length), NUMBERS_AT_ONCE // numbers))
            budget.progress(min(start, len(ids)), len(ids))
        layers = [_Measured(*map(torch.cat, zip(*layer, strict=True))) for layer in zip(*parts, strict=True)]
        seen = torch.arange(FIRST, length + 1).double()
        everything = _Measured(*(torch.stack(part).nanmean(0) for part in zip(*layers, strict=True)))
        by_token = everything.entropy.mean(0)
        logs = (seen.log() - seen.log().mean()).numpy()
        slope = everything.entropy.numpy() @ logs / (logs @ logs)  # of each text; their mean is that of the mean

        def reading(values: Tensor, unit: str, better: Better, note: str = "") -> Reading:
            known = ~values.isnan().numpy()
            figures = values.numpy()[known]
            return Reading(float(figures.mean()), unit, better, mean_interval(figures, documents[known]), note)

        entropy = everything.entropy / seen.log()
        readings = {
            "entropy": reading(entropy.mean(1), "share of log t", "lower", "read beside sink_rate"),
            "sink_rate": reading(100 * everything.sinks, "% of heads", "lower", "what may make entropy low"),
            "first_token": reading(everything.first, "share of attention", "lower"),
            "effective": reading(everything.effective, "tokens", "lower", "in the last quarter of the window"),
            "slope": Reading(
                float(slope.mean()),
                "nats per e-fold",
                "lower",
                mean_interval(slope, documents),
                "1 if spread over all, 0 if over a fixed number",
            ),
        }
        if not everything.others.isnan().all():
            readings["entropy_without_first"] = reading(everything.others, "share of log (t − 1)", "lower")
        names = ("entropy, of log t", "heads that are sinks, %")
        by_layer = (
            [float((layer.entropy / seen.log()).mean()) for layer in layers],
            [float(100 * layer.sinks.mean()) for layer in layers],
        )
        depths = [float(depth + 1) for depth in range(len(layers))]
        curves = {
            f"{name.split(',')[0]} by layer": Curve(depths, values, "layer", name)
            for name, values in zip(names, by_layer, strict=True)
        }
        curves["entropy by token"] = Curve(
            [float(t) for t in seen], [float(h) for h in by_token], "token", "nats", log_x=True
        )
        sentence = (
            f"Attention has {100 * readings['entropy'].value:.0f} % of the entropy of an even spread, and "
            f"{readings['sink_rate'].value:.0f} % of the heads rest on the first token."
        )
        settings = {"length": length, "texts": len(ids), "sink": SINK, "layers": len(layers)}
        return ProbeResult(self.id, readings, curves, sentence, settings, left_out=fewer)

    def controls(self) -> list[Control]:
        def even(ids: Tensor) -> list[Tensor]:
            weights = torch.tril(torch.ones(ids.shape[1], ids.shape[1]))
            return [(weights / weights.sum(-1, keepdim=True)).expand(len(ids), 2, -1, -1)]

        def previous(ids: Tensor) -> list[Tensor]:
            where = (torch.arange(ids.shape[1]) - 1).clamp(min=0)
            return [torch.eye(ids.shape[1])[where].expand(len(ids), 2, -1, -1)]

        def first(ids: Tensor) -> list[Tensor]:
            return [torch.eye(ids.shape[1])[[0] * ids.shape[1]].expand(len(ids), 2, -1, -1)]

        last = range(LENGTH - LENGTH // 4 + 1, LENGTH + 1)
        return [
            Control(
                "attention spread evenly",
                True,
                lambda: (Shown(8, "even", attention=even), independent(8, 8, LENGTH)),
                {
                    "entropy": Expected(1.0, 1e-5),
                    "slope": Expected(1.0, 1e-5),
                    "sink_rate": Expected(0.0, 0.0),
                    "entropy_without_first": Expected(1.0, 1e-5),
                    "effective": Expected(sum(last) / len(last), 0.01),
                },
                "H = log t",
            ),
            Control(
                "attention to the previous token alone",
                False,
                lambda: (Shown(8, "previous", attention=previous), independent(8, 8, LENGTH)),
                {
                    "entropy": Expected(0.0, 1e-6),
                    "slope": Expected(0.0, 1e-6),
                    "sink_rate": Expected(0.0, 0.0),
                    "effective": Expected(1.0, 1e-6),
                },
                "H = 0",
            ),
            Control(
                "attention to the first token alone",
                False,
                lambda: (Shown(8, "sink", attention=first), independent(8, 8, LENGTH)),
                {"entropy": Expected(0.0, 1e-6), "sink_rate": Expected(100.0, 0.0)},
                "a sink has no entropy either: the companion figure tells the two apart",
            ),
        ]


class _Measured(NamedTuple):
    entropy: Tensor  # (B, T - FIRST + 1) nats, mean over heads, from the FIRST-th token on
    effective: Tensor  # (B,) tokens
    first: Tensor  # (B,) attention to the first token
    sinks: Tensor  # (B,) share of heads
    others: Tensor  # (B,) entropy without the first token, of its highest; NaN if nothing else is attended to


def _attention(subject: Subject, ids: Tensor) -> list[Tensor]:
    """The layers that attend, (B, H, T, T) each. Raises `NotApplicable` if none does, or none shows how."""
    found = [layer for layer in subject.attention(ids) or () if layer.shape[-2:] == (ids.shape[1], ids.shape[1])]
    if not found:
        raise NotApplicable("this model has no attention, or does not show it")
    if any(bool((layer.sum(-1) - 1).abs().max() > 0.02) for layer in found):
        raise NotApplicable("what this model shows as attention does not sum to 1")
    return found


def _measure(weights: Tensor) -> _Measured:
    """Of one layer, (B, H, T, T) float32."""
    length = weights.shape[-1]
    late = weights[:, :, FIRST - 1 :]
    entropy = torch.special.entr(late).sum(-1).double()  # (B, H, T - FIRST + 1)
    first = late[..., 0].double()
    rest = 1 - first
    # Of p_i / rest the entropy is (Σ −p_i log p_i) / rest + log rest, without the first.
    kept = (entropy - torch.special.entr(first)) / rest.clamp(min=1e-6) + rest.clamp(min=1e-6).log()
    highest = torch.arange(FIRST - 1, length).double().log()
    shares = torch.where(rest > 1e-3, (kept / highest).clamp(min=0), torch.nan)
    return _Measured(
        entropy.mean(1),
        entropy[..., -(length // 4) :].exp().mean((1, 2)),
        first.mean((1, 2)),
        (first.mean(2) > SINK).double().mean(1),
        shares.nanmean((1, 2)),
    )
