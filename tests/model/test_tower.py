"""The tower against its definition, composed from the reference loops: values, states and gradients.

Whatever order a tower pools and projects in, it must say what the definition says: the centroids of
`ops.reference.pyramid` and `ops.reference.segments`, through the bottlenecks, compared as `level_feature` tells,
written back and gated.
"""

import math

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity, silu

from dyadlm import DyadCache
from dyadlm.model.cache import BlockState
from dyadlm.model.configuration import LEVEL_FEATURES
from dyadlm.model.tower import Tower
from dyadlm.ops import make_clock, reference
from dyadlm.ops.pyramid import EARLY
from dyadlm.ops.selection import straight_through

from .conftest import make_model, text_ids

pytestmark = pytest.mark.slow

STACKS = {
    "sliding": ["sliding"] * 5,
    "dual": ["sliding", *["dual"] * 4],
    "block": ["block"] * 5,
    "prefix": ["prefix"] * 5,
    "mixed": ["sliding", "dual", "block", "prefix", "dual", "sliding", "dual"],
    "sparse": ["sliding", "sliding", "block", "sliding", "sliding", "dual"],  # node levels far apart
}
MECHANISMS = {
    "semantic": {"semantic_levels": ["syllable", "word", "sentence"]},
    "cut": {"semantic_levels": ["line"], "deepest": 2},  # segments are cut after 2^3 tokens
    "learned": {"semantic_levels": ["learned"], "semantic_memory": 2},
    "salience": {"salience": True},
    "forgetting": {"semantic_levels": ["word", "learned"], "forgetting": True},
    "all": {
        "semantic_levels": ["learned", "syllable", "word", "sentence", "line", "paragraph"],
        "semantic_memory": 2,
        "salience": True,
        "forgetting": True,
    },
}
EXACT = 1e-9


def counts(tower: Tower, x: Tensor) -> dict[int, Tensor]:
    """How much each token of a document (T, D) counts at each level: (T,) each."""
    sliding = [k for k, a in enumerate(tower.alignments) if a == "sliding"]
    others = [k for k in range(len(tower.alignments)) if k not in sliding]
    if not tower.config.salience:
        return {k: x.new_ones(len(x)) for k in range(len(tower.ranks))}
    weights = (3 * torch.tanh(tower.salience(x) / 3)).exp().unbind(-1)
    apart = (
        [sliding] if tower.config.transport_space == "model" else [[k] for k in sliding]
    )  # levels with one sum have one weight
    apart += [others] if others else []
    apart += [[k] for k in (*tower.by_rule, *tower.learned)]
    return {k: weight for levels, weight in zip(filter(None, apart), weights, strict=True) for k in levels}


def counted(x: Tensor, weight: Tensor) -> Tensor:
    """What is summed: x (T, C) times its weights (T,), beside how far these are from 1, as what does not exist has."""
    return torch.cat([x * weight[:, None], weight[:, None] - 1], -1)


def centroids(x: Tensor, weight: Tensor, level: int, alignment: str, early: str) -> tuple[Tensor, Tensor, Tensor]:
    """The current and previous centroid of a level at each token (T, D) each, and whether both are complete (T,)."""
    tokens, means, complete = counted(x, weight), [], []
    for index in range(len(x)):
        for window, running in zip(
            reference.windows_at(index, level, alignment), (alignment == "prefix", False), strict=True
        ):
            mean, whole = reference.centroid(tokens, window, 2**level, early, running)
            means.append(mean)
            complete.append(whole)
    mean = torch.stack(means)
    current, previous = (mean[:, :-1] / (1 + mean[:, -1:])).unflatten(0, (-1, 2)).unbind(1)
    return current, previous, torch.tensor(complete).view(-1, 2).all(1)


def segments(tower: Tower, x: Tensor, level: int, begins: Tensor) -> tuple[reference.Segments, Tensor]:
    """The segments of a semantic level in one document, and how sure their beginnings are (T,).

    begins: (T, rules), where the rules begin segments.
    """
    semantic, sure = [*tower.by_rule, *tower.learned], x.new_ones(len(x))
    if level in tower.learned:
        alike = cosine_similarity(tower.router.query(x)[1:], tower.router.key(x)[:-1], dim=-1)
        chance = torch.cat([sure[:1], (1 - alike) / 2])
        here = chance > 0.5
        sure = torch.where(here, chance, 1 - chance)
    else:
        here = begins[:, tower.by_rule.index(level)]
    keep = None
    if tower.config.forgetting:
        keep = torch.sigmoid(-tower.forgetting(x)[:, semantic.index(level)])
    longest, weights = 2 ** len(tower.ranks), counts(tower, x)[level]
    starts = [t == 0 for t in range(len(x))]
    return reference.segments(x, here.tolist(), starts, longest, weights=weights, keep=keep), sure


def definition(tower: Tower, x: Tensor, begins: Tensor, ages: Tensor | None) -> Tensor:
    """What a tower must say of one document: x (T, D), begins (T, rules), ages (T, ages) → (T, D)."""
    config, weights = tower.config, counts(tower, x)
    node_levels = [k for k, a in enumerate(tower.alignments) if a in ("block", "dual")]
    mixed, column = torch.zeros_like(x), 0
    for k, bottleneck in enumerate(tower.bottlenecks):
        older, sure = [], x.new_ones(len(x))
        if k < len(tower.alignments):
            q, p, paired = centroids(x, weights[k], k, tower.alignments[k], config.early)
        else:
            own, sure = segments(tower, x, k, begins)
            q, p, paired = own.current, own.last, torch.tensor(own.complete) >= 1
            older = [own.earlier] * (config.semantic_memory - 1)
        early_projected = config.transport_space == "level"
        if early_projected:
            q, p, *older = (bottleneck(part) for part in (q, p, *older))
        parts = []
        for name in LEVEL_FEATURES[config.level_feature]:
            if name == "transport":
                part = reference.phase_transport(q, p)
            else:
                part = {"difference": q - p, "product": q * p, "current": q, "previous": p}[name]
            if config.early == "mask" and name in ("transport", "difference"):
                part = part * paired[:, None]
            parts.append(part)
        parts += older
        feature = torch.cat(parts if early_projected else [bottleneck(part) for part in parts], -1)
        feature = feature * straight_through(sure)[:, None]
        if k in node_levels:
            write = tower.up_nodes[str(k)].weight
        else:
            write = tower.up_tokens.weight[:, column : column + feature.shape[-1]]
            column += feature.shape[-1]
        mixed = mixed + feature @ write.T
    gate = tower.gate(x) if ages is None else tower.gate(x) + tower.age(ages)
    return silu(gate) * mixed


def true_ages(tower: Tower, begins: Tensor) -> Tensor:
    """How far each token of a document is past the last node of each level that is not sliding, as angles; and how
    long each segment that begins by a rule is, as a logarithm."""
    time, longest = len(begins), 2 ** len(tower.ranks)
    periods = [2 ** (k - (a == "dual")) for k, a in enumerate(tower.alignments) if a != "sliding"]
    angle = torch.tensor([[2 * math.pi * ((t + 1) % period) / period for period in periods] for t in range(time)])
    lengths = [segments(tower, torch.ones(time, 8).double(), k, begins)[0].length for k in tower.by_rule]
    into = [[math.log(length) / math.log(longest) for length in level] for level in lengths]
    return torch.cat([angle.sin(), angle.cos(), torch.tensor(into).view(-1, time).T], -1).double()


def true_state(tower: Tower, x: Tensor, begins: Tensor) -> list[Tensor]:
    """What a tower must carry after one document (T, D): rings of window sums, then the last four blocks, then of
    segments the open one, the last complete one and the one before."""
    sliding = [k for k, a in enumerate(tower.alignments) if a == "sliding"]
    others = [k for k, a in enumerate(tower.alignments) if a != "sliding"]
    depths = [k - (tower.alignments[k] == "dual") for k in others]
    weights, projected = counts(tower, x), tower.config.transport_space == "level"

    def summed(part: Tensor, level: int) -> Tensor:
        return part if not tower.config.salience else counted(part, weights[level])

    time, state = x.shape[0], []
    for j in range(max(sliding, default=-1) + 1):
        tokens = summed(x, sliding[0])
        if projected:
            tokens = torch.cat([summed(tower.bottlenecks[k](x), k) for k in sliding if k >= j], -1)
        ends = range(time - 2**j + 1, time + 1)
        state.append(torch.stack([tokens[max(end - 2**j, 0) : max(end, 0)].sum(0) for end in ends]))
    for j in range(max(depths, default=-1) + 1):
        tokens = summed(x, others[0])
        complete = time // 2**j
        blocks = range(complete - 4, complete)
        state.append(
            torch.stack([tokens[b * 2**j : (b + 1) * 2**j].sum(0) if b >= 0 else tokens[0] * 0 for b in blocks])
        )
    for levels in (tower.by_rule, tower.learned):
        own = [segments(tower, x, k, begins)[0] for k in levels]
        for part in ("current", "last", "earlier") if own else ():
            means = [getattr(level, part)[-1] for level in own]
            means = [tower.bottlenecks[k](mean) if projected else mean for k, mean in zip(levels, means, strict=True)]
            state.append(torch.cat(means))
    return state


def carried_state(tower: Tower, state: BlockState) -> list[Tensor]:
    """The same, of the first row of a state; an open segment is carried as its sums, beside the sum of its weights."""
    parts = [part[0] for part in (*state.rings, *state.blocks)]
    for levels, own in ((tower.by_rule, state.segments), (tower.learned, state.learned[3:])):
        if own:
            widths = [
                tower.config.hidden_size if tower.config.transport_space == "model" else tower.ranks[k] for k in levels
            ]
            sums = own[0][0].split([width + 1 for width in widths])
            parts += [torch.cat([level[:-1] / level[-1] for level in sums]), own[1][0], own[2][0]]
    return parts


def watched(model, **inputs):
    """The first tower of a model, what it read (B, T, D), what it said, its ages and the state it returned."""
    tower, seen = model.model.layers[0].tower, []
    listen = tower.read_levels

    def watch(x, timing, state):
        said, state = listen(x, timing, state)
        seen.append((x, tower.output_gate(x, timing) * tower.mix(said.features, timing), timing.ages, state))
        return said, state

    tower.read_levels = watch
    model.model(**inputs)
    del tower.read_levels
    ((x, said, ages, state),) = seen
    return tower, x, said, (None if tower.age is None else ages.expand(len(x), -1, -1)), state


def begun(model, ids: Tensor) -> Tensor:
    """Where the rules of a model begin segments in one document (T,): (T, rules)."""
    if model.model.boundaries is None:
        return torch.zeros(len(ids), 0, dtype=torch.bool)
    return model.model.boundaries(ids[None], make_clock(1, len(ids)), ())[0][0]


def tower_model(stack: str, deepest: int | None = None, **options):
    alignments = STACKS[stack][:deepest]
    ranks = [5 + k % 3 for k in range(len(alignments) + len(options.get("semantic_levels", ())))]
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_levels": len(alignments), "level_rank": ranks}
    return make_model(level_alignment=alignments, **sizes, **options)


def assert_is_the_definition(model, time: int, gradients: bool = False) -> None:
    ids = text_ids(1, time, seed=time)
    tower, x, said, ages, state = watched(model, input_ids=ids)
    begins = begun(model, ids[0])
    if ages is not None:
        assert (ages[0] - true_ages(tower, begins)).abs().max() < 1e-5
    leaf = x[0].detach().requires_grad_()
    expected = definition(tower, leaf, begins, None if ages is None else ages[0])
    assert (said[0] - expected).abs().max() < EXACT * (1 + expected.abs().max())
    for a, b in zip(carried_state(tower, state), true_state(tower, x[0], begins), strict=True):
        assert (a - b).abs().max() < EXACT
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


@pytest.mark.parametrize("space", ["level", "model"])
@pytest.mark.parametrize("stack", ["mixed", "prefix"])
@pytest.mark.parametrize("mechanisms", MECHANISMS)
def test_mechanisms_equal_the_definition(mechanisms, stack, space):
    for early, time in zip(EARLY, (7, 33, 70), strict=True):
        fields = {"level_feature": "transport+pair", "transport_space": space, "early": early}
        model = tower_model(stack, **fields, **MECHANISMS[mechanisms])
        assert_is_the_definition(model, 1)
        assert_is_the_definition(model, time, gradients=time == 70)


@pytest.mark.parametrize("early", EARLY)
@pytest.mark.parametrize("stack", STACKS)
def test_packed_and_padded_documents_equal_the_definition_of_each(stack, early):
    assert_packed_is_the_definition(tower_model(stack, level_feature="transport+centroid", early=early))


@pytest.mark.parametrize("early", EARLY)
@pytest.mark.parametrize("space", ["level", "model"])
@pytest.mark.parametrize("mechanisms", MECHANISMS)
def test_mechanisms_on_packed_and_padded_documents_equal_the_definition_of_each(mechanisms, space, early):
    assert_packed_is_the_definition(tower_model("mixed", transport_space=space, early=early, **MECHANISMS[mechanisms]))


def assert_packed_is_the_definition(model) -> None:
    """Also in a second chunk, which begins in the middle of a document."""
    sizes, pads = (5, 33, 12), 3
    ids = text_ids(1, pads + sum(sizes))
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
        begins = begun(model, ids[0, pads:][own])
        want = definition(tower, x[own], begins, None if whole_ages is None else whole_ages[own])
        assert (got[own] - want).abs().max() < EXACT * (1 + want.abs().max())
        if whole_ages is not None:
            assert (whole_ages[own] - true_ages(tower, begins)).abs().max() < 1e-5
        at += size
    for a, b in zip(carried_state(tower, cache.layers[0]), true_state(tower, x[-sizes[-1] :], begins), strict=True):
        assert (a - b).abs().max() < EXACT
