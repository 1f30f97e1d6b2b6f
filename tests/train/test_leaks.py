"""Training-time structure together and in pairs: beside all of it, no logit knows what comes after it (design 10).

What each mechanism is by itself is asserted beside it: test_twin.py, test_fingerprint.py, tests/model/test_planner.py.
"""

from itertools import combinations

import pytest
import torch
from torch import Tensor

from dyadlm import DyadForCausalLM
from dyadlm.model.companion import Companion
from dyadlm.train.fingerprint import Fingerprint
from dyadlm.train.planner import PlannerLessons
from dyadlm.train.settings import PlannerOptions, TwinOptions
from dyadlm.train.twin import Twin

from ..model.conftest import VARIANTS, make_model, text_ids
from .test_twin import leaking

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
    },
}
COMPANIONS = {
    "twin": lambda model: Twin(model, TwinOptions("joint")),
    "fingerprint": lambda model: Fingerprint(model.config, tags=True),
    "planner": lambda model: PlannerLessons(model, PlannerOptions(teacher=0.5, teacher_until=1.0)),
}
TOGETHER = [(name, tuple(COMPANIONS)) for name in MODELS]
PAIRS = [("topk", pair) for pair in combinations(COMPANIONS, 2)]
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
def awake(companion: Companion) -> Companion:
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


def assert_unmoved_by_later(model: DyadForCausalLM) -> None:
    """Tokens, labels and fingerprints after a place of two rows change nothing before it, nor in the third."""
    given = batch()
    before = said(model, given)
    for cut in (1, 8, 9, 24, TIME - 1):
        changed = {name: value.clone() for name, value in given.items()}
        changed["input_ids"][:2, cut:] = (changed["input_ids"][:2, cut:] + 101) % 259
        changed["labels"] = changed["input_ids"]
        changed["index"][:2, cut:] += 12_345
        changed["tags"][:2, cut:] += 6_789
        changed["shown"][:2, cut:] ^= True
        for part, value in said(model, changed).items():
            assert torch.equal(value[:2, :cut], before[part][:2, :cut]), part
            assert torch.equal(value[2], before[part][2]), part
            assert part == "choice" or not torch.equal(value[:2, cut:], before[part][:2, cut:]), part


def assert_no_gradient_from_later(model: DyadForCausalLM) -> None:
    """By place, where the model embeds its tokens; by the byte, wherever a mark is embedded; by the fingerprint."""
    given, embed = batch(), model.get_input_embeddings()
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
            assert not by_place[0, t + 1 :].any()
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


@every_set
def test_both_checks_catch_the_reversed_stream_in_the_logits(name, beside):
    model = accompanied(name, beside)
    leaking(model, model.companions["twin"] if "twin" in beside else awake(COMPANIONS["twin"](model)))
    for check in CHECKS:
        with pytest.raises(AssertionError):
            check(model)
