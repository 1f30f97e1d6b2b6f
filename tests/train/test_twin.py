"""The twin reads each document backwards, shares every bottleneck, and shows the model nothing."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM

from dyadlm import DyadConfig, DyadForCausalLM
from dyadlm.model.boundaries import Boundaries, marks_of
from dyadlm.model.extension import TrainingPass
from dyadlm.ops.pyramid import make_clock
from dyadlm.train import export, train
from dyadlm.train.companions import COMPANIONS_NAME
from dyadlm.train.settings import TwinOptions
from dyadlm.train.twin import Twin, turned_round

from ..model.conftest import VARIANTS, make_model, text_ids
from ..model.test_causality import DISTANCES, LIMIT, unpredictable

pytestmark = pytest.mark.slow

CONDITIONINGS = ("joint", "reverse", "detached")
SMALL = {"hidden_size": 16, "num_hidden_layers": 2}
MIXED = {"num_levels": 5, "level_alignment": ["sliding", "dual", "block", "prefix", "sliding"]}
# Every place in which a tower uses its bottlenecks, and everything else in it that learns.
TOWERS = {
    "token and node levels": {**SMALL, **MIXED},
    "model space": {**SMALL, **MIXED, "transport_space": "model", "level_feature": "transport+pair"},
    "salience": {**SMALL, **MIXED, "salience": True, "early": "partial"},
    "segments": {**VARIANTS["learned"], "num_levels": 3},
    "one tower": {**SMALL, "num_levels": 3, "tower": "input", "semantic_levels": ["word"]},
}


def with_twin(conditioning: str = "joint", weight: float = 1.0, **fields) -> tuple[DyadForCausalLM, Twin]:
    """A model and its twin in training, float64, random weights everywhere."""
    model = make_model(**fields).train()
    twin = Twin(model, TwinOptions(conditioning, weight))
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.08)
    model.accompany("twin", twin)
    return model, twin


def lesson(ids, labels=None, mask=None, positions=None) -> TrainingPass:
    return TrainingPass(ids, ids if labels is None else labels, mask, positions, torch.empty(0), {})


def bottlenecks(model) -> list[torch.nn.Parameter]:
    return [weight for name, weight in model.named_parameters() if ".bottlenecks." in name]


# ---- The order of reading


@settings(deadline=None, max_examples=40)
@given(st.lists(st.tuples(st.lists(st.integers(1, 5), max_size=4), st.integers(0, 3)), min_size=1, max_size=3))
def test_every_document_is_turned_round_in_its_place(rows):
    """Rows of documents with so many tokens, and pads after them."""
    time = max(1, max(sum(documents) + pads for documents, pads in rows))
    starts, expected = torch.zeros(len(rows), time, dtype=torch.bool), []
    for row, (documents, _) in enumerate(rows):
        order = []
        for size in documents:
            starts[row, len(order)] = True
            order += reversed(range(len(order), len(order) + size))
        expected.append(order + list(range(len(order), time)))
    length = torch.tensor([sum(documents) for documents, _ in rows])
    assert turned_round(make_clock(len(rows), time, length=length, starts=starts)).tolist() == expected


def packed_batch():
    """Three documents of which two share a row; pads on the left, inside and on the right."""
    documents = [text_ids(1, size, seed=size)[0] for size in (9, 14, 20)]
    ids, mask = torch.full((2, 27), 256), torch.zeros(2, 27, dtype=torch.long)
    positions, labels = torch.zeros(2, 27, dtype=torch.long), torch.full((2, 27), -100)
    places = [(0, range(1, 10)), (0, [*range(10, 14), *range(15, 25)]), (1, range(7, 27))]
    for document, (row, columns) in zip(documents, places, strict=True):
        columns = torch.tensor(list(columns))
        ids[row, columns] = labels[row, columns] = document
        mask[row, columns], positions[row, columns] = 1, torch.arange(len(document))
    labels[0, 3] = labels[1, 12] = -100
    return documents, lesson(ids, labels, mask, positions)


@pytest.mark.parametrize("tower", TOWERS)
def test_the_loss_is_that_of_each_document_backwards_and_alone(tower):
    model, twin = with_twin(weight=0.5, **TOWERS[tower])
    documents, batch = packed_batch()
    nats = []
    for number, document in enumerate(documents):
        hidden, order, _, _ = twin.read(lesson(document[None]))
        assert order[0].tolist() == list(reversed(range(len(document))))
        backwards, missing = document.flip(0), {0: 2, 2: 5}.get(number)
        each = cross_entropy(twin.head(hidden[0, :-1]), backwards[1:], reduction="none")
        nats += [value for at, value in enumerate(each) if len(document) - 2 - at != missing]
    result = twin.losses(batch)
    expected = torch.stack(nats).mean()
    torch.testing.assert_close(result["twin_loss"].double(), expected.detach(), rtol=1e-5, atol=0)
    if not model.model.layers[0].tower.learned:
        torch.testing.assert_close(result["cost"], 0.5 * result["twin_loss"], rtol=1e-6, atol=0)
    else:
        assert result["cost"] > 0.5 * result["twin_loss"] + 1e-4


@pytest.mark.parametrize("tower", TOWERS)
def test_the_twin_reads_nothing_before_what_it_stands_at(tower):
    _, twin = with_twin(**TOWERS[tower])
    ids = text_ids(1, 50)
    before = twin.read(lesson(ids))[0]
    for first in (1, 7, 20, 49):  # all tokens before this one change
        changed = ids.clone()
        changed[:, :first] = (changed[:, :first] + 101) % 259
        after = twin.read(lesson(changed))[0]
        assert torch.equal(after[:, : 50 - first], before[:, : 50 - first])
        assert not torch.equal(after[:, 50 - first :], before[:, 50 - first :])


def test_without_a_target_there_is_no_loss_and_a_gradient_all_the_same():
    _, twin = with_twin(**SMALL)
    for size, labels in ((12, torch.full((1, 12), -100)), (1, None)):
        result = twin.losses(lesson(text_ids(1, size), labels))
        assert result["cost"].item() == 0.0
        result["cost"].backward()
        assert all(weight.grad is not None and not weight.grad.any() for weight in twin.parameters())


def segments(boundaries: Boundaries, ids: list[int], backwards: bool) -> list[list[int]]:
    """The places of the tokens of each segment."""
    places = list(reversed(range(len(ids)))) if backwards else list(range(len(ids)))
    row = torch.tensor([[ids[place] for place in places]])
    begins, _ = boundaries(row, make_clock(1, len(ids)), (), backwards=backwards)
    found: list[list[int]] = []
    for place, begun in zip(places, begins[0, :, 0].tolist(), strict=True):
        if begun:
            found.append([])
        found[-1].append(place)
    return [sorted(part) for part in (reversed(found) if backwards else found)]


@pytest.mark.parametrize("rule", ["syllable", "word", "sentence", "line", "paragraph"])
def test_segments_are_the_same_in_both_directions_but_for_what_parts_them(rule):
    text = "To be, or not to be. That's it!\nWhether tis\n\nnobler; he said."
    boundaries = Boundaries([rule], 259, True)
    forwards, backwards = (segments(boundaries, list(text.encode()), way) for way in (False, True))
    if rule == "syllable":
        assert backwards == forwards
    letters = {place for place, letter in enumerate(text) if letter.isalpha()}
    words = [letters.intersection(part) for part in forwards if letters.intersection(part)]
    assert [letters.intersection(part) for part in backwards if letters.intersection(part)] == words
    assert len(words) > (1 if rule == "paragraph" else 2)


def test_words_of_several_tokens_stay_whole_backwards():
    boundaries = Boundaries(["word"], 4, False)
    boundaries.marks.copy_(marks_of([" wiz", "ards", " watch", "es "], ["word"]))
    assert segments(boundaries, [0, 1, 2, 3, 1], backwards=False) == [[0, 1], [2, 3], [4]]
    assert segments(boundaries, [0, 1, 2, 3, 1], backwards=True) == [[0, 1], [2, 3], [4]]


# ---- What is shared, and where credit goes


def test_bottlenecks_are_shared_and_named_once():
    model, twin = with_twin(**VARIANTS["everything"], tie_word_embeddings=False)
    assert twin.stack.forecasters is None
    for own, layer in zip(twin.stack.layers, model.model.layers, strict=True):
        assert own.tower.bottlenecks is layer.tower.bottlenecks
        assert own.slots is None
        assert not hasattr(own, "decision")
        assert not hasattr(own.tower, "selector")
    names = [name for name, _ in model.named_parameters(remove_duplicate=False)]
    assert len(names) == len(dict(model.named_parameters()))
    assert not any("bottlenecks" in name or "embed" in name for name in twin.state_dict())
    assert any(name.endswith("twin.head.weight") for name in names)


@pytest.mark.parametrize("tower", TOWERS)
def test_credit_of_the_model(tower):
    """Values never change. Joint: as without the hook. Reverse: bottlenecks get none. Detached: nor do the tokens."""
    ids = text_ids(1, 40)
    found = {}
    for credit in (None, *CONDITIONINGS):
        model = make_model(**TOWERS[tower]).train()
        for layer in model.model.layers:
            if credit is not None:
                layer.tower.credit = credit
        embedded = model.model.embed_tokens(ids).detach().requires_grad_()
        model.model.embed_tokens.register_forward_hook(lambda module, args, output, e=embedded: e)
        logits = model(ids).logits
        weights = [weight for name, weight in model.named_parameters() if "bottlenecks" not in name]
        learning = [weight for name, weight in model.named_parameters() if "salience" in name or "forget" in name]
        (later,) = torch.autograd.grad(logits[0, 33].square().sum(), embedded, retain_graph=True)
        own = torch.autograd.grad(logits.square().sum(), bottlenecks(model), retain_graph=True, allow_unused=True)
        others = torch.autograd.grad(logits.square().sum(), weights, allow_unused=True)
        found[credit] = (logits.detach(), later[0], own, others, len(learning))
        if learning:
            reached = dict(zip(map(id, weights), others, strict=True))
            assert all(reached[id(weight)] is not None and reached[id(weight)].any() for weight in learning)
    logits, later, own, others, _ = found[None]
    assert all(gradient.any() for gradient in own)
    assert later[:33].any()
    for credit in CONDITIONINGS:
        assert torch.equal(found[credit][0], logits)
        assert (found[credit][1][33] != 0).any()
    assert torch.equal(found["joint"][1], later)
    assert all(map(torch.equal, found["joint"][2], own))
    assert torch.equal(found["reverse"][1], later)
    for a, b in zip(found["reverse"][3], others, strict=True):
        assert (a is None and b is None) or torch.equal(a, b)
    assert not found["detached"][1][:33].any()
    for credit in ("reverse", "detached"):
        assert all(gradient is None or not gradient.any() for gradient in found[credit][2])


@pytest.mark.parametrize("conditioning", CONDITIONINGS)
def test_what_shapes_the_bottlenecks(conditioning):
    """Both losses, or the twin's alone; the same with gradient checkpointing; and it reaches all that trains."""
    fields = {**TOWERS["salience"], "semantic_levels": ["word"], "forgetting": True}
    model, twin = with_twin(conditioning, weight=0.7, **fields)
    ids = text_ids(2, 40)
    by_twin = torch.autograd.grad(twin.losses(lesson(ids))["cost"], bottlenecks(model))
    output = model(ids, labels=ids)
    alone = cross_entropy(output.logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    by_model = torch.autograd.grad(alone, bottlenecks(model), retain_graph=True, allow_unused=True)
    output.loss.backward()
    for weight, twins, models in zip(bottlenecks(model), by_twin, by_model, strict=True):
        assert twins.any()
        if conditioning == "joint":
            assert models.any()
            torch.testing.assert_close(weight.grad, twins + models, rtol=1e-4, atol=1e-8)
        else:
            torch.testing.assert_close(weight.grad, twins, rtol=1e-4, atol=1e-8)
    plain = {name: weight.grad for name, weight in model.named_parameters()}
    assert not [name for name, gradient in plain.items() if gradient is None]

    model.zero_grad()
    getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()  # its newer name
    assert twin.stack.layers[0].gradient_checkpointing
    model(ids, labels=ids).loss.backward()
    for name, weight in model.named_parameters():
        torch.testing.assert_close(weight.grad, plain[name], rtol=1e-6, atol=1e-12)


def test_a_new_twin_does_not_drown_the_model_where_gradients_are_clipped():
    model, ids = DyadForCausalLM(DyadConfig(hidden_size=32, num_hidden_layers=2, num_levels=3)).train(), text_ids(2, 40)

    def norm() -> float:
        model.zero_grad()
        model(ids, labels=ids).loss.backward()
        return torch.nn.utils.get_total_norm([weight.grad for weight in model.parameters()]).item()

    alone = norm()
    model.accompany("twin", Twin(model, TwinOptions("joint")))
    assert alone < norm() < 2 * alone


# ---- Nothing of the twin enters the model's logits


def leaking(model: DyadForCausalLM, twin: Twin) -> DyadForCausalLM:
    """The implementation that design 3 warns of: the reversed stream, put back into order, added to the forward one."""

    def add(module, args, kwargs, output):
        hidden, order, _, _ = twin.read(lesson(kwargs["input_ids"]))
        back = order.argsort(1)[..., None].expand_as(hidden)
        output.last_hidden_state = output.last_hidden_state + hidden.gather(1, back)
        return output

    model.model.register_forward_hook(add, with_kwargs=True)
    return model


def assert_unmoved_by_later_tokens(model: DyadForCausalLM) -> None:
    ids = text_ids(2, 48)
    before = model(ids, labels=ids).logits
    for cut in (1, 5, 16, 31, 47):
        changed = ids.clone()
        changed[0, cut:] = (changed[0, cut:] + 101) % 259
        after = model(changed, labels=changed).logits
        assert torch.equal(after[0, :cut], before[0, :cut])
        assert torch.equal(after[1], before[1])
        assert not torch.equal(after[0, cut:], before[0, cut:])


def assert_no_gradient_from_later_tokens(model: DyadForCausalLM) -> None:
    """By the rows of the embedding: no token comes twice, so that a row is a place, whichever way it is read."""
    ids = torch.randperm(259, generator=torch.Generator().manual_seed(1))[None, :40]
    logits = model(ids, labels=ids).logits
    for t in (0, 1, 15, 30):
        (gradient,) = torch.autograd.grad(logits[0, t].sum(), model.model.embed_tokens.weight, retain_graph=True)
        assert not gradient[ids[0, t + 1 :]].any()
        assert gradient[ids[0, t]].any()


@pytest.mark.parametrize("conditioning", CONDITIONINGS)
def test_logits_are_those_without_a_twin(conditioning):
    fields = {**VARIANTS["everything"], "tie_word_embeddings": False, "selector": "entmax", "selector_margin": 0.0}
    model, _ = with_twin(conditioning, **fields)
    ids = text_ids(2, 48)
    logits = model(ids, labels=ids).logits
    for layer in model.model.layers:
        layer.tower.credit = "joint"
    del model.companions["twin"]
    assert torch.equal(model(ids, labels=ids).logits, logits)
    model.accompany("twin", Twin(model, TwinOptions(conditioning)))
    assert_unmoved_by_later_tokens(model)
    assert_no_gradient_from_later_tokens(model)
    assert "twin_loss" not in (model.eval()(ids, labels=ids).metrics or {})


def test_both_tests_catch_the_reversed_stream_in_the_logits():
    model = leaking(*with_twin(**SMALL, tie_word_embeddings=False))
    with pytest.raises(AssertionError):
        assert_unmoved_by_later_tokens(model)
    with pytest.raises(AssertionError):
        assert_no_gradient_from_later_tokens(model)


def highest_gains(leaky: bool, steps: int = 40, warm_up: int = 25) -> dict[int | None, float]:
    """As in tests/model/test_causality.py: what the model's own cross-entropy gains while the twin trains too."""
    torch.manual_seed(0)
    model = DyadForCausalLM(DyadConfig(hidden_size=32, num_hidden_layers=2, num_levels=3)).train()
    twin = Twin(model, TwinOptions("joint"))
    model.accompany("twin", twin)
    if leaky:
        leaking(model, twin)
    generator = torch.Generator().manual_seed(8)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    totals, highest = dict.fromkeys(DISTANCES, 0.0), dict.fromkeys(DISTANCES, 0.0)
    for step in range(steps):
        streams = [unpredictable(distance, 96, 8, generator) for distance in DISTANCES]
        ids, labels = (torch.cat(parts) for parts in zip(*streams, strict=True))
        output = model(ids, labels=labels)
        nats = cross_entropy(output.logits[:, :-1, :8].mT, labels[:, 1:], reduction="none").detach()
        for row, distance in enumerate(DISTANCES):
            scored = nats[row][labels[row, 1:] != -100]
            totals[distance] += (math.log(8) - scored).sum().item() * (step >= warm_up)
            highest[distance] = max(highest[distance], totals[distance])
        optimizer.zero_grad()
        output.loss.backward()
        optimizer.step()
    assert output.metrics["twin_loss"] < math.log(259) - 2  # it learns
    return highest


def test_nobody_gains_beside_a_twin_and_everybody_by_the_reversed_stream():
    assert max(highest_gains(leaky=False).values()) < LIMIT
    assert min(highest_gains(leaky=True).values()) > LIMIT


# ---- Runs

TWIN = ("twin.conditioning=joint", "twin.weight=0.5")


def logged(result, name):
    return [line[name] for line in result.metrics if name in line]


def test_a_run_with_a_twin_leaves_a_model_like_one_without(tmp_path, small, words, console):
    off = ("max_steps=2", "eval_steps=0", "save_steps=2")
    plain = train(small(tmp_path / "plain", *off), words(), console)
    run = train(small(tmp_path / "run", *off, *TWIN), words(), console)
    assert len(logged(run, "twin_loss")) == 1
    assert logged(run, "cost") == pytest.approx([0.5 * value for value in logged(run, "twin_loss")], rel=1e-5)
    assert not logged(plain, "twin_loss")
    export(run.output, tmp_path / "exported")
    export(plain.output, tmp_path / "plain-exported")
    for folder in (run.output, tmp_path / "exported"):
        other = folder.parent / folder.name.replace("run", "plain").replace("exported", "plain-exported")
        expected = load_file(other / "model.safetensors")
        found = load_file(folder / "model.safetensors")
        assert {name: value.shape for name, value in found.items()} == {n: v.shape for n, v in expected.items()}
        assert (folder / "model.safetensors").stat().st_size == (other / "model.safetensors").stat().st_size
        assert any(not torch.equal(found[name], expected[name]) for name in found)
    assert {file.name for file in (tmp_path / "exported").iterdir()} == {
        file.name for file in (tmp_path / "plain-exported").iterdir()
    }
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "exported").model.layers[0].tower.credit == "joint"


def test_a_resumed_run_gives_the_same_weights_the_twins_too(tmp_path, small, words, console):
    options = ("twin.conditioning=reverse", "eval_steps=0", "max_steps=4")
    whole = train(small(tmp_path / "run", *options), words(), console)
    names = ("model.safetensors", COMPANIONS_NAME)
    expected, begun = ({n: load_file(whole.output / f"checkpoint-{at}" / n) for n in names} for at in (4, 2))
    (whole.output / "checkpoint-4" / "checkpoint.json").unlink()  # as if killed before it was complete
    train(small(whole.output, *options, "logging_steps=1", resume=True), words(), console)
    assert "Going on from" in console.file.getvalue()
    for name in names:
        found = load_file(whole.output / "checkpoint-4" / name)
        assert found.keys() == expected[name].keys()
        assert all(torch.equal(found[key], expected[name][key]) for key in found)
        assert any(not torch.equal(found[key], begun[name][key]) for key in found)


def test_a_step_in_parts_is_the_step_of_one_batch(tmp_path, small, words, console):
    exact = (*TWIN, "model.dropout=0", "train.schedule=constant", "logging_steps=1", "eval_steps=0", "max_steps=2")
    one = train(small(tmp_path / "one", *exact), words(), console)
    halves = ("per_device_train_batch_size=1", "gradient_accumulation_steps=4")
    parts = train(small(tmp_path / "parts", *exact, *halves), words(), console)
    for name in ("loss", "twin_loss", "cost", "grad_norm"):
        assert len(logged(one, name)) == 2
        assert logged(parts, name) == pytest.approx(logged(one, name), rel=1e-4)
