"""The selector: per token and per head, the few levels that count; the rest weigh exactly zero.

A choice is made by evidence: the scores, plus noise and a bias that balances the load, plus a bonus for the levels held
since the token before. Only the scores shape the weights and the gradients.

Dimension letters: B batch, T time, H heads, K levels.
"""

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from dyadlm.ops.pyramid import Clock, accumulator

KINDS = ("dense", "topk", "entmax", "gumbel")
SPAN = 32  # tokens whose choices are settled together, off the CPU


def select(
    scores: Tensor,
    kind: str,
    clock: Clock,
    *,
    count: int = 2,
    bias: Tensor | None = None,
    margin: float = 0.0,
    temperature: Tensor | float = 1.0,
    noisy: bool = False,
    held: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """How much each level weighs, per token and head, by one of four kinds:

    - dense: the softmax of the scores. The control: every level counts.
    - topk: the softmax over the `count` levels of most evidence; backward as dense, so the others learn too.
    - entmax: the exact 1.5-entmax of the scores, sparse by itself.
    - gumbel: the one level of most evidence; backward through the softmax at `temperature`.

    topk and gumbel choose. Ties go to the lower level, and a level chosen at one token has `margin` more evidence at
    the next one of the document: a choice holds until the evidence for a change passes the margin.

    Args:
        scores: (B, T, H, K), any floating dtype; -inf for a level that is absent, not all of them.
        count: levels that topk chooses, 1 to K.
        bias: (H, K), added to the evidence alone (Wang et al. 2024, arXiv 2408.15664). Kinds that choose only.
        margin: in units of the scores, at least 0. Kinds that choose only. Above 0, see `choose` for the cost.
        temperature: of gumbel's gradient, above 0; a number or a tensor of no dimensions.
        noisy: gumbel alone: choose by scores + Gumbel noise, that is, sample from the softmax of the scores.
        held: (B, H, K) bool, as returned for the chunk before; None: nothing is held.

    Returns:
        Weights (B, T, H, K) in the dtype of the scores (computed in float32 at least), and the choice (B, H, K) bool
        that holds after the chunk: None for the kinds that do not choose.
    """
    assert kind in KINDS
    assert 1 <= count <= scores.shape[-1]
    assert margin >= 0.0
    logits = accumulator(scores)
    if kind in ("dense", "entmax"):
        assert margin == 0.0
        assert bias is None
        weights = entmax(logits) if kind == "entmax" else softmax(logits)
        return weights.to(scores.dtype), None
    if kind == "gumbel" and noisy:
        logits = logits + gumbel_noise(logits)
    with torch.no_grad():
        evidence = logits if bias is None else logits + bias
        chosen = choose(evidence, count if kind == "topk" else 1, clock, margin, held)
        masked = logits.masked_fill(~chosen, -math.inf)
        hard = softmax(masked) if kind == "topk" else chosen.to(logits.dtype)
    soft = softmax(logits if kind == "topk" else logits / temperature)
    return _StraightThrough.apply(hard, soft).to(scores.dtype), last_choice(chosen, clock, held)


def softmax(scores: Tensor) -> Tensor:
    """The softmax over the last dimension: (..., H, K) -> (..., H, K), laid out with K before H.

    Over a last dimension of few entries torch is six times slower on a CPU.
    """
    return scores.transpose(-1, -2).contiguous().softmax(-2).transpose(-1, -2)


# ---- Choosing


def choose(
    evidence: Tensor,
    count: int,
    clock: Clock,
    margin: float = 0.0,
    held: Tensor | None = None,
    span: int | None = None,
) -> Tensor:
    """The `count` levels of most evidence at every token, where a level chosen at the token before has `margin` more.

    Each choice depends on the one before it. Sweeps over a span of tokens repeat until they change nothing: a sweep is
    right for every token whose predecessor was, so it settles at least one more, and mostly all but a few at once.
    That pays where a step costs as much for many tokens as for one: on a GPU, not on a CPU.

    Args:
        evidence: (B, T, H, K).
        held: (B, H, K) bool, the choice before the chunk.
        span: tokens settled together, 1 for a plain loop; None: 1 on a CPU, else `SPAN`. Changes no result.

    Returns:
        (B, T, H, K) bool, exactly what choosing one token after the other gives.
    """
    if margin == 0.0:
        return best(evidence, count)
    if span is None:
        span = 1 if evidence.device.type == "cpu" else SPAN
    continues = (clock.index > 0)[..., None, None]
    last = torch.zeros_like(evidence[:, 0], dtype=torch.bool) if held is None else held
    choices = []
    for plain, raised, inside in zip(
        evidence.split(span, 1), (evidence + margin).split(span, 1), continues.split(span, 1), strict=True
    ):
        before = last[:, None] & inside  # a first guess, right while the choice holds
        choice = best(torch.where(before, raised, plain), count)
        for _ in range(1, choice.shape[1]):
            settled = torch.cat([last[:, None], choice[:, :-1]], 1) & inside
            if torch.equal(settled, before):
                break
            before = settled
            choice = best(torch.where(before, raised, plain), count)
        choices.append(choice)
        last = choice[:, -1]
    return torch.cat(choices, 1)


def best(evidence: Tensor, count: int) -> Tensor:
    """The `count` largest of the last dimension, the lower index first among equals: (..., K) -> (..., K) bool."""
    ranked = evidence.sort(dim=-1, descending=True, stable=True).indices
    return torch.zeros_like(evidence, dtype=torch.bool).scatter(-1, ranked[..., :count], True)


def last_choice(chosen: Tensor, clock: Clock, held: Tensor | None) -> Tensor:
    """(B, H, K) bool: the choice at each row's last real token; a row without one keeps what it held."""
    if not clock.padded:
        return chosen[:, -1]
    before = torch.zeros_like(chosen[:, 0]) if held is None else held
    return torch.cat([before[:, None], chosen], 1)[torch.arange(len(chosen), device=chosen.device), clock.length]


def gumbel_noise(like: Tensor) -> Tensor:
    """Independent samples of the standard Gumbel distribution, in the shape of `like`."""
    return -torch.empty_like(like).exponential_().log()


class _StraightThrough(torch.autograd.Function):
    """Forward the hard weights, backward as if they were the soft ones."""

    @staticmethod
    def forward(ctx: Any, hard: Tensor, soft: Tensor) -> Tensor:
        return hard

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, Tensor]:
        return None, gradient


def straight_through(chance: Tensor) -> Tensor:
    """One, with the gradient of `chance`: of a choice that was made, how sure it was."""
    return 1.0 + chance - chance.detach()


# ---- 1.5-entmax


def entmax(scores: Tensor) -> Tensor:
    """The exact 1.5-entmax over the last dimension (Peters, Niculae & Martins 2019, arXiv 1905.05702).

    weights = max(scores / 2 - threshold, 0)^2 with the one threshold that makes them sum to 1. A level that lies 2 or
    more below the best weighs exactly zero, and often one that lies closer.

    Args:
        scores: (..., K), float32 or float64; -inf for a level that is absent, not all of them.

    Returns:
        (..., K) in the dtype of the scores.
    """
    return _Entmax.apply(scores)


class _Entmax(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, scores: Tensor) -> Tensor:
        # The best is at 0 and the threshold in [-1, 0): what lies below -1 weighs zero wherever it lies.
        halves = ((scores - scores.amax(-1, keepdim=True)) / 2).clamp(min=-1.0)
        ranked = halves.sort(dim=-1, descending=True).values
        size = torch.arange(1, scores.shape[-1] + 1, device=scores.device, dtype=scores.dtype)
        # The threshold if the support were the `size` best: it is, if all of them lie above and the next does not.
        mean = ranked.cumsum(-1) / size
        variance = (ranked * ranked).cumsum(-1) / size - mean * mean
        thresholds = (mean - (1.0 / size - variance).clamp(min=0.0).sqrt()).clamp(min=-1.0)
        support = (thresholds < ranked).sum(-1, keepdim=True)
        roots = (halves - thresholds.gather(-1, support - 1)).clamp(min=0.0)
        ctx.save_for_backward(roots)
        return roots * roots

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (roots,) = ctx.saved_tensors
        along = gradient * roots
        return along - roots * (along.sum(-1, keepdim=True) / roots.sum(-1, keepdim=True))


# ---- Load


def real_tokens(clock: Clock) -> Tensor:
    """(B, T) bool: the columns that hold a token."""
    return torch.arange(clock.index.shape[1], device=clock.index.device) < clock.length[:, None]


def load(weights: Tensor, clock: Clock) -> Tensor:
    """The share of the real tokens on which each level is chosen: (B, T, H, K) -> (H, K) float32."""
    real = real_tokens(clock)
    counted = ((weights > 0) & real[..., None, None]).sum((0, 1))
    return counted.float() / real.sum().clamp(min=1)


def balanced(bias: Tensor, load: Tensor, rate: float) -> Tensor:
    """The bias after one step towards an even load (Wang et al. 2024, arXiv 2408.15664): (H, K) -> (H, K).

    By `rate`, levels chosen less than the mean rise and those chosen more fall. No loss is involved.
    """
    short = load.mean(-1, keepdim=True) - load
    # The mean of equal loads is equal to them but for rounding, and rounding corrects nothing.
    return bias + rate * torch.where(short.abs() > 1e-5, short.sign(), 0.0).to(bias.dtype)


# ---- Measures of routes


def entropy(weights: Tensor) -> Tensor:
    """The entropy of the weights over log K: 0 for one level alone, 1 for all alike. (..., K) -> (...) float32."""
    highest = math.log(max(weights.shape[-1], 2))  # of one level, the entropy is 0 whatever it is divided by
    return (torch.special.entr(accumulator(weights)).sum(-1) / highest).clamp(0.0, 1.0)


def chosen_count(weights: Tensor) -> Tensor:
    """How many levels weigh more than zero: (..., K) -> (...) int64."""
    return (weights > 0).sum(-1)


def mean_run_length(weights: Tensor, clock: Clock) -> float:
    """The mean length, in tokens, of the runs over which a head's set of chosen levels stays unchanged.

    A run ends with its document, with its chunk and before padding. All runs of all heads count alike; 0 without any.
    """
    chosen, real = weights > 0, real_tokens(clock)[..., None]
    begins = (clock.index == 0)[..., None].repeat(1, 1, weights.shape[2])  # (B, T, H)
    begins[:, 0] = True
    begins[:, 1:] |= (chosen[:, 1:] != chosen[:, :-1]).any(-1)
    tokens = real.sum() * weights.shape[2]
    return (tokens / (begins & real).sum().clamp(min=1)).item()


def by_head(x: Tensor, weights: Tensor) -> Tensor:
    """x (..., D), the channels h, h + H, h + 2 H … of each head h times its weight (..., H)."""
    return (x.unflatten(-1, (-1, weights.shape[-1])) * weights[..., None, :]).flatten(-2)
