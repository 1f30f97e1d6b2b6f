"""`dyadlm compare` from end to end: models, one trainer, three protocols, a page."""

import json
import math
import re
from dataclasses import replace
from functools import partial
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch._dynamo.exc import TorchDynamoException
from torch.utils.flop_counter import FlopCounterMode
from transformers import GPT2Config, GPT2LMHeadModel, Trainer

from dyadlm.causal_lm import state_bytes
from dyadlm.cli import main
from dyadlm.compare import Budget, load_model
from dyadlm.compare import cell as cell_module
from dyadlm.compare.cell import Cell, Done, Recipe, new_model, run_cell, scored, trained
from dyadlm.compare.cost import backward, grouped_products, require_equal_gradients, training_cost
from dyadlm.compare.study import Results, Study, run_cells
from dyadlm.data import TokenStream, byte_tokenizer, resolve_data
from dyadlm.errors import RunFailed, UserError
from dyadlm.evaluate import protocols
from dyadlm.evaluate.protocols import after_context, carried, fresh, measure, overlapping, three_protocols
from dyadlm.train.optimizer import decayed_parameters
from dyadlm.train.prepared_run import prepare_run
from dyadlm.train.trainer import LanguageModelTrainer
from dyadlm.zoo import FAMILIES, Family, build, count_parameters
from dyadlm.zoo.families import mixed
from dyadlm.zoo.mixer import MIXERS, Mixer
from dyadlm.zoo.positions import length_losses

WORDS = ["the", "king", "queen", "speaks", "of", "love", "and", "war", "in", "a", "dark", "wood"]


def call(*arguments) -> int:
    with pytest.raises(SystemExit) as ended:
        main([str(argument) for argument in arguments])
    return ended.value.code or 0


@pytest.fixture
def text(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DYADLM_CACHE", str(tmp_path / "cache"))
    words = " ".join(np.random.default_rng(0).choice(WORDS, 6000))
    (tmp_path / "my.txt").write_text(words + "\n")
    return str(tmp_path / "my.txt")


def one_after_another(recipe, wanted, jobs, engine, address, unfinished):
    while cells := wanted():
        yield Done(cells[0], *run_cell(recipe, cells[0], unfinished))


def tables(name: str) -> int:
    """Numbers of two n-gram tables, and of their map into the embedding."""
    plain = Recipe(data=("x",), parameters=100_000, length=32)
    both = [count_parameters(new_model(one, Cell(name))) for one in (replace(plain, ngrams=(2, 3)), plain)]
    return both[0] - both[1]


@pytest.mark.slow
def test_a_page_comes_of_one_command(text, tmp_path, capsys, monkeypatch):
    # In this process: a process for each cell loads torch anew.
    monkeypatch.setattr("dyadlm.compare.study.run_cells", one_after_another)
    asked = [
        "compare", "--models", "dyad,llama", "--data", text, "--output", "out", "--budget", "tokens=1k", "--parameters",
        "100k", "--length", "32", "--batch-size", "2", "--seeds", "2", "--learning-rates", "8e-3", "--ngrams", "2,3",
        "--jobs", "2", "--scale", "0.01",
    ]  # fmt: skip
    assert call(*asked) == 0
    assert not (tmp_path / "out" / "unfinished").exists()
    page = (tmp_path / "out" / "index.html").read_text()
    found = json.loads((tmp_path / "out" / "results.json").read_text())
    for name, family in found["families"].items():
        assert name in page
        assert abs((family["parameters"] - tables(name)) / 100_000 - 1) <= 0.02
        assert [len(seed["curve"]) for seed in family["seeds"]] == [8, 8]
        for protocol in ("fresh", "context", "carried", "remembered"):
            values = [seed["scores"][protocol]["nats"] for seed in family["seeds"]]
            assert f"{sum(values) / 2:.4f}" in page
            assert all(0.3 < value < 5.6 for value in values)
        assert family["seeds"][0]["curve"][-1]["nats"] < family["seeds"][0]["curve"][0]["nats"]
    assert not re.search(r"https?://(?!www.w3.org)|<script", page)
    for svg in re.findall(r"<svg.*?</svg>", page, re.DOTALL):
        ElementTree.fromstring(svg)
    capsys.readouterr()
    assert call(*asked) == 0  # again: everything is there
    assert "done" not in capsys.readouterr().err


@pytest.mark.slow
def test_weights_of_a_cell_are_the_model(text):
    """Losses are measured in float32, also where training computed in bfloat16."""
    sizes = {"parameters": 200_000, "length": 32, "batch": 2, "ngrams": (2,), "scale": 0.02}
    recipe = Recipe(data=(text,), dtype="bfloat16", **sizes)
    cell = Cell("mingru", 256, 4e-3, 1, final=True)
    found, weights = run_cell(recipe, cell)
    study = Study(recipe, ("mingru",), Budget("tokens", 256.0))
    Results(Path("kept"), study).keep(Done(cell, found, weights))
    model = load_model(Path("kept"), "mingru", seed=1)
    data = resolve_data([text], byte_tokenizer())
    scores = three_protocols(model, data.validation, 32, byte_tokenizer().bos_token_id, found["carried"], 0.02)
    assert {name: score.nats for name, score in scores.items()} == {
        name: pytest.approx(found["scores"][name]["nats"], abs=1e-6) for name in scores
    }
    tokens = torch.from_numpy(data.validation[0].tokens(0, len(data.validation[0])).astype(np.int64))
    losses = length_losses(model, tokens, 32, windows=1)
    assert found["lengths"] == [{"multiple": one.multiple, "nats": pytest.approx(one.loss)} for one in losses]
    with pytest.raises(UserError, match="has no trained mingru with seed 0; train it"):
        load_model(Path("kept"), "mingru")
    (file,) = Path("kept/cells").glob("*.safetensors")
    content = load_file(file)
    for wrong in (dict(list(content.items())[:-1]), content | {"another": torch.zeros(3)}):
        save_file(wrong, file)
        with pytest.raises(UserError, match="does not hold the weights of the cell 'mingru final"):
            load_model(Path("kept"), "mingru", seed=1)
    file.write_bytes(b"weights")
    with pytest.raises(UserError, match="does not hold the weights of the cell 'mingru final"):
        load_model(Path("kept"), "mingru", seed=1)
    with pytest.raises(UserError, match="holds no study"):
        load_model(Path("elsewhere"), "mingru", seed=1)


def test_all_families_read_the_same_tokens_in_the_same_order(text, tmp_path, monkeypatch):
    recipe = Recipe(data=(text,), parameters=200_000, length=16, batch=2)
    read: dict[str, list[list[int]]] = {}
    for family in ("dyad", "llama", "linear"):
        data = resolve_data([text], byte_tokenizer())

        def remember(module, arguments, named, seen=read.setdefault(family, [])):
            if module.training:
                seen.extend(named["input_ids"].tolist())

        monkeypatch.setattr("dyadlm.compare.cell.new_model", partial(_told, remember))
        trained(recipe, Cell(family, 128, 1e-3, 5), data, tmp_path / family)
    assert read["dyad"] == read["llama"] == read["linear"]
    assert len(read["dyad"]) == 8


@pytest.mark.parametrize(("dtype", "compiled"), [("float32", ("dyad",)), ("bfloat16", ("llama",))])
def test_training_computes_as_asked(dtype, compiled, text, tmp_path, monkeypatch):
    class Seen(Exception):
        pass

    def prepare(*given):
        raise Seen(prepare_run(*given).arguments)

    monkeypatch.setattr("dyadlm.compare.cell.prepare_run", prepare)
    recipe = Recipe(data=(text,), parameters=200_000, length=16, batch=2, dtype=dtype, compiled=compiled)
    with pytest.raises(Seen) as raised:
        trained(recipe, Cell("llama", 64, 1e-3), resolve_data([text], byte_tokenizer()), tmp_path)
    (arguments,) = raised.value.args
    assert arguments.bf16 == (dtype == "bfloat16")
    assert arguments.torch_compile == ("llama" in compiled)


@pytest.mark.slow
def test_a_cell_that_was_stopped_goes_on_from_its_last_checkpoint(text, tmp_path, monkeypatch):
    recipe, cell = Recipe(data=(text,), parameters=50_000, length=8, batch=2), Cell("llama", 256, 1e-3, final=True)
    data, place = resolve_data([text], byte_tokenizer()), tmp_path / cell.file_name
    whole, curve = trained(recipe, cell, data, tmp_path / "whole")
    step, steps = LanguageModelTrainer.training_step, []

    def stopped(self, *args, **kwargs):
        steps.append(self.state.global_step)
        if self.state.global_step == 9:
            raise KeyboardInterrupt
        return step(self, *args, **kwargs)

    monkeypatch.setattr(LanguageModelTrainer, "training_step", stopped)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            trained(recipe, cell, data, place, saves=True)
        assert [path.name for path in (place / "run").iterdir()] == ["checkpoint-8"]
    assert steps == [*range(10), 8, 9]
    monkeypatch.setattr(LanguageModelTrainer, "training_step", step)
    found, same = trained(recipe, cell, data, place, saves=True)
    assert all(torch.equal(value, whole.state_dict()[name]) for name, value in found.state_dict().items())
    assert [{**point, "seconds": 0} for point in same] == [{**point, "seconds": 0} for point in curve]
    assert [point["seconds"] for point in same] == sorted(point["seconds"] for point in same)
    # What another version began is begun anew, and a full disk is no diverging loss.
    manifest = place / "run" / "checkpoint-14" / "checkpoint.json"
    manifest.write_text(manifest.read_text().replace('"dtype": "float32"', '"dtype": "bfloat16"'))
    monkeypatch.setattr(LanguageModelTrainer, "_save_optimizer_and_scheduler", full)
    with pytest.raises(
        RunFailed, match=r"could not be written \(No space left\).*Make room and give the same command again"
    ):
        run_cell(recipe, cell, tmp_path)
    assert not manifest.exists()


@pytest.mark.slow
def test_a_loss_that_rises_is_a_result_without_a_remedy(text, tmp_path, monkeypatch):
    """A path of this machine, and of a folder that is removed, has no place among the results."""
    recipe, cell = Recipe(data=(text,), parameters=50_000, length=8, batch=2), Cell("llama", 128, 1e-3, final=True)
    step = Trainer.training_step
    monkeypatch.setattr(
        Trainer, "training_step", lambda self, *a: step(self, *a) * (math.nan if self.state.global_step > 3 else 1)
    )
    found, weights = run_cell(recipe, cell, tmp_path)
    assert not weights
    assert re.fullmatch(r"Training stopped because [^;]*", found["diverged"])


def full(*args):
    raise OSError("No space left")


def test_costs_are_those_of_the_dtype():
    recipe = Recipe(data=("x",), parameters=200_000)
    seen = []
    model = new_model(recipe, Cell("llama"))
    model.model.layers[0].mlp.register_forward_hook(lambda module, given, output: seen.append(output.dtype))
    training_cost(model, 1, 16, "adamw", "bfloat16")
    assert set(seen) == {torch.bfloat16}


@pytest.mark.slow
@pytest.mark.parametrize("worse", [0.0, 9.0])
def test_a_state_that_does_worse_than_windows_is_not_carried(text, monkeypatch, worse):
    """Also for the same predictions with a memory."""
    recipe = Recipe(data=(text,), parameters=200_000, length=16, scale=0.01)
    cell, data = Cell("dyad", 64, 4e-3, final=True), resolve_data([text], byte_tokenizer())
    model = new_model(recipe, cell)
    read = protocols.carried_scores

    def made_worse(model, streams, length, prefix, carry, *rest):
        found = read(model, streams, length, prefix, carry, *rest)
        return {name: one._replace(nats=one.nats + (worse if carry else 1.0)) for name, one in found.items()}

    for module in (protocols, cell_module):
        monkeypatch.setattr(module, "carried_scores", made_worse)
    found = scored(recipe, cell, model, data)
    assert found["carried"] is (worse == 0.0)
    assert all(found["scores"][name]["nats"] < 8 for name in ("carried", "remembered"))


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_what_training_refuses_is_found_when_costs_are_measured(optimizer):
    """The optimizer of training takes no complex weights."""
    model = new_model(Recipe(data=("x",), parameters=200_000), Cell("llama"))
    norm = model.model.norm
    norm.register_parameter("turn", torch.nn.Parameter(torch.ones(1, dtype=torch.complex64)))
    norm.register_forward_hook(lambda module, given, output: output * module.turn.real)
    with pytest.raises(RuntimeError, match="fused"):
        training_cost(model, 1, 16, optimizer)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("lost", [None, 1])
def test_few_rows_of_a_compiled_gradient_that_are_lost_are_found(dtype, lost):
    """Of 2,048, so that the whole gradient hardly changes. Dropout plays no part, and comes back."""
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=256, n_embd=8, n_layer=1, n_head=2, n_positions=16, n_inner=2048))
    weight = model.transformer.h[0].mlp.c_proj.weight  # (2048, 8)
    ids = torch.randint(0, 256, (2, 16), generator=torch.Generator().manual_seed(0))

    backward(model, ids, "float32")
    rows = torch.ones(2048, 1)
    rows[int(weight.grad.norm(dim=1).argmax())] = 1 if lost is None else 0

    def compiled(**given):  # called last
        weight.register_hook(lambda gradient: gradient * rows)
        return model(**given)

    if lost is None:
        require_equal_gradients(model, compiled, ids, dtype)
    else:
        with pytest.raises(UserError, match=r"another gradient of transformer\.h\.0\.mlp\.c_proj\.weight"):
            require_equal_gradients(model, compiled, ids, dtype)
    assert model.transformer.h[0].mlp.dropout.p == 0.1


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("wrong", [0.0, 2.0, math.nan])
def test_compiled_code_with_other_gradients_is_refused(dtype, wrong):
    """Of one matrix, as where the compiler reads what nothing has written."""
    model = build("llama", length=16, width=16, layers=1)
    ids = torch.randint(0, 256, (2, 16), generator=torch.Generator().manual_seed(0))
    weight = model.model.layers[0].mlp.up_proj.weight

    def compiled(**given):  # called last
        weight.register_hook(lambda gradient: gradient * (1 + wrong))
        return model(**given)

    if not wrong:
        return require_equal_gradients(model, compiled, ids, dtype)
    with pytest.raises(UserError, match=r"another gradient of .*up_proj\.weight here; leave it out of --compile"):
        require_equal_gradients(model, compiled, ids, dtype)


def test_what_cannot_be_compiled_is_told(text, monkeypatch):
    recipe = Recipe(data=(text,), parameters=200_000, length=16, batch=2, compiled=("llama",))

    def fails(model):
        raise TorchDynamoException("no such instruction")

    monkeypatch.setattr("torch.compile", fails)
    with pytest.raises(UserError, match=r"no such instruction.*leave --compile out"):
        run_cell(recipe, Cell("llama"))
    monkeypatch.setattr("dyadlm.train.compiler.shutil.which", lambda name: None)
    with pytest.raises(UserError, match=r"--compile needs a C\+\+ compiler"):
        run_cell(recipe, Cell("llama"))


def _told(remember, recipe, cell):
    model = new_model(recipe, cell)
    model.register_forward_pre_hook(remember, with_kwargs=True)
    return model


def test_protocols_score_the_same_targets():
    stream = TokenStream.from_text(" ".join(WORDS) * 40, byte_tokenizer())
    parts = fresh([stream], 32, 400)
    late = after_context(parts, 100)
    assert [(one.first, one.stop) for one in parts[0][1]] == [(one.first, one.stop) for one in late[0][1]]
    assert all(one.start == max(other.first - 101, -1) for one, other in zip(late[0][1], parts[0][1], strict=True))
    model = build("llama", length=32, width=32, layers=1).eval()
    prefix = byte_tokenizer().bos_token_id
    assert measure(model, parts, prefix).tokens == measure(model, late, prefix).tokens
    ((_, windows),) = carried([stream], False, 300, 64)
    scored = [place for one in windows for place in range(one.first, one.stop)]
    assert scored == list(range(300))
    assert all(one.first - one.start > 32 for one in windows[1:])
    ((_, whole),) = carried([stream], True, 300)
    assert [(one.start, one.first, one.stop) for one in whole] == [(-1, 0, 300)]


def test_windows_that_overlap_score_each_target_once():
    for end in (1, 7, 8, 9, 30):
        scored = [place for one in overlapping(end, 8) for place in range(one.first, one.stop)]
        assert scored == list(range(end))


def test_equal_tables_for_all():
    recipe = Recipe(data=("x",), parameters=200_000, ngrams=(2, 3))
    plain = replace(recipe, ngrams=())
    sizes = {}
    for family in ("dyad", "llama"):
        both = [sum(p.numel() for p in new_model(one, Cell(family)).parameters()) for one in (recipe, plain)]
        sizes[family] = both[0] - both[1]
    width = {name: build(name, length=256, parameters=200_000).config.hidden_size for name in sizes}
    assert sizes["dyad"] - 48 * width["dyad"] == sizes["llama"] - 48 * width["llama"] == 2 * 16_384 * 24


def test_products_of_groups_are_counted():
    rows = torch.randn(8, 16, requires_grad=True)
    matrices = torch.randn(2, 16, 8, requires_grad=True)
    ends = torch.tensor([3, 8], dtype=torch.int32)
    with FlopCounterMode(display=False, custom_mapping={torch.ops.aten._grouped_mm: grouped_products}) as counter:
        out = torch._grouped_mm(rows, matrices, offs=ends)
        assert counter.get_total_flops() == 2 * 8 * 16 * 8  # each row by one matrix
        (out * torch.randn(8, 8)).sum().backward()
    assert counter.get_total_flops() == 3 * 2 * 8 * 16 * 8
    assert out[2:4].detach().allclose(torch.stack([rows[2] @ matrices[0], rows[3] @ matrices[1]]), atol=1e-5)


def test_the_size_of_a_state_counts_what_is_shared_once():
    shared = torch.zeros(4)
    assert state_bytes({"a": [shared, shared], "b": (torch.zeros(2, dtype=torch.float64),)}) == 32


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--models", "dyad,lama"], "the nearest is llama"),
        (["--models", "linformer"], "linformer is not compared"),
        (["--models", ","], "nothing to compare"),
        (["--models", "dyad", "--budget", "5M"], "A budget is"),
        (["--models", "dyad", "--ngrams", "2,x"], "--ngrams takes sizes"),
        (["--models", "dyad", "--parameters", "10"], "more than 10 parameters"),
        (["--models", "dyad", "--address", "auto"], "--engine ray"),
        (["--models", "dyad", "--data", "none.txt"], "There is no file"),
        (["--models", "llama", "--data", "-:2"], "standard input only once; give a file"),
        (["--models", "dyad", "--scale", "nan"], "--scale is a number above 0"),
        (["--models", "dyad", "--compile", "dyad,llama"], "--compile names llama, which is not among --models"),
        (["--models", "dyad", "--budget", "tokens=9e400"], "a number above 0"),
        (
            ["--models", "llama", "--length", "90000"],
            r"fewer than a training text of 90000; give more text, or a smaller --length",
        ),
        (["--models", "llama", "--parameters", "1e29"], "parameters; ask for fewer"),
    ],
)
def test_wrong_requests_are_one_sentence(text, tmp_path, capsys, arguments, message):
    given = [] if "--data" in arguments else ["--data", text]
    assert call("compare", *arguments, *given, "--output", "out") == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("field", ["optimizer", "dtype"])
def test_a_recipe_names_what_there_is(field):
    with pytest.raises(UserError, match=f"--{field} is .* or .*, not 'other'"):
        Recipe(data=("notes.txt",), **{field: "other"})


def test_a_plan_trains_nothing(text, tmp_path, capsys):
    request = ["--models", "dyad,llama", "--data", text, "--output", "out", "--budget", "seconds=120", "--dry-run"]
    assert call("compare", *request, "--jobs", "2") == 0
    assert "about 5.2 minutes" in capsys.readouterr().out
    assert call("compare", *request, "--jobs", "2", "--learning-rates", "4e-3") == 0
    assert "about 2.0 minutes" in capsys.readouterr().out  # one rate is no sweep
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_a_rate_at_which_training_diverges_is_a_result(text):
    recipe = Recipe(data=(text,), parameters=200_000, length=16, batch=2, optimizer="adamw", scale=0.02)
    for final in (False, True):
        found, weights = run_cell(recipe, Cell("llama", 640, 1e4, 0, final=final))
        assert found["diverged"]
        assert "scores" not in found
        assert not weights


@pytest.mark.slow
def test_a_family_that_sees_the_future_can_be_trained(text, monkeypatch):
    class Leak(Mixer):
        def __init__(self, config):
            super().__init__(config)
            self.map = nn.Linear(config.hidden_size, config.hidden_size)

        def forward(self, x, state=None):
            return self.map(x + x.mean(1, keepdim=True)), None

    monkeypatch.setitem(MIXERS, "leak", Leak)
    leak = Family("leak", "a mean over all tokens", "test", "none", mixed("leak"), decodes="nothing")
    monkeypatch.setitem(FAMILIES, "leak", leak)
    recipe = Recipe(data=(text,), parameters=200_000, length=16, batch=2, scale=0.02)
    cost, _ = run_cell(recipe, Cell("leak"))
    assert any("perturbation" in fault for fault in cost["faults"])
    found, _ = run_cell(recipe, Cell("leak", 640, 4e-3, 0, final=True))
    assert 0 < found["scores"]["fresh"]["nats"] < 6
    assert not found["carried"]


def test_operations_of_attention_grow_with_the_text():
    recipe = Recipe(data=("x",), parameters=200_000)
    for family in ("llama", "strided", "linear"):
        model = new_model(recipe, Cell(family))
        short, long = (training_cost(model, 1, length, "adamw")["flops_per_token"] for length in (64, 256))
        width, layers = model.config.hidden_size, model.config.num_hidden_layers
        if family == "llama":  # forward 2 products of T by the width for each token and layer, backward 5 more
            assert long - short == pytest.approx(2 * 7 * (256 - 64) * width * layers, rel=1e-6)
        assert long > short


def test_what_a_model_marks_does_not_decay():
    for family in ("s4d", "rwkv7", "mamba"):
        names = decayed_parameters(build(family, length=32, width=32, layers=1))
        assert names
        assert not [name for name in names if name.endswith(("log_decay", "read_real", "shift", "key_scales", "A_log"))]


@pytest.mark.slow
def test_cells_run_in_processes_of_their_own(text):
    recipe = Recipe(data=(text,), parameters=200_000, length=16, batch=2, scale=0.02)
    cells = [Cell("llama"), Cell("kneser-ney", 64, 1e-3)]
    done = {}
    for one in run_cells(recipe, lambda: [cell for cell in cells if cell not in done], 2):
        done[one.cell] = one.found
    assert done[cells[0]]["faults"] == []
    assert [point["context"] for point in done[cells[0]]["decoding"]] == [0, 1_000, 4_000]
    assert done[cells[0]]["decoding_ends"] == ""
    assert done[cells[1]]["scores"]["fresh"]["tokens"] > 0


def test_a_worker_with_another_text_is_refused(text):
    recipe = Recipe(data=(text,), parameters=200_000, length=16, batch=2, text="another")
    with pytest.raises(UserError, match="another text here"):
        run_cell(recipe, Cell("llama", 640, 4e-3))
