"""The goldfish loss: the same passage loses the same targets wherever it stands, one in k of all."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dyadlm.train import train
from dyadlm.train.goldfish import CONTEXT, GoldfishWindows, context_hashes
from dyadlm.train.prepared_run import prepare_run


class Windows:
    """One window of given tokens."""

    def __init__(self, tokens, labels=None):
        self.tokens = torch.as_tensor(tokens)
        self.labels = self.tokens.clone() if labels is None else labels

    def __len__(self):
        return 1

    def __getitem__(self, number):
        return {"input_ids": self.tokens, "labels": self.labels, "index": torch.arange(len(self.tokens))}


def dropped(tokens, k):
    return (GoldfishWindows(Windows(tokens), k)[0]["labels"] == -100).numpy()


def slow_hash(before):
    """The definition, one number after the other; before: the tokens before a target, at most 13."""
    total = 0
    for distance, token in enumerate(reversed(before), start=1):
        total += (token + 1) * 6364136223846793005**distance
    total %= 2**64
    total = (total ^ (total >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    total = (total ^ (total >> 27)) * 0x94D049BB133111EB % 2**64
    return total ^ (total >> 31)


@given(tokens=st.lists(st.integers(0, 2**31 - 1), min_size=2, max_size=40), k=st.integers(2, 9))
@settings(deadline=None)
def test_labels_are_dropped_as_a_slow_loop_says(tokens, k):
    expected = [slow_hash(tokens[max(0, at - 13) : at]) for at in range(len(tokens))]
    assert context_hashes(np.array(tokens)).tolist() == expected
    assert dropped(tokens, k).tolist() == [value % k == 0 for value in expected]


@given(seed=st.integers(0, 2**32), first=st.integers(0, 30), second=st.integers(0, 30))
@settings(deadline=None, max_examples=30)
def test_a_passage_loses_the_same_targets_at_two_places(seed, first, second):
    random = np.random.default_rng(seed)
    passage = random.integers(256, size=80)
    places = [np.concatenate([random.integers(256, size=before), passage]) for before in (first, second)]
    one, other = (dropped(tokens, 3)[-80 + CONTEXT :] for tokens in places)
    assert one.tolist() == other.tolist()
    assert one.any()
    changed = passage.copy()
    changed[40] += 1
    differs = dropped(changed, 3) != dropped(passage, 3)
    assert set(np.flatnonzero(differs)) <= set(range(41, 41 + CONTEXT))


@pytest.mark.parametrize("k", [2, 3, 4, 16])
@pytest.mark.parametrize("symbols", [2, 256, 50_000])
def test_one_target_in_k_is_dropped(k, symbols):
    tokens = np.random.default_rng(k).integers(symbols, size=20_000)
    hashes = context_hashes(tokens)[CONTEXT:]
    different = len(np.unique(hashes))  # of two symbols, contexts come again
    share = np.mean(hashes[np.unique(hashes, return_index=True)[1]] % np.uint64(k) == 0)
    assert abs(share - 1 / k) < 4 * (1 / k / different) ** 0.5


def test_labels_alone_are_touched_and_those_without_a_target_stay():
    tokens = torch.randint(256, (200,))
    labels = tokens.clone()
    labels[::5] = -100
    base = Windows(tokens, labels)
    item = GoldfishWindows(base, 4)[0]
    assert torch.equal(item["labels"], torch.where(torch.from_numpy(dropped(tokens, 4)), -100, labels))
    assert torch.equal(base.labels, labels)
    assert torch.equal(item["labels"] == -100, (item["labels"] != tokens))
    assert all(torch.equal(item[name], base[0][name]) for name in ("input_ids", "index"))


@pytest.mark.parametrize("kind", ["dyadlm", "llama"])
def test_a_run_learns_from_the_others_and_is_validated_on_all(tmp_path, small, words, console, llama, kind):
    model = {"model": llama} if kind == "llama" else {}
    options = ("logging_steps=1", "eval_steps=1", "max_steps=1", "learning_rate=1e-30", "save_steps=1")
    options += () if model else ("model.dropout=0",)
    runs = [
        train(small(tmp_path / name, *options, *more, **model), words(), console)
        for name, more in (("gold", ("train.goldfish=3",)), ("plain", ()))
    ]
    plan = prepare_run(small(tmp_path / "plan", *options, "train.goldfish=3", **model), words(), tmp_path / "plan")
    batch = [plan.windows[number] for number in range(4)]
    ids, labels = (torch.stack([item[name] for item in batch]) for name in ("input_ids", "labels"))
    assert 0.2 < (labels[:, 1:] == -100).float().mean() < 0.5
    with torch.no_grad():
        loss = plan.model(ids, labels=labels).loss.item()
    gold, plain = ([line["loss"] for line in run.metrics if "loss" in line] for run in runs)
    assert gold == pytest.approx([loss], rel=1e-4)
    assert gold != pytest.approx(plain, rel=1e-6)
    assert runs[0].validation_loss == pytest.approx(runs[1].validation_loss, rel=1e-6)
