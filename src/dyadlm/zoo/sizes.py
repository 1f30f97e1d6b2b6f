"""Sizes of a model with a wanted number of parameters. Models are counted without memory for their weights."""

import math
from functools import lru_cache

import torch
from transformers import PreTrainedModel

from dyadlm.errors import UserError
from dyadlm.zoo.family import Family, Sizes

TOLERANCE = 0.02
INNER = 8 / 3  # of the width, as in Llama, where nothing else is asked for
INNER_STEP = 8
WIDEST = 8192


def default_inner(width: int) -> int:
    """The usual width of a feed-forward part with three matrices."""
    return max(INNER_STEP, round(INNER * width / INNER_STEP) * INNER_STEP)


def count_parameters(model: PreTrainedModel) -> int:
    """Numbers that are trained; shared ones count once, complex ones twice."""
    return sum(weight.numel() * (2 if weight.is_complex() else 1) for weight in model.parameters())


@lru_cache(maxsize=512)
def count(family: Family, sizes: Sizes) -> int:
    """Parameters of a model of these sizes."""
    with torch.device("meta"):
        return count_parameters(family.make(sizes))


def solve(family: Family, parameters: int, layers: int | None, vocabulary: int, length: int) -> Sizes:
    """Sizes with the wanted number of parameters, to within 2 %: the width by bisection, then the feed-forward width.

    Of two widths, the one whose feed-forward parts are nearer to the usual shape is taken.

    layers: None takes those of the family, or one or two more or less where the width alone comes too coarse. A family
    that is not sized has the one size that it has.

    Raises:
        UserError: there are none.
    """
    if not family.sized:
        return Sizes(family.step, layers or family.layers, default_inner(family.step), vocabulary, length)
    if layers is not None:
        return _solve(family, parameters, layers, vocabulary, length)
    for more in (0, 1, -1, 2):
        try:
            return _solve(family, parameters, max(1, family.layers + more), vocabulary, length)
        except UserError as error:
            last = error
    raise last


def _solve(family: Family, parameters: int, layers: int, vocabulary: int, length: int) -> Sizes:
    def sizes(steps: int) -> Sizes:
        width = steps * family.step
        return Sizes(width, layers, default_inner(width), vocabulary, length)

    low, high = 1, WIDEST // family.step
    if count(family, sizes(low)) > parameters * (1 + TOLERANCE):
        raise UserError(f"A {family.name} of {layers} layers has more than {parameters:,} parameters; ask for more.")
    if count(family, sizes(high)) < parameters * (1 - TOLERANCE):
        raise UserError(
            f"The widest {family.name} of {layers} layers has fewer than {parameters:,} parameters; ask for fewer."
        )
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if count(family, sizes(middle)) <= parameters else (low, middle)
    near = [sizes(low), sizes(high)]
    found = min(near, key=lambda one: _away(family, one, parameters))
    if family.has_inner:
        fitting = [_with_inner(family, one, parameters) for one in near]
        close = [one for one in fitting if _away(family, one, parameters) <= TOLERANCE]
        found = min(close or fitting, key=lambda one: (_misshapen(one), _away(family, one, parameters)))
    if _away(family, found, parameters) > TOLERANCE:
        raise UserError(
            f"No {family.name} of {layers} layers comes within 2 % of {parameters:,} parameters "
            f"({count(family, found):,} is nearest); ask for another number, or other layers."
        )
    return found


def _away(family: Family, sizes: Sizes, parameters: int) -> float:
    return abs(count(family, sizes) / parameters - 1)


def _misshapen(sizes: Sizes) -> int:
    """How far the width of the feed-forward parts is from the usual one, in quarters of a logarithm: 0 within 13 %."""
    return round(4 * abs(math.log(sizes.inner / default_inner(sizes.width))))


def _with_inner(family: Family, sizes: Sizes, parameters: int) -> Sizes:
    """The same width with the feed-forward width that comes nearest; parameters rise with it along a line."""

    def wider(inner: int) -> Sizes:
        return Sizes(sizes.width, sizes.layers, inner, sizes.vocabulary, sizes.length)

    slope = (count(family, wider(2 * INNER_STEP)) - count(family, wider(INNER_STEP))) / INNER_STEP
    if slope <= 0:  # a family of a user's own, whose builder does not heed it
        return sizes
    inner = (parameters - count(family, wider(INNER_STEP))) / slope + INNER_STEP
    return wider(max(INNER_STEP, round(inner / INNER_STEP) * INNER_STEP))
