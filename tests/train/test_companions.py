"""What trains beside a model is refused where it cannot, kept in checkpoints, and never published."""

import json
import re

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from dyadlm import DyadConfig, DyadForCausalLM, UserError
from dyadlm.accounting import parameters
from dyadlm.model.extension import AuxiliaryModule
from dyadlm.train import train
from dyadlm.train.companions import COMPANIONS_NAME, load_companions, published_parameters, save_companions
from dyadlm.train.fingerprint import Fingerprint
from dyadlm.train.planner import PlannerLessons
from dyadlm.train.prepared_run import prepare_run
from dyadlm.train.settings import PlannerOptions, TwinOptions
from dyadlm.train.twin import Twin

ON = ("twin.conditioning=joint",)


class Nudge(AuxiliaryModule):
    """Adds a learned vector where `marked` says so, and is told all that the model was."""

    def __init__(self, width: int = 16):
        super().__init__()
        self.vector = torch.nn.Parameter(torch.randn(width))
        self.told = []

    def embed(self, extra):
        return extra["marked"][..., None] * self.vector if "marked" in extra else None

    def losses(self, lesson):
        self.told.append(lesson)
        return {"nudge": lesson.hidden.square().mean().detach(), "cost": 0.1 * self.vector.square().sum()}


@pytest.fixture
def model() -> DyadForCausalLM:
    return DyadForCausalLM(DyadConfig(hidden_size=16, num_hidden_layers=2, num_levels=3))


IDS = torch.arange(20).view(2, 10)


def test_companions_are_called_in_training_alone(model):
    before = model.train()(IDS, labels=IDS)
    assert before.metrics is None
    nudge = Nudge()
    model.accompany("nudge", nudge)
    marked = (IDS % 3 == 0).float()
    mask = torch.ones_like(IDS)
    output = model(IDS, labels=IDS, attention_mask=mask, marked=marked)
    (lesson,) = nudge.told
    assert lesson.input_ids is IDS
    assert lesson.labels is IDS
    assert lesson.attention_mask is mask
    assert lesson.position_ids is None
    assert lesson.extra.keys() == {"marked"}
    assert lesson.hidden.shape == (2, 10, 16)
    assert not torch.equal(output.logits, before.logits)
    assert torch.equal(output.logits[0, 0] != before.logits[0, 0], marked[0, 0].bool().expand(259))
    cost = 0.1 * nudge.vector.square().sum()
    labels_alone = torch.nn.functional.cross_entropy(output.logits[:, :-1].flatten(0, 1), IDS[:, 1:].flatten())
    torch.testing.assert_close(output.loss, labels_alone + cost)
    torch.testing.assert_close(output.metrics["cost"], cost)
    assert output.metrics["nudge"] > 0

    model(IDS)  # no lesson without labels
    evaluated = model.eval()(IDS, labels=IDS, marked=marked)
    assert len(nudge.told) == 1
    assert torch.equal(evaluated.logits, before.logits)
    assert evaluated.metrics is None


def test_what_is_saved_has_no_companions(model, tmp_path):
    plain = {name: value.clone() for name, value in model.state_dict().items()}
    model.save_pretrained(tmp_path / "plain")
    model.accompany("nudge", Nudge())
    model.accompany("second", Nudge())
    model.save_pretrained(tmp_path / "accompanied")
    files = [tmp_path / folder / "model.safetensors" for folder in ("plain", "accompanied")]
    assert files[0].read_bytes() == files[1].read_bytes()
    loaded, report = AutoModelForCausalLM.from_pretrained(tmp_path / "accompanied", output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert not loaded.companions
    assert all(torch.equal(value, plain[name]) for name, value in loaded.state_dict().items())
    assert published_parameters(model) == published_parameters(loaded) == parameters(model.config)
    assert sum(weight.numel() for weight in model.parameters()) == parameters(model.config) + 2 * 16


def test_companions_are_kept_in_a_file_of_their_own(model, tmp_path):
    save_companions(model, tmp_path)
    load_companions(model, tmp_path)
    assert not list(tmp_path.iterdir())
    nudge = Nudge()
    model.accompany("nudge", nudge)
    save_companions(model, tmp_path)
    kept = load_file(tmp_path / COMPANIONS_NAME)
    assert kept.keys() == {"nudge.vector"}
    with torch.no_grad():
        nudge.vector.zero_()
    load_companions(model, tmp_path)
    assert torch.equal(nudge.vector, kept["nudge.vector"])


def test_where_companions_cannot_train_the_run_is_refused(tmp_path, small, words, llama):
    for sort, options, message in (
        (ON, {"model": llama}, r"twin\.\* is for dyadlm models alone, not for LlamaForCausalLM; leave it out"),
        ((*ON, "fsdp=true"), {}, r"inside the model's blocks\); leave fsdp out, or set twin\.conditioning=off"),
        (
            ("fingerprint.shown=true", "fsdp=true"),
            {},
            r"file of its own.* or set fingerprint\.shown=false",
        ),
        (("model.planner=head", "fsdp=true"), {}, r"outside that block\); leave fsdp out, or .* model\.planner=none"),
    ):
        with pytest.raises(UserError, match=message):
            prepare_run(small(tmp_path / "run", *sort, **options), words(), tmp_path / "run")


@pytest.mark.parametrize(
    ("told", "switch"),
    [
        ("twin.weight=3", "twin.conditioning"),
        ("fingerprint.dropout=0", "fingerprint.shown"),
        ("planner.artist=0.5", "model.planner"),
        ("planner.teacher_until=0.9", "planner.teacher"),
    ],
)
def test_what_is_told_to_a_companion_that_there_is_not_is_refused(tmp_path, small, words, told, switch):
    with pytest.raises(UserError, match=f"does nothing without {switch}; set {switch} too, or leave it out"):
        prepare_run(small(tmp_path / "run", told), words(), tmp_path / "run")


def test_fingerprints_that_are_never_shown_are_refused(tmp_path, small, words):
    for name in ("dropout", "token_dropout", "cooldown"):
        with pytest.raises(UserError, match=f"fingerprint.{name} must be 0 or more and below 1"):
            small(tmp_path / "run", "fingerprint.shown=true", f"fingerprint.{name}=1")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_companions_follow_the_model_they_accompany(dtype):
    config = DyadConfig.from_preset("tiny", hidden_size=16, num_hidden_layers=2, planner="head", planner_width=4)
    model = DyadForCausalLM(config).to(dtype).train()
    model.accompany("twin", Twin(model, TwinOptions("joint")))
    model.accompany("fingerprint", Fingerprint(config, tags=False))
    model.accompany("planner", PlannerLessons(model, PlannerOptions(teacher=0.5)))
    ids = torch.randint(0, 256, (2, 24))
    output = model(ids, labels=ids, index=torch.arange(48).view(2, 24))
    output.loss.backward()
    assert output.logits.dtype == dtype
    assert {weight.dtype for weight in model.companions.parameters()} == {dtype}
    assert all(weight.grad is not None for weight in model.companions.parameters())


def test_what_companions_cannot_follow_is_refused():
    config = DyadConfig.from_preset(
        "tiny", hidden_size=16, num_hidden_layers=2, semantic_levels=[], slot_contexts=[], num_levels=3
    )
    model = DyadForCausalLM(config).train()
    model.accompany("twin", Twin(model, TwinOptions("joint")))
    with pytest.raises(UserError, match="twin beside this model would keep the old vocabulary; resize before"):
        model.resize_token_embeddings(300)
    assert model.resize_token_embeddings().num_embeddings == config.vocab_size
    ids = torch.randint(0, 256, (2, 8))
    embeds = model.model.embed_tokens(ids)
    with pytest.raises(UserError, match="reads input_ids, not inputs_embeds"):
        model(inputs_embeds=embeds, labels=ids)
    assert model.eval()(inputs_embeds=embeds, labels=ids).loss.isfinite()


def test_no_companion_leaves_no_trace(tmp_path, small, words, console):
    run = train(small(tmp_path / "run", "max_steps=2", "eval_steps=0"), words(), console)
    assert not (run.checkpoint / COMPANIONS_NAME).exists()
    assert not prepare_run(small(tmp_path / "other"), words(), tmp_path / "other").model.companions


def test_checkpoints_hold_companions_and_what_is_published_does_not(tmp_path, small, words, console):
    options = ("max_steps=2", "eval_steps=0")
    run = train(small(tmp_path / "run", *options, *ON), words(), console)
    model = AutoModelForCausalLM.from_pretrained(run.output)
    assert (run.checkpoint / COMPANIONS_NAME).is_file()
    assert not (run.output / COMPANIONS_NAME).exists()
    assert not any("companion" in name for name in load_file(run.checkpoint / "model.safetensors"))
    (shown,) = re.findall(r"\| Parameters \| ([\d,]+) \|", (run.output / "README.md").read_text())
    assert int(shown.replace(",", "")) == parameters(model.config)

    # Another set of companions is another run.
    with pytest.raises(UserError, match=r"another set of companions.*resume with the settings it was started with"):
        train(small(run.output, *options, "twin.conditioning=off", "max_steps=3", resume=True), words(), console)
    manifest = json.loads((run.checkpoint / "checkpoint.json").read_text())
    assert COMPANIONS_NAME in manifest["files"]
