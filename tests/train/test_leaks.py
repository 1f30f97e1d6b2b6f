"""Training-time structure together and in pairs: beside all of it, no logit knows what comes after it.

What each mechanism is by itself is asserted beside it: test_twin.py, test_fingerprint.py, tests/model/test_planner.py.
"""

import math
from itertools import combinations

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from dyadlm import DyadConfig, DyadForCausalLM
from dyadlm.data.batches import IGNORED_LABEL
from dyadlm.model.extension import AuxiliaryModule
from dyadlm.train.fingerprint import Fingerprint
from dyadlm.train.planner import PlannerLessons
from dyadlm.train.settings import PlannerOptions, TwinOptions
from dyadlm.train.twin import Twin

from ..model.conftest import VARIANTS, make_model, text_ids
from ..model.test_causality import DISTANCES, LIMIT, unpredictable
from ..model.test_planner import leak
from .test_twin import leaking

pytestmark = pytest.mark.slow

TIME = 48
# Bytes of which the text has none, and where they are written over it.
MARKS = {place: 1 + number for number, place in enumerate((3, 9, 17, 25, 31, 40, TIME - 1))}
MODELS = {
    "topk": VARIANTS["everything"],
    "entmax": {
        **VARIANTS["everything"],
        "selector": "entmax",
        "selector_margin": 0.0,
        "planner": "stack",
        "artist_sees": "both",
        "pool": "learned",
    },
}
COMPANIONS = {
    "twin": lambda model: Twin(model, TwinOptions("joint")),
    "fingerprint": lambda model: Fingerprint(model.config, tags=True),
    "planner": lambda model: PlannerLessons(model, PlannerOptions(teacher=0.5, teacher_until=1.0)),
}
TOGETHER = [(name, tuple(COMPANIONS)) for name in MODELS]
PAIRS = [("topk", pair) for pair in combinations(COMPANIONS, 2)]
FLOOR = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_levels": 3, "semantic_levels": ["word", "learned"],
    "selector": "topk", "selector_heads": 2, "slot_contexts": [1], "slot_layers": [1], "slot_entries": 64,
    "slot_width": 4, "planner": "head", "planner_width": 16, "planner_futures": 2, "consensus": 0.9,
    "initializer_range": 0.2,
}  # fmt: skip
every_set = pytest.mark.parametrize(
    ("name", "beside"), TOGETHER + PAIRS, ids=lambda value: value if isinstance(value, str) else "+".join(value)
)


def accompanied(name: str, beside: tuple[str, ...]) -> DyadForCausalLM:
    """In the midst of training: awake companions, dropout, and a teacher who sees the true future in most rows."""
    fields = {**MODELS[name], "dropout": 0.1}
    if "planner" not in beside:
        fields |= {"planner": "none", "consensus": 0.0}
    model = make_model(**fields).train()
    for other in beside:
        model.accompany(other, awake(COMPANIONS[other](model)))
    model.set_progress(0.25)
    return model


@torch.no_grad()
def awake(companion: AuxiliaryModule) -> AuxiliaryModule:
    """With weights that let every part of it speak, as at first not all do."""
    for weight in companion.double().parameters():
        weight += 0.2 * torch.randn_like(weight)
    return companion


def batch() -> dict[str, Tensor]:
    """Three rows of text, in which every place of MARKS has a byte of its own, and the fingerprints of all tokens."""
    ids = text_ids(3, TIME)
    for place, mark in MARKS.items():
        ids[:, place] = mark
    index = 7 * TIME * torch.arange(3)[:, None] + torch.arange(TIME)
    tags = torch.stack([index // 8, index // 64, index // 512], -1)
    return {"input_ids": ids, "labels": ids, "index": index, "tags": tags, "shown": index % 3 != 1}


def packed() -> dict[str, Tensor]:
    """The same with documents of 13 tokens, and pads before, within and behind them, as far apart as rows differ."""
    given = batch()
    mask = torch.ones_like(given["input_ids"])
    mask[0, :2] = mask[0, 20:23] = mask[1, -7:] = 0
    positions = (torch.arange(TIME) % 13).expand(3, -1)
    labels = given["input_ids"].masked_fill(mask == 0, IGNORED_LABEL)
    return {**given, "labels": labels, "attention_mask": mask, "position_ids": positions}


def layout(given: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """(B, T) bool where tokens are real, and (B, T) int64 the number of their document."""
    everywhere = torch.ones_like(given["input_ids"])
    starts = given.get("position_ids", everywhere) == 0
    return given.get("attention_mask", everywhere).bool(), starts.cumsum(1)


def said(model: DyadForCausalLM, given: dict[str, Tensor]) -> dict[str, Tensor]:
    """Logits, and what is planned at each token, by the same random numbers every time."""
    torch.manual_seed(3)
    for layer in model.model.layers:
        if layer.tower.selector.chooses:
            layer.tower.selector.load.zero_()
    output = model(**given, output_plan=True)
    expected = {"twin": "twin_loss", "fingerprint": "fingerprint_shown", "planner": "teacher_loss"}
    for name in model.companions:
        assert (expected[name] in (output.metrics or {})) == model.training  # they are at work
    found = {"logits": output.logits}
    if output.plan is not None:
        found |= {name: getattr(output.plan, name) for name in ("proposal", "artist", "far", "futures", "choice")}
        found["forecast"] = output.plan.outlook.forecast
    return found


def assert_unmoved_by_later(model: DyadForCausalLM, given: dict[str, Tensor] | None = None) -> None:
    """Tokens, labels and fingerprints after a place of two rows change nothing before it, nor in the third."""
    given = given or batch()
    real, _ = layout(given)
    before = said(model, given)
    for cut in (1, 8, 9, 24, TIME - 1):
        changed = {name: value.clone() for name, value in given.items()}
        changed["input_ids"][:2, cut:] = (changed["input_ids"][:2, cut:] + 101) % 259
        changed["labels"] = changed["input_ids"].where(real, IGNORED_LABEL)
        changed["index"][:2, cut:] += 12_345
        changed["tags"][:2, cut:] += 6_789
        changed["shown"][:2, cut:] ^= True
        early, late = real[:2, :cut], real[:2, cut:]
        for part, value in said(model, changed).items():
            assert torch.equal(value[:2, :cut][early], before[part][:2, :cut][early]), part
            assert torch.equal(value[2], before[part][2]), part
            assert part == "choice" or not torch.equal(value[:2, cut:][late], before[part][:2, cut:][late]), part


def assert_no_gradient_from_later(model: DyadForCausalLM, given: dict[str, Tensor] | None = None) -> None:
    """By place, where the model embeds its tokens; by the byte, wherever a mark is embedded; by the fingerprint."""
    given, embed = given or batch(), model.get_input_embeddings()
    real, document = layout(given)
    seen: list[Tensor] = []
    by_byte = torch.zeros_like(embed.weight, requires_grad=True)

    def watch(module: torch.nn.Module, args: tuple[Tensor], output: Tensor) -> Tensor:
        if output.dim() != 3:
            return output  # a planner embeds its proposals, too, which may be any
        seen.append(output + by_byte[args[0]])
        return seen[-1]

    hook = embed.register_forward_hook(watch)
    logits = said(model, given)["logits"]
    hook.remove()
    tables = []
    if model.training and "fingerprint" in model.companions:
        tables = [model.companions["fingerprint"].index.tables[0].weight]  # a digit of its own for every token
    for place, mark in list(MARKS.items())[:-1]:
        for t in (place - 1, place):
            value = logits[0, t].square().sum()
            by_place, byte, *prints = torch.autograd.grad(value, [seen[0], by_byte, *tables], retain_graph=True)
            read = real[0] & (document[0] == document[0, t]) & (torch.arange(TIME) <= t)
            assert not by_place[0, ~read].any()
            assert not by_place[1:].any()
            assert by_place[0, t].any()
            assert byte[mark].any() == (t == place)
            assert not byte[[later for at, later in MARKS.items() if at > t]].any()
            for gradient in prints:
                digits = given["index"] % len(gradient)
                assert not gradient[digits[0, t + 1 :]].any()
                assert gradient[digits[0, t]].any() == given["shown"][0, t]


CHECKS = (assert_unmoved_by_later, assert_no_gradient_from_later)


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@every_set
def test_nothing_comes_from_later(name, beside, training, check):
    check(accompanied(name, beside).train(training))


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("name", MODELS)
def test_nothing_comes_from_later_in_padded_rows_of_several_documents(name, training, check):
    check(accompanied(name, tuple(COMPANIONS)).train(training), packed())


def assert_unmoved_by_other_documents(model: DyadForCausalLM, given: dict[str, Tensor]) -> None:
    """What a document says is all its own: not that of other documents of its row, nor of pads."""
    real, document = layout(given)
    before = said(model, given)
    for kept in (2, 3):
        other = ~real | (document != kept)
        changed = {name: value.clone() for name, value in given.items()}
        changed["input_ids"][other] = (changed["input_ids"][other] + 101) % 259
        changed["labels"] = changed["input_ids"].where(real, IGNORED_LABEL)
        changed["index"][other] += 12_345
        changed["tags"][other] += 6_789
        changed["shown"] ^= other
        for part, value in said(model, changed).items():
            assert torch.equal(value[~other], before[part][~other]), part
            assert part == "choice" or not torch.equal(value[other & real], before[part][other & real]), part


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("name", MODELS)
def test_nothing_comes_from_other_documents_nor_from_pads(name, training):
    assert_unmoved_by_other_documents(accompanied(name, tuple(COMPANIONS)).train(training), packed())


@pytest.mark.parametrize("check", [*CHECKS, assert_unmoved_by_other_documents], ids=lambda check: check.__name__)
def test_the_reversed_stream_is_caught_in_padded_rows_of_several_documents(check):
    model = accompanied("topk", tuple(COMPANIONS))
    leaking(model, model.companions["twin"])
    with pytest.raises(AssertionError):
        check(model, packed())


@every_set
def test_both_checks_catch_the_reversed_stream_in_the_logits(name, beside):
    model = accompanied(name, beside)
    leaking(model, model.companions["twin"] if "twin" in beside else awake(COMPANIONS["twin"](model)))
    for check in CHECKS:
        with pytest.raises(AssertionError):
            check(model)


# ---- The floor


def highest_gains(model: DyadForCausalLM, steps: int = 32, time: int = 128) -> dict[int | None, float]:
    """As in tests/model/test_causality.py, of a model that is scored as it will be used and then taught everything.

    Each batch is scored in evaluation mode, where artist and engineer agree, before a step learns from it in training
    mode with labels, so that a plan is drawn, the twin reads backwards and the teacher shows the true future. Its
    second half counts.
    """
    generator = torch.Generator().manual_seed(8)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    totals, highest = dict.fromkeys(DISTANCES, 0.0), dict.fromkeys(DISTANCES, 0.0)
    for step in range(steps):
        streams = [unpredictable(distance, time, 8, generator) for distance in DISTANCES]
        ids, labels = (torch.cat(parts) for parts in zip(*streams, strict=True))
        if step >= steps // 2:
            with torch.no_grad():
                logits = model.eval()(input_ids=ids).logits[:, :-1, :8]
            nats = cross_entropy(logits.mT, labels[:, 1:], reduction="none")
            for row, distance in enumerate(DISTANCES):
                totals[distance] += (math.log(8) - nats[row][labels[row, 1:] != IGNORED_LABEL]).sum().item()
                highest[distance] = max(highest[distance], totals[distance])
        model.train().set_progress(step / steps)
        index = step * ids.numel() + torch.arange(ids.numel()).view_as(ids)
        fingerprints = {"index": index, "tags": index[..., None] // torch.tensor([8, 64, 512]), "shown": index % 3 == 1}
        output = model(input_ids=ids, labels=labels, **fingerprints)
        optimizer.zero_grad()
        output.loss.backward()
        optimizer.step()
    assert {"twin_loss", "fingerprint_shown", "artist_loss", "teacher_loss"} <= output.metrics.keys()
    return highest


def floor_model() -> DyadForCausalLM:
    """With mechanisms, consensus and all companions; embedded widely, so that it learns within few steps."""
    torch.manual_seed(0)
    model = DyadForCausalLM(DyadConfig(**FLOOR))
    for name, companion in COMPANIONS.items():
        model.accompany(name, companion(model))
    return model


def test_nobody_gains_beside_all_companions_and_by_consensus():
    assert max(highest_gains(floor_model()).values()) < LIMIT


def test_the_floor_catches_an_artist_who_sees_the_true_future(monkeypatch):
    model = floor_model()
    leak(model, monkeypatch)
    assert highest_gains(model)[1] > LIMIT


def test_the_floor_catches_the_reversed_stream_beside_all_companions():
    model = floor_model()
    leaking(model, model.companions["twin"])
    assert min(highest_gains(model, steps=10).values()) > LIMIT
