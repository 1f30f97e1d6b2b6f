"""Every family of the zoo is causal, has the size that is asked for, and learns; excluded ones say why they are not."""

from dataclasses import replace

import pytest
import torch

from dyadlm import zoo
from dyadlm.cli import main
from dyadlm.errors import UserError
from dyadlm.zoo.check import check, smallest

# By s5-pytorch and yet-another-retnet.
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:DeprecationWarning")

COMPARED = [name for name, family in zoo.FAMILIES.items() if not family.excluded]


def ready(name: str) -> None:
    if missing := zoo.find_family(name).missing:
        pytest.skip(f"{', '.join(missing)} is not installed")


@pytest.mark.slow
@pytest.mark.parametrize("name", COMPARED)
def test_a_family_is_causal_and_of_the_wanted_size(name):
    ready(name)
    found = check(name, parameters=1_000_000)
    assert not found.faults
    assert abs(found.parameters / 1_000_000 - 1) <= 0.02 or not zoo.find_family(name).sized
    read = {one.name: one.status for one in found.audit.checks}
    assert read["perturbation"] == "passed", read
    assert read["gradient"] == ("passed" if zoo.find_family(name).sized else "not applicable"), read
    assert read["cache"] == "passed" or zoo.find_family(name).decodes == "nothing"


@pytest.mark.parametrize("name", COMPARED)
def test_a_family_learns(name):
    ready(name)
    model = zoo.build(name, length=32, **smallest(zoo.find_family(name))).train()
    ids = torch.randint(0, 256, (2, 24), generator=torch.Generator().manual_seed(0))
    moves = torch.optim.AdamW(model.parameters(), lr=3e-3, fused=True)  # as in training; it refuses complex weights
    losses = []
    for _ in range(4):
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        moves.zero_grad()
        loss.backward()
        moves.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.01


@pytest.mark.parametrize("parameters", [300_000, 3_000_000])
@pytest.mark.parametrize("name", ["dyad", "llama", "mamba2", "gated-delta", "s4d"])
def test_other_sizes_are_met(name, parameters):
    family = zoo.find_family(name)
    sizes = zoo.solve(family, parameters, None, 259, 256)
    assert abs(zoo.count(family, sizes) / parameters - 1) <= 0.02
    assert sizes.width % family.step == 0


def test_the_preset_itself_is_found_at_its_size():
    sizes = zoo.solve(zoo.find_family("dyad"), 1_038_368, None, 259, 256)
    assert (sizes.width, sizes.layers) == (128, 4)


@pytest.mark.parametrize(("name", "parameters", "width"), [("xlstm", 1_000_000, 128), ("retnet", 300_000, 64)])
def test_of_two_widths_the_better_shaped_model_is_taken(name, parameters, width):
    """Within 2 %: of 64 and 128, xlstm would otherwise have feed-forward parts of 14 times the width."""
    ready(name)
    assert zoo.solve(zoo.find_family(name), parameters, None, 259, 256).width == width


def test_the_seed_draws_the_weights():
    first, again, other = (zoo.build("linear", length=32, width=32, layers=1, seed=seed) for seed in (0, 0, 1))
    for a, b, c in zip(first.parameters(), again.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)
        assert a.dim() < 2 or not torch.equal(a, c)


def test_excluded_families_say_why(capsys):
    for name, family in zoo.FAMILIES.items():
        assert bool(family.excluded) == (family.build is None), name
        if family.excluded:
            with pytest.raises(UserError, match=f"{name} is not compared: "):
                zoo.build(name, length=32, width=32)
    with pytest.raises(SystemExit) as ended:
        main(["zoo", "list"])
    assert not ended.value.code
    shown = capsys.readouterr().out
    assert all(name in shown for name in zoo.FAMILIES)


def test_what_is_missing_is_named(monkeypatch):
    monkeypatch.setattr("dyadlm.zoo.family.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"mamba needs mambapy; run: pip install 'dyadlm\[zoo\]'"):
        zoo.build("mamba", length=32, width=32)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["check", "lama"], "There is no family 'lama'; the nearest is llama"),
        (["check", "linformer"], "linformer is not compared: "),
        (["check"], "Missing argument"),
    ],
)
def test_wrong_requests(arguments, message, capsys):
    with pytest.raises(SystemExit) as ended:
        main(["zoo", *arguments])
    assert ended.value.code == 2
    assert message in capsys.readouterr().err


def test_a_name_is_given_once():
    zoo.register_family(zoo.find_family("llama"))  # the same again
    with pytest.raises(UserError, match="'llama' already"):
        zoo.register_family(replace(zoo.find_family("mamba"), name="llama"))


@pytest.mark.slow
@pytest.mark.parametrize("name", COMPARED)
def test_a_family_reads_a_long_context_however_short_its_texts_were(name):
    ready(name)
    model = zoo.build(name, length=16, width=32, layers=2).eval()
    with torch.no_grad():
        logits = model(input_ids=torch.zeros(1, 1024 + 16, dtype=torch.long), use_cache=False).logits
    assert torch.isfinite(logits).all()


def test_too_small_a_model_is_refused():
    with pytest.raises(UserError, match="more than 1,000 parameters"):
        zoo.solve(zoo.find_family("llama"), 1_000, None, 259, 256)
