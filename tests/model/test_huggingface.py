"""What a Hugging Face user expects of a causal language model."""

import warnings
from copy import deepcopy

import pytest
import torch
import transformers
from safetensors.torch import save_file
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    DataCollatorWithFlattening,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Trainer,
    TrainingArguments,
    pipeline,
)

from dyadlm import DyadCache, DyadConfig, DyadForCausalLM, UserError
from dyadlm.accounting import parameters
from dyadlm.data import byte_tokenizer
from dyadlm.model.cache import signature_of
from dyadlm.model.configuration import LEVEL_FEATURES
from dyadlm.model.trace import level_contributions
from dyadlm.train.planner import PlannerLessons
from dyadlm.train.settings import PlannerOptions

from .conftest import VARIANTS, make_model, random_ids, text_ids


def generate(model, ids, mask=None, **options):
    torch.manual_seed(11)
    options = {"max_new_tokens": 20, "do_sample": False, "eos_token_id": None, "pad_token_id": 256, **options}
    mask = torch.ones_like(ids) if mask is None else mask
    return model.generate(ids, attention_mask=mask, **options)


MODES = {
    "greedy": {},
    "sampling": {"do_sample": True, "top_k": 20, "top_p": 0.9, "temperature": 0.8},
    "beams": {"num_beams": 4},
    "beam sampling": {"num_beams": 3, "do_sample": True},
    "several": {"do_sample": True, "num_return_sequences": 3},
    "beams returned": {"num_beams": 4, "num_return_sequences": 3},
    "penalties": {"repetition_penalty": 1.3, "no_repeat_ngram_size": 2},
}


@pytest.mark.parametrize("mode", MODES)
def test_generate_with_the_state_equals_generate_without(mode):
    model, ids = make_model(), random_ids(2, 21)
    with_state = generate(model, ids, use_cache=True, **MODES[mode])
    assert torch.equal(with_state, generate(model, ids, use_cache=False, **MODES[mode]))
    assert with_state.shape[1] == 41


@pytest.mark.parametrize("mode", ["greedy", "beams"])
def test_left_padded_batches_generate_what_each_row_does_alone(mode):
    model = make_model()
    rows = [random_ids(1, n, seed=n) for n in (5, 18, 30)]
    ids, mask = torch.full((3, 30), 256), torch.zeros(3, 30, dtype=torch.long)
    for b, row in enumerate(rows):
        ids[b, 30 - row.shape[1] :], mask[b, 30 - row.shape[1] :] = row[0], 1
    together = generate(model, ids, mask, **MODES[mode])
    for b, row in enumerate(rows):
        assert torch.equal(together[b, 30:], generate(model, row, **MODES[mode])[0, row.shape[1] :])


def test_generation_continues_from_a_returned_state():
    model, ids = make_model(), random_ids(2, 12)
    once = generate(model, ids, max_new_tokens=30)
    first = generate(model, ids, max_new_tokens=12, return_dict_in_generate=True)
    assert isinstance(first.past_key_values, DyadCache)
    second = generate(model, first.sequences, max_new_tokens=18, past_key_values=first.past_key_values)
    assert torch.equal(second, once)


def test_the_first_token_can_come_from_embeddings():
    model, ids = make_model(), random_ids(1, 9)
    embedded = model.get_input_embeddings()(ids)
    out = model.generate(inputs_embeds=embedded, max_new_tokens=6, do_sample=False, eos_token_id=None, pad_token_id=256)
    assert torch.equal(out, generate(model, ids, max_new_tokens=6)[:, 9:])


def test_assisted_decoding_is_refused_rather_than_wrong():
    model = make_model()
    with pytest.raises(ValueError, match="stateful"):
        generate(model, random_ids(1, 5), assistant_model=make_model(seed=1))


def test_save_and_load_through_the_auto_classes(tmp_path):
    model = make_model(torch.float32)
    model.save_pretrained(tmp_path)
    assert {p.name for p in tmp_path.iterdir()} == {"config.json", "generation_config.json", "model.safetensors"}
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert isinstance(loaded, DyadForCausalLM)
    ids = random_ids(2, 30)
    assert torch.equal(loaded(ids).logits, model(ids).logits)
    config = AutoConfig.from_pretrained(tmp_path)
    assert isinstance(config, DyadConfig)
    assert config.to_dict() == loaded.config.to_dict()


def test_weights_are_tied_unless_told_otherwise(tmp_path):
    tied = make_model(torch.float32)
    assert tied.lm_head.weight is tied.model.embed_tokens.weight
    untied = make_model(torch.float32, tie_word_embeddings=False)
    assert untied.lm_head.weight is not untied.model.embed_tokens.weight
    untied.save_pretrained(tmp_path)
    ids = random_ids(1, 5)
    assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path)(ids).logits, untied(ids).logits)


def test_blocks_start_silent_through_every_way_of_making_a_model():
    """transformers skips `_init_weights` for outside modules without parameters of their own: look at the result."""
    config = DyadConfig(hidden_size=48, num_hidden_layers=2)
    ids = random_ids(1, 40)
    for model in (DyadForCausalLM(config), AutoModelForCausalLM.from_config(config)):
        hidden = model(ids, output_hidden_states=True).hidden_states
        assert torch.equal(hidden[1], hidden[0])  # nothing is added yet
        for layer in model.model.layers:
            assert layer.tower.gate.weight.std().item() == pytest.approx(48**-0.5, rel=0.1)
            assert layer.tower.bottlenecks[0].weight.std().item() == pytest.approx(48**-0.5, rel=0.15)
            assert (layer.tower.age.weight == 0).all()
            assert (layer.mlp_identity == 0.1).all()
        assert model(ids, labels=ids).loss.item() == pytest.approx(5.56, abs=0.05)  # about ln 259


def test_resize_token_embeddings():
    model, ids = make_model(torch.float32), random_ids(1, 11)
    before = model(ids).logits
    model.resize_token_embeddings(300)
    after = model(ids)
    assert after.logits.shape[-1] == model.config.vocab_size == 300
    assert torch.allclose(after.logits[..., :259], before, atol=1e-5)
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_outputs_by_convention():
    model, ids = make_model(), random_ids(2, 14)
    out = model(ids, labels=ids, output_hidden_states=True, use_cache=False)
    assert out.past_key_values is None
    assert len(out.hidden_states) == model.config.num_hidden_layers + 1
    assert torch.equal(out.hidden_states[0], model.get_input_embeddings()(ids))
    assert torch.equal(model.lm_head(out.hidden_states[-1]), out.logits)
    labels = ids.clone()
    labels[:, :8] = -100
    expected = torch.nn.functional.cross_entropy(out.logits[:, 7:-1].flatten(0, 1), ids[:, 8:].flatten())
    assert torch.allclose(model(ids, labels=labels).loss.double(), expected, atol=1e-6)
    assert torch.allclose(model(ids, logits_to_keep=3).logits, out.logits[:, -3:])
    assert torch.allclose(model(ids, logits_to_keep=torch.tensor([0, 5])).logits, out.logits[:, [0, 5]])
    assert isinstance(model(ids, return_dict=False), tuple)
    assert (out.routes, out.boundaries, out.metrics) == (None, None, None)
    with pytest.raises(ValueError, match="either input_ids or inputs_embeds"):
        model()


def test_the_base_model_is_one_of_transformers(tmp_path):
    model, ids = make_model(torch.float32), random_ids(1, 9)
    model.save_pretrained(tmp_path)
    base = AutoModel.from_pretrained(tmp_path)
    out = base(ids)
    assert torch.equal(out.last_hidden_state, model(ids, output_hidden_states=True).hidden_states[-1])
    assert out[0] is out.last_hidden_state
    assert out.hidden_states is None
    assert isinstance(base(ids, return_dict=False), tuple)


def test_a_state_that_is_given_in_training_goes_on():
    model, ids = make_model().train(), random_ids(1, 30)
    assert model(ids).past_key_values is None
    cache = DyadCache()
    first = model(ids[:, :11], past_key_values=cache).logits
    second = model(ids[:, 11:], past_key_values=cache).logits
    assert cache.get_seq_length() == 30
    assert torch.allclose(torch.cat([first, second], 1), model(ids).logits)
    embedding = model.get_input_embeddings().weight
    (gradient,) = torch.autograd.grad(second.square().sum(), embedding, retain_graph=True)
    (whole,) = torch.autograd.grad(model(ids).logits[:, 11:].square().sum(), embedding)
    assert torch.allclose(gradient, whole)  # through the state, back over the chunks


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"attention_mask": torch.ones(2, 3)}, "attention_mask has the shape"),
        ({"attention_mask": torch.ones(3, 5)}, "attention_mask has the shape"),
        ({"position_ids": torch.ones(2, 1).long()}, "position_ids has the shape"),
        ({"position_ids": torch.ones(5).long()}, "position_ids has the shape"),
        ({"seq_idx": torch.zeros(2, 5)}, "restart at 0"),
        ({"input_ids": torch.zeros(2, 0).long()}, "input is empty"),
    ],
)
def test_inputs_that_do_not_fit_are_refused_in_one_sentence(wrong, message):
    with pytest.raises(UserError, match=message):
        make_model()(**{"input_ids": random_ids(2, 5), **wrong})


def test_packed_by_the_flattening_collator():
    model = make_model()
    documents = [random_ids(1, n, seed=n)[0].tolist() for n in (7, 20, 12)]
    batch = DataCollatorWithFlattening(return_tensors="pt")([{"input_ids": d} for d in documents])
    logits = model(**{name: batch[name] for name in ("input_ids", "position_ids")}).logits
    alone = torch.cat([model(torch.tensor([d])).logits for d in documents], 1)
    assert torch.allclose(logits, alone)


def test_pipeline_generates_text(tmp_path):
    make_model(torch.float32).save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    writer = pipeline("text-generation", model=str(tmp_path), device="cpu")
    assert isinstance(writer.tokenizer, PreTrainedTokenizerFast)
    texts = writer(["To be", "or"], max_new_tokens=8, do_sample=False, batch_size=2, pad_token_id=256)
    assert texts[0][0]["generated_text"].startswith("To be")
    assert texts[1][0]["generated_text"].startswith("or")


def test_plain_trainer_trains_it(tmp_path):
    rows = [{"input_ids": row, "labels": row} for row in random_ids(1, 32).repeat(16, 1)]
    model = DyadForCausalLM(DyadConfig(hidden_size=32, num_hidden_layers=2))
    arguments = TrainingArguments(
        str(tmp_path),
        max_steps=30,
        learning_rate=1e-2,
        report_to=[],
        use_cpu=True,
        save_strategy="no",
        disable_tqdm=True,
    )
    result = Trainer(model, arguments, train_dataset=rows).train()
    with torch.no_grad():
        final = model.eval()(rows[0]["input_ids"][None], labels=rows[0]["labels"][None]).loss
    assert final < 0.5 * result.training_loss


@pytest.mark.parametrize("name", ["default", "gumbel", "everything"])
def test_gradient_checkpointing_gives_the_same_gradients(name):
    model, ids = taught(make_model(**VARIANTS[name])).train(), text_ids(2, 40)

    def gradients():
        torch.manual_seed(5)  # the same noise
        model.zero_grad()
        for layer in model.model.layers:
            if hasattr(layer.tower, "selector"):
                layer.tower.selector.load.zero_()  # so that no pass corrects the bias by the one before
        model(ids, labels=ids).loss.backward()
        return [p.grad.clone() for p in model.parameters()]

    plain = gradients()
    enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)  # its newer name
    enable()
    assert model.model.layers[0].gradient_checkpointing
    for a, b in zip(plain, gradients(), strict=True):
        assert torch.allclose(a, b, atol=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("sizes", [[], [2, 3, "word"]])
def test_reading_and_the_loss_are_in_the_graph_too(sizes):
    model, ids = make_model(torch.float32, ngram_sizes=sizes).train(), random_ids(2, 40)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the compiler's own, of torch's deprecated parts
        found = torch._dynamo.explain(model)(ids, labels=ids)
    assert found.graph_count == 1, [str(reason.reason) for reason in found.break_reasons]


@pytest.mark.slow
def test_the_core_compiles_without_a_graph_break():
    """Captured whole, forward and backward; the default backend also needs a C++ compiler (benchmarks measure it)."""
    model, ids = make_model(torch.float32).train(), random_ids(2, 40)
    model(ids, labels=ids).loss.backward()
    expected = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    model.model.stack = torch.compile(model.model.stack, fullgraph=True, backend="aot_eager")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the compiler's own, of torch's deprecated parts
        model(ids, labels=ids).loss.backward()
    for a, b in zip(expected, (p.grad for p in model.parameters()), strict=True):
        assert torch.allclose(a, b, atol=1e-5)


def test_identity_channel_is_written_by_no_block_and_read_by_all():
    model, ids = make_model(), random_ids(1, 20)
    seen = []
    hooks = [
        layer.register_forward_pre_hook(lambda module, args: seen.append((args[1].identity, args[1].identity.clone())))
        for layer in model.model.layers
    ]
    before = model(ids).logits
    for hook in hooks:
        hook.remove()
    assert len(seen) == 3
    for tensor, copy in seen:
        assert torch.equal(tensor, seen[0][1])
        assert torch.equal(copy, seen[0][1])  # bit-equal at every depth, before and after

    def without(module, args):
        hidden, around, state = args
        return hidden, around._replace(identity=torch.zeros_like(around.identity)), state

    for depth in range(3):  # zeroing it at any one depth changes the logits
        hook = model.model.layers[depth].register_forward_pre_hook(without)
        assert not torch.equal(model(ids).logits, before)
        hook.remove()


def test_contexts_longer_than_trained_work():
    model = make_model(max_position_embeddings=32)
    assert model(random_ids(1, 500)).logits.isfinite().all()


def test_level_contributions_show_each_level():
    model, ids = make_model(), random_ids(1, 50)
    loud = level_contributions(model, ids)
    assert loud.shape == (3, 7, 50)
    assert loud.isfinite().all()
    with torch.no_grad():
        for layer in model.model.layers:
            layer.tower.up_nodes["5"].weight.zero_()
    silent = level_contributions(model, ids)
    assert (silent[:, 5] == 0).all()
    assert (loud[:, 5, 32:] > 0).all()
    assert torch.equal(loud[0, 3], silent[0, 3])


def taught(model):
    """The model with the companion that teaches its planner, if it has one."""
    if model.planner is not None:
        model.accompany("planner", PlannerLessons(model, PlannerOptions()))
    return model


def test_every_parameter_gets_a_gradient(variant):
    """As training in parallel demands of each pass; a planner is taught by its companion, as `dyadlm train` does."""
    model, ids = taught(make_model(**variant)).train(), text_ids(2, 60)
    model(ids, labels=ids).loss.backward()
    assert [name for name, parameter in model.named_parameters() if parameter.grad is None] == []


@pytest.mark.parametrize("name", ["semantic", "topk", "everything"])
def test_mechanisms_generate_save_and_load(name, tmp_path):
    model, ids = make_model(torch.float32, **VARIANTS[name]), text_ids(2, 21)
    for layer in model.model.layers:
        if hasattr(layer.tower, "selector"):
            layer.tower.selector.bias.normal_()
    with_state = generate(model, ids, use_cache=True, max_new_tokens=8)
    assert torch.equal(with_state, generate(model, ids, use_cache=False, max_new_tokens=8))
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    for key, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[key], tensor)
    for key, buffer in loaded.named_buffers():  # also those that no file holds
        assert torch.equal(buffer, dict(model.named_buffers())[key])
    assert torch.equal(loaded(ids).logits, model(ids).logits)


def test_a_vocabulary_of_any_size_and_contexts_of_any_length():
    fields = {**VARIANTS["slots"], "semantic_levels": ["learned"], "vocab_size": 2**17, "max_position_embeddings": 32}
    fields["slot_contexts"] = [1, 2, 3, 4, 6, 8]
    model = make_model(torch.float32, **fields)
    assert model(random_ids(1, 200, vocabulary=2**17), logits_to_keep=5).logits.isfinite().all()


# What the first version wrote, before there were semantic levels, salience, selectors and slots.
FOUNDATION = """{
  "architectures": ["DyadForCausalLM"], "bos_token_id": 257, "dropout": 0.0, "dtype": "float32", "early": "zero",
  "eos_token_id": 258, "hidden_size": 16, "initializer_range": 0.02, "intermediate_size": 48,
  "level_alignment": "hybrid", "level_feature": "product+pair", "level_rank": 3, "max_position_embeddings": 256,
  "model_type": "dyadlm", "num_hidden_layers": 2, "num_levels": 5, "pad_token_id": 256, "rms_norm_eps": 1e-06,
  "tie_word_embeddings": true, "transformers_version": "5.23.0", "transport_space": "level", "use_cache": true,
  "vocab_size": 259
}"""
FOUNDATION_BLOCK = (
    "tower_identity", "mlp_identity", "tower_norm.weight", *(f"tower.bottlenecks.{k}.weight" for k in range(5)),
    "tower.up_tokens.weight", "tower.up_nodes.4.weight", "tower.gate.weight", "tower.age.weight", "mlp_norm.weight",
    "mlp.gate.weight", "mlp.up.weight", "mlp.down.weight",
)  # fmt: skip
FOUNDATION_STATE = (
    '{"alignments": ["sliding", "sliding", "sliding", "sliding", "dual"], "hidden_size": 16, "num_hidden_layers": 2, '
    '"ranks": [3, 3, 3, 3, 3], "transport_space": "level"}'
)


def test_a_folder_of_the_first_version_is_the_same_model_still(tmp_path):
    """Fields that it does not know are off; weights have the names they had, and say the same; so does the state."""
    names = [f"model.layers.{layer}.{name}" for layer in range(2) for name in FOUNDATION_BLOCK]
    names = sorted(["model.embed_tokens.weight", *names, "model.norm.weight"])
    (tmp_path / "config.json").write_text(FOUNDATION)
    shapes = dict(DyadForCausalLM(AutoConfig.from_pretrained(tmp_path)).named_parameters())
    assert sorted(shapes) == names
    weights = {}
    for number, name in enumerate(names):
        waves = (torch.arange(shapes[name].numel()) * (0.7 + number)).sin() * 0.3
        weights[name] = waves.view(shapes[name].shape)
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    model, found = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not found["missing_keys"]
    assert not found["unexpected_keys"]
    ids = (torch.arange(40) * 37 % 259)[None]
    out = model(ids, labels=ids, use_cache=True, output_routes=True)
    # What the first version said.
    assert out.loss.item() == pytest.approx(5.5377593, abs=1e-5)
    last = torch.tensor([-0.02482475, 0.00807427, 0.02810274, 0.00333566, -0.02674871])
    assert torch.allclose(out.logits[0, -1, :5], last, atol=1e-5)
    assert out.routes is out.boundaries is out.metrics is None
    parts = {name.rpartition(".")[0] for name in out.past_key_values.tensors()}
    assert parts == {"", *(f"layers.{layer}.{part}" for layer in range(2) for part in ("rings", "blocks"))}
    assert signature_of(model.config) == FOUNDATION_STATE


def test_what_reads_the_tokens_refuses_embeddings():
    for name in ("semantic", "slots"):
        model = make_model(**VARIANTS[name])
        with pytest.raises(UserError, match="give input_ids"):
            model(inputs_embeds=model.get_input_embeddings()(text_ids(1, 5)))


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")  # read by peft, not by us
def test_lora_on_the_projections_trains(tmp_path):
    peft = pytest.importorskip("peft")
    model, ids = make_model(torch.float32), random_ids(2, 40)
    before = model(ids).logits
    names = ["bottlenecks.0", "bottlenecks.6", "up_tokens", "tower.gate", "mlp.down"]
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=names, task_type="CAUSAL_LM"))
    optimizer = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(12):
        loss = adapted(input_ids=ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.05
    adapted.save_pretrained(tmp_path)
    restored = peft.PeftModel.from_pretrained(make_model(torch.float32), tmp_path).eval()
    assert torch.allclose(restored(input_ids=ids).logits, adapted.eval()(input_ids=ids).logits, atol=1e-5)
    assert not torch.allclose(restored(input_ids=ids).logits, before, atol=1e-3)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"name": "huge"}, "no preset 'huge'"),
        ({"hiden_size": 3}, "did you mean 'hidden_size'"),
        ({"hidden_size": 0}, "hidden_size is 0"),
        ({"level_alignment": "dual"}, "level 0"),
        ({"level_alignment": ["sliding"]}, "8 entries"),
        ({"level_rank": [1, 2]}, "8 entries"),
        ({"level_feature": "magic"}, "level_feature is 'magic'"),
        ({"early": "late"}, "early is 'late'"),
        ({"transport_space": "outer"}, "transport_space"),
        ({"dropout": 1.0}, "dropout is 1.0"),
        ({"dropout": "x"}, "dropout is 'x'"),
        ({"level_alignment": 3}, "level_alignment is 3"),
        ({"level_alignment": "sliding", "num_levels": 30}, "use hybrid or dual"),
        ({"vocab_size": 65, "eos_token_id": 65}, "eos_token_id is 65 but vocab_size is 65"),
        ({"model_type": "llama"}, "no field 'model_type'"),
        ({"semantic_levels": ["verse"]}, "semantic_levels is 'verse'"),
        ({"semantic_levels": ["word", "word"]}, "names something twice"),
        ({"semantic_memory": 3}, "semantic_memory is 3"),
        ({"boundary_rate": 0.0}, "boundary_rate is 0.0"),
        ({"tower": "both"}, "tower is 'both'"),
        ({"selector": "best"}, "selector is 'best'"),
        ({"selector": "topk", "selector_heads": 3}, "divisor of hidden_size"),
        ({"selector": "topk", "selector_count": 9}, "there are 8 levels"),
        ({"selector": "entmax", "selector_margin": 0.1}, "use topk or gumbel"),
        ({"decision_slots": True}, "set selector too"),
        ({"slot_contexts": [0]}, "replace 0"),
        ({"slot_contexts": ["page"]}, "replace 'page'"),
        ({"slot_contexts": [1], "slot_entries": 24, "slot_ways": 4}, "no power of two of sets"),
        ({"slot_contexts": [1], "slot_evict": "fifo"}, "slot_evict is 'fifo'"),
        ({"slot_contexts": [1], "slot_scope": "all"}, "slot_scope is 'all'"),
        ({"slot_contexts": [1], "slot_layers": [4]}, "slot_layers names block 4"),
    ],
)
def test_wrong_configurations_are_named_in_one_sentence(wrong, message):
    wrong = {
        "name": "tiny",
        "num_levels": 8,
        "level_rank": None,
        "semantic_levels": None,
        "slot_contexts": None,
        **wrong,
    }
    with pytest.raises(UserError, match=message) as error:
        DyadConfig.from_preset(wrong.pop("name"), **wrong)
    assert "\n" not in str(error.value)


def test_special_tokens_follow_the_vocabulary():
    """Those of the byte tokenizer fit its vocabulary alone; another one brings its own, or none."""
    assert DyadConfig().eos_token_id == 258
    other = DyadConfig.from_preset("tiny", vocab_size=65)
    assert (other.pad_token_id, other.bos_token_id, other.eos_token_id) == (None, None, None)
    assert DyadConfig.from_preset("tiny", vocab_size=65, eos_token_id=[1, 2]).eos_token_id == [1, 2]


def test_what_is_not_told_follows_from_what_is():
    config = DyadConfig(hidden_size=64, max_position_embeddings=1024)
    assert (config.intermediate_size, config.level_rank, config.num_levels) == (176, 12, 10)
    assert config.alignments == ["sliding"] * 4 + ["dual"] * 6
    assert DyadConfig.from_preset("tiny", hidden_size=64, intermediate_size=100).intermediate_size == 100
    sizes = {parameters(DyadConfig(level_feature=feature)) for feature in LEVEL_FEATURES}
    assert len(sizes) == 1  # features compare at equal parameters


# ---- What trainers and loaders of other libraries rely on


def test_ids_of_any_integer_type_are_the_same_tokens():
    """The hash of a context takes more than 32 bits."""
    model, ids = make_model(torch.float32, preset="tiny", hidden_size=32), text_ids(2, 60)
    with torch.no_grad():
        expected = model(ids).logits
        for dtype in (torch.int32, torch.int16):
            assert torch.equal(model(ids.to(dtype)).logits, expected)
        assert torch.equal(model.generate(ids.int(), max_new_tokens=3), model.generate(ids, max_new_tokens=3))


def test_layers_that_would_be_offloaded_are_refused(tmp_path):
    make_model(torch.float32, preset="tiny").save_pretrained(tmp_path / "model")
    model = make_model(torch.float32, preset="tiny")
    places = {name: "cpu" for name, _ in model.named_children() if name != "model"}
    places |= {f"model.{name}": "cpu" for name, _ in model.model.named_children() if name != "layers"}
    places |= {f"model.layers.{layer}": "cpu" if layer else "disk" for layer in range(3)}
    with pytest.raises(UserError, match="offloaded, which dyadlm models do not support"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "model", device_map=places, offload_folder=tmp_path / "away")
    kept = AutoModelForCausalLM.from_pretrained(tmp_path / "model", device_map={"": "cpu"})
    assert kept.device.type == "cpu"


def test_label_smoothing_of_the_trainer_shifts_the_targets(tmp_path):
    torch.manual_seed(0)
    model = make_model(torch.float32).train()
    arguments = TrainingArguments(tmp_path, label_smoothing_factor=0.1, use_cpu=True, report_to="none")
    trainer = Trainer(model=model, args=arguments)
    ids = text_ids(2, 30)
    loss = trainer.compute_loss(model, {"input_ids": ids, "labels": ids})
    logs = model(ids).logits[:, :-1].log_softmax(-1)
    likelihood = -logs.gather(-1, ids[:, 1:, None]).mean()
    expected = 0.9 * likelihood - 0.1 * logs.mean()
    torch.testing.assert_close(loss, expected)


@pytest.mark.parametrize("fields", [{}, {"semantic_levels": ["word", "learned"]}, {"slot_gate": True}])
def test_predictions_of_the_trainer_are_logits(tmp_path, fields):
    model = make_model(torch.float32, preset="tiny", hidden_size=32, num_hidden_layers=2, level_rank=8, **fields)
    arguments = TrainingArguments(tmp_path, use_cpu=True, report_to="none", disable_tqdm=True)
    data = [{"input_ids": row, "labels": row} for row in text_ids(3, 20)]
    shapes = []

    def seen(told):
        shapes.append(told.predictions.shape)
        return {}

    Trainer(model=model, args=arguments, eval_dataset=data, compute_metrics=seen).evaluate()
    assert shapes == [(3, 20, 259)]


@pytest.mark.filterwarnings("ignore::FutureWarning")  # peft calls what is to go in transformers 6
@pytest.mark.parametrize("name", ["topk", "input", "planner", "slots"])
def test_adapters_on_every_linear_map_are_trained_and_merged(name):
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    options = peft.LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear", r=2, init_lora_weights=False)
    model = peft.get_peft_model(make_model(torch.float32, **VARIANTS[name]), options).train()
    ids = text_ids(2, 40)
    plan = {"output_plan": True} if "planner" in name else {}
    output = model(input_ids=ids, labels=ids, **plan)
    loss = output.loss if output.plan is None else output.loss + output.plan.proposal.square().mean()
    loss.backward()
    idle = [key for key, part in model.named_parameters() if part.requires_grad and part.grad is None]
    assert not [key for key in idle if "tower" in key or "slots" in key or "mlp" in key]
    model.eval()
    with torch.no_grad():
        before = model(ids).logits
        after = deepcopy(model).merge_and_unload()(ids).logits
    torch.testing.assert_close(after, before, rtol=1e-3, atol=1e-3)


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_lora_needs_no_names_of_modules():
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(make_model(torch.float32, preset="tiny"), peft.LoraConfig(task_type="CAUSAL_LM"))
    adapted = {key.split(".")[-4] for key, _ in model.named_parameters() if "lora_A" in key}
    assert {"gate", "up", "down", "up_tokens"} <= adapted


@pytest.mark.filterwarnings("ignore::FutureWarning")  # the name that recipes use is to go in transformers 6
def test_reentrant_checkpoints_are_made_without_reentering():
    model, ids = make_model(torch.float32).train(), text_ids(2, 30)
    model(input_ids=ids, labels=ids).loss.backward()
    expected = {key: part.grad.clone() for key, part in model.named_parameters()}
    model.zero_grad()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
    model(input_ids=ids, labels=ids).loss.backward()
    for key, part in model.named_parameters():
        torch.testing.assert_close(part.grad, expected[key])


def test_fields_that_do_not_fit_together_are_refused_when_a_model_is_loaded(tmp_path):
    make_model(torch.float32, preset="tiny").save_pretrained(tmp_path)
    with pytest.raises(UserError, match="slot_layers names block 2"):
        AutoModelForCausalLM.from_pretrained(tmp_path, num_hidden_layers=2)
    shorter = AutoModelForCausalLM.from_pretrained(tmp_path, num_hidden_layers=2, slot_layers=[])
    assert shorter(text_ids(1, 10)).logits.shape == (1, 10, 259)


def test_as_an_assistant_a_model_says_why_it_cannot_help():
    llama = LlamaForCausalLM(
        LlamaConfig(vocab_size=259, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64)
    ).eval()
    with pytest.raises(UserError, match="cannot be cut back"):
        llama.generate(text_ids(1, 10), max_new_tokens=8, do_sample=False, assistant_model=make_model(torch.float32))


def test_lengths_past_the_training_are_generated_without_a_warning(caplog):
    model = make_model(torch.float32, max_position_embeddings=16)
    transformers.logging.enable_propagation()
    try:
        model.generate(text_ids(1, 10), max_new_tokens=20, eos_token_id=None)
    finally:
        transformers.logging.disable_propagation()
    assert "maximum length" not in caplog.text


def test_misspelt_fields_are_remarked_upon(caplog):
    DyadConfig(hidden_sizes=64)
    assert "no field hidden_sizes, so it changes nothing; the nearest is hidden_size" in caplog.text
    caplog.clear()
    DyadConfig.from_dict(DyadConfig.from_preset("tiny").to_dict())
    assert not caplog.text


def test_states_are_shown_and_copied_where_gradients_are_on():
    model = make_model(torch.float32)
    cache = model(text_ids(2, 10), use_cache=True).past_key_values
    assert repr(cache) == "DyadCache(rows=2, columns_seen=10)"
    twin = deepcopy(cache)
    expected = model(text_ids(2, 5), past_key_values=cache).logits
    torch.testing.assert_close(model(text_ids(2, 5), past_key_values=twin).logits, expected)
