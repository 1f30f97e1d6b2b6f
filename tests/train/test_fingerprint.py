"""Fingerprints: codes that are never shared, a dropout of their own, and nothing of them where they are not shown."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from dyadlm import DyadConfig, DyadForCausalLM, UserError
from dyadlm.data import TrainingWindows
from dyadlm.data.canaries import PlantedWindows, plan_canaries
from dyadlm.train import train
from dyadlm.train.fingerprint import INDEX_BITS, TAG_BITS, DigitEmbedding, Fingerprint, FingerprintedWindows, digits
from dyadlm.train.prepared_run import prepare_run
from dyadlm.train.settings import FingerprintOptions

pytestmark = pytest.mark.slow

SHOWN = ("fingerprint.shown=true", "fingerprint.dropout=0.4", "fingerprint.token_dropout=0.2")
EDGES = [0, 1, -1, -2, 2**63 - 1, -(2**63), 2**62, 2**31, -(2**32), 1023, 1024]
ANY = st.one_of(st.sampled_from(EDGES), st.integers(-(2**63), 2**63 - 1))


def signed(number: int) -> int:
    return (number + 2**63) % 2**64 - 2**63


@pytest.mark.parametrize("bits", [INDEX_BITS, TAG_BITS])
@given(number=ANY)
@settings(deadline=None)
def test_every_number_comes_back_from_its_digits(bits, number):
    found = [int(digit) for digit in digits(torch.tensor([number]), bits)]
    assert sum(bits) == 64
    value, place = 0, 1
    for digit, width in zip(found, bits, strict=True):
        assert 0 <= digit < 2**width
        value, place = value + digit * place, place * 2**width
    assert signed(value) == number


@pytest.mark.parametrize("bits", [INDEX_BITS, TAG_BITS])
@given(number=ANY, bit=st.integers(0, 63))
@settings(deadline=None)
def test_numbers_that_differ_in_one_bit_differ_in_one_digit(bits, number, bit):
    pair = torch.tensor([number, signed(number ^ (1 << bit))])
    assert sum(int(digit[0] != digit[1]) for digit in digits(pair, bits)) == 1


def test_unsigned_numbers_are_the_signed_ones_of_the_same_bits():
    numbers = torch.tensor([0, 2**63, 2**64 - 1], dtype=torch.uint64)
    same = torch.tensor([0, -(2**63), -1])
    assert all(torch.equal(*pair) for pair in zip(digits(numbers, INDEX_BITS), digits(same, INDEX_BITS), strict=True))


def test_a_vector_is_the_sum_of_its_digits_entries():
    embed = DigitEmbedding(INDEX_BITS, 3)
    numbers = torch.tensor([-5, 123_456_789_012])
    for number, vector in zip(numbers, embed(numbers), strict=True):
        entries = [
            table.weight[int(digit)] for table, digit in zip(embed.tables, digits(number, INDEX_BITS), strict=True)
        ]
        torch.testing.assert_close(vector, torch.stack(entries).sum(0))
    assert len(embed(torch.tensor(EDGES)).unique(dim=0)) == len(EDGES)
    assert sum(table.num_embeddings for table in embed.tables) < 3000


# ---- In a model


def shown_model(tags=True, **fields):
    """A model of awake blocks, in which fingerprints are as loud as tokens."""
    torch.manual_seed(0)
    config = DyadConfig.from_preset("tiny", hidden_size=16, num_hidden_layers=2, dropout=0.0, **fields)
    model = DyadForCausalLM(config)
    model.accompany("fingerprint", Fingerprint(config, tags))
    with torch.no_grad():
        for weight in model.parameters():
            weight += 0.3 * torch.randn_like(weight)
    return model


def seen(batch, time, seed=0):
    """Tokens and what the collator sends beside them."""
    draw = torch.Generator().manual_seed(seed)
    ids = torch.randint(256, (batch, time), generator=draw)
    extra = {
        "index": torch.randint(2**40, (batch, time), generator=draw),
        "tags": torch.randint(-(2**63), 2**63 - 1, (batch, time, 3), generator=draw),
        "shown": torch.rand(batch, time, generator=draw) < 0.6,
    }
    return ids, extra


def test_what_is_not_shown_is_exactly_nothing():
    model = shown_model()
    _, extra = seen(2, 9)
    added = model.companions["fingerprint"].embed(extra)
    assert added[extra["shown"]].abs().min() > 0
    assert not added[~extra["shown"]].any()
    everything = model.companions["fingerprint"].embed({name: extra[name] for name in ("index", "tags")})
    assert torch.equal(everything[extra["shown"]], added[extra["shown"]])
    assert everything.all()
    assert model.companions["fingerprint"].embed({"tags": extra["tags"]}) is None


@pytest.mark.parametrize("part", [0, 1, 2, 3])
def test_index_and_each_tag_are_told_by_tables_of_their_own(part):
    fingerprint = shown_model().companions["fingerprint"]
    _, extra = seen(1, 4)
    extra["shown"][:] = True
    other = {name: value.clone() for name, value in extra.items()}
    if part == 0:
        other["index"] += 1
    else:
        other["tags"][..., part - 1] += 1
    tables = [fingerprint.index, *fingerprint.tags][part]
    numbers = (extra["index"], *extra["tags"].unbind(-1))[part][0]
    moved = fingerprint.embed(other) - fingerprint.embed(extra)
    torch.testing.assert_close(moved[0], tables(numbers + 1) - tables(numbers))
    assert moved.any()


def test_evaluation_knows_nothing_of_them():
    model = shown_model()
    ids, extra = seen(2, 12)
    with torch.no_grad():
        told = model(ids, **extra).logits
        assert not torch.allclose(told, model(ids).logits)
        extra["shown"][:] = False
        plain = model(ids).logits
        assert torch.equal(model(ids, **extra).logits, plain)  # dropped is as if there were none, not scaled
        extra["shown"][:] = True
        model.eval()
        assert torch.equal(model(ids, **extra).logits, model(ids).logits)
        torch.testing.assert_close(model(ids).logits, plain)


def test_they_are_no_target_and_cost_nothing():
    model = shown_model()
    ids, extra = seen(2, 12)
    out = model(ids, labels=ids, **extra)
    assert "cost" not in (out.metrics or {})
    assert out.metrics["fingerprint_shown"] == pytest.approx(extra["shown"].float().mean().item())
    expected = torch.nn.functional.cross_entropy(out.logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    torch.testing.assert_close(out.loss, expected)


@pytest.mark.parametrize("cut", [1, 6, 11])
def test_no_logit_depends_on_a_later_fingerprint(cut):
    model = shown_model()
    ids, extra = seen(2, 12)
    extra["shown"][:] = True
    _, others = seen(2, 12, seed=1)
    changed = {name: torch.cat([extra[name][:, :cut], others[name][:, cut:]], 1) for name in extra}
    before, after = model(ids, **extra).logits, model(ids, **changed).logits
    assert torch.equal(before[:, :cut], after[:, :cut])
    assert not torch.allclose(before[:, cut:], after[:, cut:])
    # By gradient: the entry that token `cut` alone reads.
    later = torch.zeros_like(extra["index"])
    later[:, cut] = 5
    table = model.companions["fingerprint"].index.tables[0].weight
    logits = model(ids, **extra | {"index": later}).logits
    (early,) = torch.autograd.grad(logits[:, :cut].square().sum(), table, retain_graph=True)
    (late,) = torch.autograd.grad(logits[:, cut:].square().sum(), table)
    assert not early[5].any()
    assert late[5].any()


def test_packed_and_padded_rows_are_as_alone():
    model = shown_model()
    ids, extra = seen(1, 7)
    more, beside = seen(1, 5, seed=1)
    with torch.no_grad():
        alone = model(ids, **extra).logits
        packed = {name: torch.cat([beside[name], extra[name]], 1) for name in extra}
        positions = torch.tensor([[0, 1, 2, 3, 4, 0, 1, 2, 3, 4, 5, 6]])
        logits = model(torch.cat([more, ids], 1), position_ids=positions, **packed).logits
        torch.testing.assert_close(logits[:, 5:], alone)
        mask = torch.tensor([[0] * 5 + [1] * 7])
        torch.testing.assert_close(model(torch.cat([more, ids], 1), attention_mask=mask, **packed).logits[:, 5:], alone)
        packed = {name: torch.cat([extra[name], beside[name]], 1) for name in extra}
        logits = model(torch.cat([ids, more], 1), attention_mask=mask.flip(1), **packed).logits
        torch.testing.assert_close(logits[:, :7], alone)


# ---- Which tokens show theirs


class Windows:
    """Windows of zeros."""

    def __init__(self, count, length):
        self.count, self.length = count, length

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        return {"input_ids": torch.zeros(self.length, dtype=torch.int64)}


@pytest.mark.parametrize(("dropout", "token_dropout"), [(0.5, 0.1), (0.75, 0.0), (0.9, 0.5), (0.0, 0.3)])
def test_sequences_and_tokens_are_dropped_as_often_as_told(dropout, token_dropout):
    options = FingerprintOptions(dropout=dropout, token_dropout=token_dropout, cooldown=0.0)
    windows = FingerprintedWindows(Windows(1000, 50), options, seed=1)
    shown = torch.stack([windows[number]["shown"] for number in range(1000)])
    some = shown.any(1)
    assert abs(some.float().mean() - (1 - dropout)) <= 4 * (dropout * (1 - dropout) / 1000) ** 0.5
    tokens = shown[some].float()
    spread = 4 * (token_dropout * (1 - token_dropout) / tokens.numel()) ** 0.5
    assert abs(tokens.mean() - (1 - token_dropout)) <= spread + 1e-7
    assert (token_dropout == 0) == bool(tokens.all())


def test_the_draw_depends_on_seed_and_number_alone():
    options = FingerprintOptions(dropout=0.5)
    windows, again = (FingerprintedWindows(Windows(count, 30), options, seed=3) for count in (200, 400))
    backwards = {number: again[number]["shown"] for number in reversed(range(150))}
    shown = [windows[number]["shown"] for number in range(150)]
    assert all(torch.equal(shown[number], backwards[number]) for number in range(150))
    assert any(not torch.equal(one, other) for one, other in pairwise(s for s in shown if s.any()))
    other = FingerprintedWindows(Windows(200, 30), options, seed=4)
    assert [bool(s.any()) for s in shown] != [bool(other[n]["shown"].any()) for n in range(150)]


@pytest.mark.parametrize(("cooldown", "last"), [(0.0, 200), (0.1, 180), (0.25, 150), (0.999, 0)])
def test_the_end_of_training_goes_without(cooldown, last):
    options = FingerprintOptions(dropout=0.0, token_dropout=0.0, cooldown=cooldown)
    windows = FingerprintedWindows(Windows(200, 5), options, seed=0)
    shown = [windows[number]["shown"] for number in range(200)]
    assert all(window.all() for window in shown[:last])
    assert not any(window.any() for window in shown[last:])


def test_planted_canaries_keep_the_place_they_were_written_over(words):
    data = words()
    base = TrainingWindows(data.train, 40, 85, with_index=True, with_tags=True, lanes=5)
    plan = plan_canaries(1, 0, data.tokenizer, 85, 40)
    windows = FingerprintedWindows(PlantedWindows(base, plan), FingerprintOptions(), seed=0)
    number = plan.members[0].windows[0]
    assert not torch.equal(windows[number]["input_ids"], base[number]["input_ids"])
    assert all(torch.equal(windows[number][name], base[number][name]) for name in ("index", "tags", "position_ids"))


# ---- In a run


def logged(result, name):
    return [line[name] for line in result.metrics if name in line]


def test_a_resumed_run_shows_what_it_would_have_shown(tmp_path, small, words, console):
    """Bit-equal, with dropout, canaries, goldfish and lanes beside it."""
    options = (
        *SHOWN, "data.canaries=1", "per_device_train_batch_size=16", "data.sequence_length=26", "eval_steps=0",
        "train.goldfish=4", "train.carry_state=true", "fingerprint.cooldown=0.35", "model.num_hidden_layers=1",
    )  # fmt: skip
    whole = train(small(tmp_path / "whole", *options), words(), console)
    parts = tmp_path / "parts"
    train(small(parts, *options, "save_total_limit=null"), words(), console)
    for step in (4, 6):
        (parts / f"checkpoint-{step}" / "checkpoint.json").unlink()  # as if killed before they were complete
    train(small(parts, *options, "logging_steps=1", resume=True), words(), console)
    for name in ("model.safetensors", "companions.safetensors"):
        found, expected = (load_file(run / "checkpoint-6" / name) for run in (parts, tmp_path / "whole"))
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[key], expected[key]) for key in expected)
    shown = logged(whole, "fingerprint_shown")
    assert shown[0] > 0
    assert shown[2] == 0  # the cooldown


def test_what_is_exported_is_no_larger(tmp_path, small, words, console):
    sizes = []
    for name, options in (("with", SHOWN), ("without", ())):
        result = train(small(tmp_path / name, *options, "max_steps=2"), words(), console)
        weights = load_file(result.output / "model.safetensors")
        assert not [key for key in weights if "fingerprint" in key]
        sizes.append((result.output / "model.safetensors").stat().st_size)
        assert (result.output / "checkpoint-2" / "companions.safetensors").exists() == (name == "with")
    assert sizes[0] == sizes[1]


def test_a_step_in_parts_is_the_step_of_one_batch(tmp_path, small, words, console):
    steady = (
        *SHOWN,
        "model.dropout=0",
        "model.num_hidden_layers=1",
        "adam_epsilon=1e-4",
        "logging_steps=1",
        "max_steps=3",
        "eval_steps=0",
    )
    one = train(small(tmp_path / "one", *steady), words(), console)
    halves = ("per_device_train_batch_size=2", "gradient_accumulation_steps=2", "gradient_checkpointing=true")
    parts = train(small(tmp_path / "parts", *steady, *halves), words(), console)
    for name in ("loss", "grad_norm", "fingerprint_shown"):
        assert logged(parts, name) == pytest.approx(logged(one, name), rel=1e-4)
        assert len(logged(one, name)) == 3


def test_runs_say_what_they_cannot_do(tmp_path, small, words, console, llama):
    with pytest.raises(UserError, match=r"fingerprint\.\* is for dyadlm models alone"):
        prepare_run(small(tmp_path / "run", "fingerprint.shown=true", model=llama), words(), tmp_path / "run")
    with pytest.raises(UserError, match="FSDP"):
        prepare_run(small(tmp_path / "run", "fingerprint.shown=true", "fsdp=true"), words(), tmp_path / "run")
    train(small(tmp_path / "run", "max_steps=2"), words(), console)
    with pytest.raises(UserError, match=r"another set of companions"):
        train(small(tmp_path / "run", *SHOWN, "max_steps=4", resume=True), words(), console)
    plain = prepare_run(small(tmp_path / "other"), words(), tmp_path / "other")
    assert plain.windows[0].keys() == {"input_ids", "labels"}  # off costs nothing
    assert not plain.model.companions


def test_other_tags_are_another_run_that_leaves_this_one_as_it_was(tmp_path, small, words, console):
    options = (*SHOWN, "eval_steps=0")
    for name, started, other in (("with", "true", "false"), ("without", "false", "true")):
        run = tmp_path / name
        train(small(run, *options, f"fingerprint.tags={started}", "max_steps=2"), words(), console)
        before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
        with pytest.raises(UserError, match=r"another set of companions \(fingerprint.* there, fingerprint.* here\)"):
            train(small(run, *options, f"fingerprint.tags={other}", "max_steps=3", resume=True), words(), console)
        assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before
        settings = type(small(run)).create(run, resume=True, assignments=["max_steps=3"])
        assert train(settings, words(), console).steps == 3


def test_tags_are_left_out_if_asked(tmp_path, small, words):
    plan = prepare_run(small(tmp_path, *SHOWN, "fingerprint.tags=false"), words(), tmp_path)
    assert plan.windows[0].keys() == {"input_ids", "labels", "index", "shown"}
    plan.model.train()(**{name: value[None] for name, value in plan.windows[0].items()})
