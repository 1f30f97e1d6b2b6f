"""Do layers own time scales? How far, and for how long, a token that is swapped is felt.

Dimension letters: B windows, T tokens, L layers, D width, G lags, S partitions.
"""

import math
from collections.abc import Callable
from typing import ClassVar, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import one_hot

from dyadlm.diagnose.contract import Subject
from dyadlm.diagnose.material import Material
from dyadlm.diagnose.oracles import Shown, independent
from dyadlm.diagnose.probe import Budget, Control, Expected, Probe, TooLittle
from dyadlm.diagnose.result import Curve, ProbeResult, Reading
from dyadlm.diagnose.states import hidden_states
from dyadlm.diagnose.statistics import percentiles, redrawn
from dyadlm.model.boundaries import Boundaries
from dyadlm.model.configuration import BYTE_VOCABULARY
from dyadlm.ops.pyramid import make_clock

LENGTH, LEAST = 256, 32
FLOOR = 1e-4  # of the response at the token itself: below, float32 rounds
LAGS = 8  # that a time scale is fitted to, at least
YOKED = 32  # lags that are compared across and within a boundary


class Window(Probe):
    """One token of a text is replaced by another of the text: how the hidden states after it change.

    Definition: r(lag) = the mean over texts of |h' − h| at the token `lag` after the swap, for each layer. log r is
        fitted by least squares, from lag 1 to where r is below 1e-4 of that at lag 0, by a line in lag: r ∝
        exp(−lag/τ). A layer has a time scale if that fits better than a power of the lag and than a power of the
        position, and τ is no longer than the lags measured; layers_with_scale = the share that do; spread = log2 of the
        longest over the shortest τ among them. yoking_NAME = (across − within) / within, where these are the mean of r
        at lags from 1 to 32 with and without a segment's beginning between the two tokens, at equal lag, weighed by how
        many pairs of both kinds there are, over swaps that leave the boundaries where they were: of words and sentences
        of the text, or of the model's own partitions if it has no tokenizer. Mean over layers.
    Units: tokens; octaves; shares. Direction: spread and share higher; yoking: a profile, −1 where nothing crosses a
        boundary, 0 where boundaries play no part.
    Paper: Skrill and Norman-Haignere 2023 (NeurIPS): early layers exponential and yoked to position, late layers a
        power law and yoked to structure; an untrained transformer integrates uniformly.
    Pitfalls: a residual stream holds fast and slow parts at once; one τ is what dominates it over the lags measured.
        Norms change with position. The last layer of many models is normalised, and its r with it. A swap is most
        often ungrammatical.
    """

    id: ClassVar[str] = "window"
    failure_mode: ClassVar[str] = "F2, F3"
    question: ClassVar[str] = "Do layers own time scales?"
    meaning: ClassVar[str] = (
        "The share of layers that forget a token exponentially, each at a rate of its own; 0 means that no "
        "layer has a time scale."
    )
    tokens: ClassVar[int] = 64 * 1024

    def run(self, subject: Subject, material: Material, budget: Budget) -> ProbeResult:
        length = min(LENGTH, subject.context or LENGTH)
        if length < LEAST:
            raise TooLittle(f"a context of {length} tokens is too short to see how a swap is forgotten")
        count, fewer = self.texts(budget, 2 * length)
        ids, documents = material.windows(count, length, budget.seed)
        swapped, places = _swap(ids, length // 4, length // 8, budget.seed)
        lags = length - int(places.max())  # lag 0 included
        segments, source = _partitions(subject, ids)
        moved, _ = _partitions(subject, swapped)
        found: list[Tensor] = []
        rows = max(1, budget.rows(length) // 2)
        for start in range(0, len(ids), rows):
            some = slice(start, start + rows)
            found.append(_responses(subject, ids[some], swapped[some], places[some], lags))
            budget.progress(min(start + rows, len(ids)), len(ids))
        responses = torch.cat(found, 1).double().numpy()  # (L, B, G)
        layers = len(responses)
        at = float(places.double().mean())
        fits = [_fit(redrawn(response, documents, budget.seed), at) for response in responses]
        lasting = np.mean([fit.has_scale for fit in fits], 0)
        scales = {layer + 1: fit.scale for layer, fit in enumerate(fits) if fit.has_scale[0]}
        readings = {
            "layers_with_scale": Reading(
                float(lasting[0]),
                "share of layers",
                "higher",
                percentiles(lasting),
                "whose response falls exponentially",
            )
        }
        if len(scales) > 1:
            spread = np.log2(np.max(list(scales.values()), 0) / np.min(list(scales.values()), 0))
            readings["spread"] = Reading(float(spread[0]), "octaves", "higher", percentiles(spread))
        for layer, scale in scales.items():
            readings[f"tau_layer_{layer}"] = Reading(float(scale[0]), "tokens", "profile", percentiles(scale))
        for name, begins in segments.items():
            kept = (begins == moved[name]).all(1).numpy()
            yoked = _yoking(responses[:, kept], begins[kept], places[kept], documents[kept], budget.seed)
            if yoked is not None:
                share = f"of {kept.sum()} swaps that move no boundary of it"
                readings[f"yoking_{name}"] = Reading(float(yoked[0]), "share", "profile", percentiles(yoked), share)
        taus = [float(scale[0]) for scale in scales.values()]
        if taus:
            says = (
                f"{len(scales)} of {layers} layers forget exponentially, in {min(taus):.3g} to {max(taus):.3g} tokens."
            )
        else:
            says = f"None of {layers} layers forgets at a rate of its own: the past fades as a power, or not at all."
        left_out = [fewer] if fewer else []
        if not segments:
            left_out.append("yoking, for there is neither a tokenizer nor a partition")
        curves = {
            f"response of layer {layer}": _curve(responses[layer - 1].mean(0))
            for layer in sorted({1, (layers + 1) // 2, layers})
        }
        settings = {"length": length, "texts": len(ids), "lags": lags - 1, "partitions": source, "floor": FLOOR}
        return ProbeResult(self.id, readings, curves, says, settings, left_out="; ".join(left_out))

    def controls(self) -> list[Control]:
        keeps = (0.5, 0.9)
        taus = [-1 / math.log(keep) for keep in keeps]

        def resetting(ids: Tensor) -> list[Tensor]:
            return _stack(ids, lambda x: _leaky(x, 0.9, ids == 0))

        return [
            Control(
                "leaky integrators, λ = 0.5 and 0.9",
                True,
                lambda: (
                    Shown(
                        16, "leaky", hidden=lambda ids: _stack(ids, *[lambda x, k=keep: _leaky(x, k) for keep in keeps])
                    ),
                    independent(16, 16, 256),
                ),
                {
                    "layers_with_scale": Expected(1.0, 0.0),
                    "tau_layer_1": Expected(taus[0], 0.01),
                    "tau_layer_2": Expected(taus[1], 0.01),
                    "spread": Expected(math.log2(taus[1] / taus[0]), 0.01),
                },
                "a swap is felt λ^lag later: τ = −1/ln λ",
            ),
            Control(
                "a leaky integrator that is emptied where a segment begins",
                True,
                lambda: (
                    Shown(16, "resetting", hidden=resetting, bounds=lambda ids: {"own": ids == 0}),
                    independent(16, 64, 256),
                ),
                {"yoking_own": Expected(-1.0, 0.01)},
                "nothing crosses a boundary",
            ),
            Control(
                "the mean of all so far",
                False,
                lambda: (
                    Shown(16, "mean", hidden=lambda ids: _stack(ids, _mean), bounds=lambda ids: {"own": ids == 0}),
                    independent(16, 32, 256),
                ),
                {"layers_with_scale": Expected(0.0, 0.0), "yoking_own": Expected(0.0, 0.1)},
                "a swap at p is felt as 1/t at t, whatever lies between: no finite τ",
            ),
        ]


class _Fit(NamedTuple):
    scale: np.ndarray  # (R,) tokens
    has_scale: np.ndarray  # (R,) bool


def _swap(ids: Tensor, first: int, spread: int, seed: int) -> tuple[Tensor, Tensor]:
    """Windows (B, T) with one token each replaced, between `first` and `first + spread`, and where: (B,) int64.

    The new token is drawn from all of the windows, and is another one.
    """
    random = np.random.default_rng(seed)
    places = torch.from_numpy(random.integers(first, first + spread, size=len(ids)))
    rows = torch.arange(len(ids))
    pool, swapped = ids.flatten().numpy(), ids.clone()
    if (pool == pool[0]).all():
        raise TooLittle("the text has one token alone")
    for row, place in zip(rows.tolist(), places.tolist(), strict=True):
        old = int(ids[row, place])
        new = old
        while new == old:
            new = int(random.choice(pool))
        swapped[row, place] = new
    return swapped, places


def _responses(subject: Subject, ids: Tensor, swapped: Tensor, places: Tensor, lags: int) -> Tensor:
    """(L, B, G): the length of the change of each layer's state at each lag, 0 included."""
    before, after = hidden_states(subject, ids), hidden_states(subject, swapped)
    where = places[:, None] + torch.arange(lags)
    changes = [(a - b).norm(dim=-1).gather(1, where) for a, b in zip(after[1:], before[1:], strict=True)]
    return torch.stack(changes)


def _usable(response: np.ndarray) -> np.ndarray:
    """The lags from 1 on, until the response (G,) is lost in rounding."""
    below = np.flatnonzero(response[1:] < FLOOR * response[0])
    return np.arange(1, 1 + (below[0] if len(below) else len(response) - 1))


def _fit(responses: np.ndarray, place: float) -> _Fit:
    """The time scales of responses (R, G) to a swap at `place`, and which have one. The first says how far to look."""
    lags = _usable(responses[0])
    if len(lags) < LAGS:
        return _Fit(np.full(len(responses), np.nan), np.zeros(len(responses), dtype=bool))
    logs = np.log(np.maximum(responses[:, lags], FLOOR * responses[:, :1]))
    logs = logs - logs.mean(1, keepdims=True)
    slopes, errors = [], []
    for form in (lags.astype(float), np.log(lags), np.log(place + 1 + lags)):
        form = form - form.mean()
        slopes.append(logs @ form / (form @ form))
        errors.append(((logs - slopes[-1][:, None] * form) ** 2).sum(1))
    falls = slopes[0] < -1 / lags[-1]  # what falls more slowly cannot be told from what does not fall
    scale = np.where(falls, -1 / np.where(falls, slopes[0], -1.0), np.inf)
    return _Fit(scale, falls & (errors[0] < np.minimum(*errors[1:])))


def _partitions(subject: Subject, ids: Tensor) -> tuple[dict[str, Tensor], str]:
    """Where segments begin (B, T) bool, by name, and whose partitions these are."""
    if subject.tokenizer is not None:
        rules = Boundaries(["word", "sentence"], subject.vocabulary, subject.vocabulary == BYTE_VOCABULARY)
        if subject.vocabulary != BYTE_VOCABULARY:
            rules.read(subject.tokenizer)
        begins, _ = rules(ids, make_clock(*ids.shape), ())
        return dict(zip(rules.rules, begins.unbind(-1), strict=True)), "the text's"
    return subject.bounds(ids) or {}, "the model's own"


def _yoking(
    responses: np.ndarray, begins: Tensor, places: Tensor, documents: np.ndarray, seed: int
) -> np.ndarray | None:
    """(across − within) / within over lags with pairs of both kinds, mean over layers, of responses (L, B, G): as it
    is, then redrawn. None if no lag has both kinds."""
    lags = min(YOKED, responses.shape[2] - 1)
    passed = begins.long().cumsum(1).gather(1, places[:, None] + torch.arange(lags + 1))
    inside = (passed[:, 1:] == passed[:, :1]).double().numpy()  # (B, lags)
    if not (inside.any(0) & (inside < 1).any(0)).any():
        return None
    seen = responses[:, :, 1 : lags + 1].swapaxes(0, 1)  # (B, L, lags)
    felt, count = [], []
    for kind in (inside, 1 - inside):
        count.append(redrawn(kind, documents, seed))
        felt.append(redrawn(seen * kind[:, None], documents, seed) / np.maximum(count[-1], 1)[:, None])
    weight = (count[0] * count[1] / np.maximum(count[0] + count[1], 1))[:, None]  # 0 where there is one kind alone
    within, across = ((mean * weight).sum(2) for mean in felt)  # (draws, L)
    layers = within[0] > 0
    if not layers.any():
        return None
    share: np.ndarray = ((across - within)[:, layers] / np.maximum(within[:, layers], 1e-30)).mean(1)
    return share


def _curve(response: np.ndarray) -> Curve:
    return Curve(
        [float(lag) for lag in range(1, len(response))],
        [float(value) for value in response[1:] / max(response[0], 1e-30)],
        "tokens after the swap",
        "change, of that at the swap",
        log_x=True,
    )


def _stack(ids: Tensor, *layers: Callable[[Tensor], Tensor]) -> list[Tensor]:
    """The tokens as one-hot, then each layer of them."""
    embedded = one_hot(ids, 16).float()
    return [embedded, *[layer(embedded) for layer in layers]]


def _leaky(x: Tensor, keep: float, empties: Tensor | None = None) -> Tensor:
    """h_t = λ h_(t−1) + (1 − λ) x_t over (B, T, D); h_(t−1) is 0 where it is emptied (B, T)."""
    state, states = torch.zeros_like(x[:, 0]), []
    for t in range(x.shape[1]):
        if empties is not None:
            state = state * ~empties[:, t, None]
        state = keep * state + (1 - keep) * x[:, t]
        states.append(state)
    return torch.stack(states, 1)


def _mean(x: Tensor) -> Tensor:
    return x.cumsum(1) / torch.arange(1, x.shape[1] + 1)[:, None]
