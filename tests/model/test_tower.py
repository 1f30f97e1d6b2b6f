"""The tower against its definition, composed from the reference loops: values, states and gradients.

Whatever order a tower pools and projects in, it must say what the definition says: the centroids of
`ops.reference.pyramid`, through the bottlenecks, compared as `level_feature` tells, written back and gated.
"""

import math

import pytest
import torch
from torch import Tensor
from torch.nn.functional import silu

from dyadlm import DyadCache
from dyadlm.model.configuration import LEVEL_FEATURES
from dyadlm.model.tower import Tower
from dyadlm.ops import reference
from dyadlm.ops.pyramid import EARLY

from .conftest import make_model, random_ids

STACKS = {
    "sliding": ["sliding"] * 5,
    "dual": ["sliding", *["dual"] * 4],
    "block": ["block"] * 5,
    "prefix": ["prefix"] * 5,
    "mixed": ["sliding", "dual", "block", "prefix", "dual", "sliding", "dual"],
    "sparse": ["sliding", "sliding", "block", "sliding", "sliding", "dual"],  # node levels far apart
}
EXACT = 1e-9


def definition(tower: Tower, x: Tensor, ages: Tensor | None) -> Tensor:
    """What a tower must say of one document: x (T, D), ages (T, 2 levels) → (T, D)."""
    config = tower.config
    current, previous, paired = reference.pyramid(x, tower.alignments, config.early)
    token_levels = [k for k, a in enumerate(tower.alignments) if a in ("sliding", "prefix")]
    mixed, column = torch.zeros_like(x), 0
    for k, bottleneck in enumerate(tower.bottlenecks):
        early_projected = config.transport_space == "level"
        q, p = current[:, k], previous[:, k]
        if early_projected:
            q, p = bottleneck(q), bottleneck(p)
        parts = []
        for name in LEVEL_FEATURES[config.level_feature]:
            if name == "transport":
                part = reference.phase_transport(q, p)
            else:
                part = {"difference": q - p, "product": q * p, "current": q, "previous": p}[name]
            if config.early == "mask" and name in ("transport", "difference"):
                part = part * paired[:, k, None]
            parts.append(part if early_projected else bottleneck(part))
        feature = torch.cat(parts, -1)
        if k in token_levels:
            write = tower.up_tokens.weight[:, column : column + feature.shape[-1]]
            column += feature.shape[-1]
        else:
            write = tower.up_nodes[str(k)].weight
        mixed = mixed + feature @ write.T
    gate = tower.gate(x) if ages is None else tower.gate(x) + tower.age(ages)
    return silu(gate) * mixed


def true_ages(alignments: list[str], time: int) -> Tensor:
    """How far each token of a document is past the last node of each level that is not sliding, as angles."""
    periods = [2 ** (k - (a == "dual")) for k, a in enumerate(alignments) if a != "sliding"]
    angle = torch.tensor([[2 * math.pi * ((t + 1) % period) / period for period in periods] for t in range(time)])
    return torch.cat([angle.sin(), angle.cos()], -1).double()


def true_state(tower: Tower, x: Tensor) -> list[Tensor]:
    """The sums that a tower must carry after one document (T, D): rings of window sums, then the last four blocks."""
    sliding = [k for k, a in enumerate(tower.alignments) if a == "sliding"]
    depths = [k - (a == "dual") for k, a in enumerate(tower.alignments) if a != "sliding"]
    time, state = x.shape[0], []
    for j in range(max(sliding, default=-1) + 1):
        tokens = x
        if tower.config.transport_space == "level":
            tokens = torch.cat([tower.bottlenecks[k](x) for k in sliding if k >= j], -1)
        ends = range(time - 2**j + 1, time + 1)
        state.append(torch.stack([tokens[max(end - 2**j, 0) : max(end, 0)].sum(0) for end in ends]))
    for j in range(max(depths, default=-1) + 1):
        complete = time // 2**j
        blocks = range(complete - 4, complete)
        state.append(torch.stack([x[b * 2**j : (b + 1) * 2**j].sum(0) if b >= 0 else x[0] * 0 for b in blocks]))
    return state


def watched(model, **inputs):
    """The first tower of a model, what it read (B, T, D), what it said, its ages and the state it returned."""
    tower, seen = model.model.layers[0].tower, []
    listen = tower.listen

    def watch(x, timing, state):
        said, state = listen(x, timing, state)
        seen.append((x, tower.open(x, timing) * tower.mix(said.features, timing), timing.ages, state))
        return said, state

    tower.listen = watch
    model.model(**inputs)
    del tower.listen
    ((x, said, ages, state),) = seen
    return tower, x, said, (None if tower.age is None else ages.expand(len(x), -1, -1)), state


def tower_model(stack: str, **options):
    alignments = STACKS[stack]
    ranks = [5 + k % 3 for k in range(len(alignments))]
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_levels": len(alignments), "level_rank": ranks}
    return make_model(level_alignment=alignments, **sizes, **options)


def assert_is_the_definition(model, time: int, gradients: bool = False) -> None:
    tower, x, said, ages, state = watched(model, input_ids=random_ids(1, time, seed=time))
    if ages is not None:
        assert (ages[0] - true_ages(tower.alignments, time)).abs().max() < 1e-5
    leaf = x[0].detach().requires_grad_()
    expected = definition(tower, leaf, None if ages is None else ages[0])
    assert (said[0] - expected).abs().max() < EXACT * (1 + expected.abs().max())
    for a, b in zip([*state.rings, *state.blocks], true_state(tower, x[0]), strict=True):
        assert (a[0] - b).abs().max() < EXACT
    if gradients:
        weights = torch.randn(said[0].shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        parameters = list(tower.parameters())
        got = torch.autograd.grad((said[0] * weights).sum(), [x, *parameters])
        want = torch.autograd.grad((expected * weights).sum(), [leaf, *parameters])
        for a, b in zip(got, want, strict=True):
            assert b.abs().max() > 0  # every weight has a say
            assert (a.view_as(b) - b).abs().max() < 1e-9 * (1 + b.abs().max())


@pytest.mark.parametrize("space", ["level", "model"])
@pytest.mark.parametrize("feature", LEVEL_FEATURES)
@pytest.mark.parametrize("stack", STACKS)
def test_values_states_and_gradients_equal_the_definition(stack, feature, space):
    for early in EARLY:
        model = tower_model(stack, level_feature=feature, transport_space=space, early=early)
        assert_is_the_definition(model, 3)
        deep = early == "mask" and len(STACKS[stack]) > 5  # long enough for every level to have two windows
        assert_is_the_definition(model, 130 if deep else 37, gradients=True)


@pytest.mark.parametrize("time", [1, 2, 63, 64, 65, 257, 1000])
def test_every_length_equals_the_definition(time):
    assert_is_the_definition(tower_model("mixed", level_feature="transport+pair"), time)


@pytest.mark.parametrize("early", EARLY)
@pytest.mark.parametrize("stack", STACKS)
def test_packed_and_padded_documents_equal_the_definition_of_each(stack, early):
    """Also in a second chunk, which begins in the middle of a document."""
    model = tower_model(stack, level_feature="transport+centroid", early=early)
    sizes, pads = (5, 33, 12), 3
    ids = random_ids(1, pads + sum(sizes))
    mask = torch.ones_like(ids)
    mask[:, :pads] = 0
    positions = torch.cat([torch.zeros(pads, dtype=torch.long), *map(torch.arange, sizes)])[None]
    cut, cache, read, said, ages = 21, DyadCache(), [], [], []
    for part in (slice(0, cut), slice(cut, None)):
        real = int(mask[:, part].sum())
        inputs = {"input_ids": ids[:, part], "attention_mask": mask[:, part], "position_ids": positions[:, part]}
        tower, x, out, age, _ = watched(model, **inputs, past_key_values=cache, use_cache=True)
        read.append(x[0, :real])  # the model brings real tokens to the front
        said.append(out[0, :real])
        ages.append(None if age is None else age[0, :real])
    whole_ages = None if ages[0] is None else torch.cat(ages)
    x, got, at = torch.cat(read), torch.cat(said), 0
    for size in sizes:
        own = slice(at, at + size)
        want = definition(tower, x[own], None if whole_ages is None else whole_ages[own])
        assert (got[own] - want).abs().max() < EXACT * (1 + want.abs().max())
        if whole_ages is not None:
            assert (whole_ages[own] - true_ages(tower.alignments, size)).abs().max() < 1e-5
        at += size
    for a, b in zip([*cache.layers[0].rings, *cache.layers[0].blocks], true_state(tower, x[-sizes[-1] :]), strict=True):
        assert (a[0] - b).abs().max() < EXACT
