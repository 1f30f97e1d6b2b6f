"""The engine is the model: logits and states, in the compiled form, the numpy form and the form for many rows."""

import copy
import json
import logging
import pickle
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from dyadlm import DyadCache, DyadConfig, UserError
from dyadlm import engine as engine_package
from dyadlm.engine import Engine, unsupported
from dyadlm.engine.compiled_rows import CompiledLoops
from dyadlm.engine.layout import REQUIRED
from dyadlm.engine.pack import FORMATS, Matrix
from dyadlm.errors import RunFailed

from .conftest import engine_of, make_model, text


def require_equal(found, expected):
    """Within rounding: 1e-5 of the spread of the logits by root mean square, four times as much anywhere."""
    error = np.abs(found - expected) / expected.std()
    assert np.sqrt((error**2).mean()) < 1e-5
    assert error.max() < 4e-5


def read_by_torch(model, ids, cache=None):
    with torch.no_grad():
        out = model(torch.from_numpy(ids)[None], past_key_values=cache, use_cache=True)
    return out.logits[0].numpy(), out.past_key_values


def read_by_engine(engine, ids, state=None):
    state = state or engine.start()
    return np.stack([engine.step(state, token) for token in ids.tolist()]), state


def require_equal_states(found, expected):
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        np.testing.assert_allclose(found[name], tensor.numpy(), rtol=1e-4, atol=1e-4, err_msg=name)
        assert found[name].dtype == tensor.numpy().dtype, name


@pytest.fixture(params=["compiled", "numpy"])
def form(request, monkeypatch):
    if request.param == "numpy":
        without_numba(monkeypatch)
    return request.param


def without_numba(monkeypatch):
    monkeypatch.setattr(engine_package, "_compiled_step", lambda: None)
    monkeypatch.setattr(engine_package, "_loops", engine_package.numpy_step.Loops)


@pytest.mark.parametrize("count", [1, 2, 7, 300])
def test_logits_and_state_are_those_of_the_model(model, form, count):
    ids = text(count)
    expected, cache = read_by_torch(model, ids)
    engine = engine_of(model)
    logits, state = read_by_engine(engine, ids)
    require_equal(logits, expected)
    require_equal_states(state.tensors(), cache.tensors())
    assert state.columns_seen == count


@pytest.mark.parametrize("sizes", [[2], [1, 90, 3], [300], [64, 236]])
def test_many_tokens_at_once_are_tokens_one_by_one(model, sizes, monkeypatch):
    """Logits and state, over the edges of pieces; then the step reads on."""
    monkeypatch.setattr(engine_package, "MOST_TOKENS", 128)
    engine, ids, at = engine_of(model), text(sum(sizes) + 5), 0
    expected, alone = read_by_engine(engine, ids)
    state, logits = engine.start(), []
    for size in sizes:
        logits.append(engine.read(state, ids[at : at + size]))
        at += size
    logits.append(read_by_engine(engine, ids[at:], state)[0])
    require_equal(np.concatenate(logits), expected)
    assert state.columns_seen == len(ids)
    require_equal_states(state.tensors(), {name: torch.from_numpy(part) for name, part in alone.tensors().items()})


def test_many_tokens_are_read_in_one_product(monkeypatch):
    """In float32; narrow weights are read token by token, since they would have to be widened."""
    seen = []
    step = engine_package.numpy_step.step
    monkeypatch.setattr(engine_package.numpy_step, "step", lambda *rest: (seen.append(1), step(*rest))[1])
    for weights, products in (("float32", 1), ("int8", 0)):
        engine, other = engine_of(make_model(), weights=weights), engine_of(make_model(), weights=weights)
        seen.clear()
        state = engine.start()
        logits = engine.read(state, text(40))
        assert len(seen) == products
        require_equal(logits, read_by_engine(other, text(40))[0])
        with pytest.raises(IndexError, match="The vocabulary has 259 tokens"):
            engine.read(state, np.array([1, 259]))
        with pytest.raises(UserError, match="another engine"):
            other.read(state, text(3))


def test_a_state_crosses_inside_a_document_both_ways(model, form):
    """Torch, engine, torch, at odd places between two nodes of the dual levels."""
    ids = text(157)
    expected, whole = read_by_torch(model, ids)
    engine = engine_of(model)
    first, cache = read_by_torch(model, ids[:53])
    state = engine.state_from({name: part.numpy() for name, part in cache.tensors().items()}, cache.columns_seen)
    second, state = read_by_engine(engine, ids[53:101], state)
    from dyadlm.engine.bridge import cache_of

    third, cache = read_by_torch(model, ids[101:], cache_of(state))
    require_equal(np.concatenate([first, second, third]), expected)
    require_equal_states({name: part.numpy() for name, part in cache.tensors().items()}, whole.tensors())
    assert cache.columns_seen == 157


@pytest.mark.parametrize("loops", [engine_package.numpy_step.Loops, CompiledLoops])
def test_rows_in_one_product_are_rows_alone(model, loops):
    """Of several lengths, so that nothing is due at the same token."""
    engine, rows = engine_of(model), 12
    alone = [read_by_engine(engine, text(5 + 9 * row, row))[1] for row in range(rows)]
    together = engine.start(rows)
    for name, array in together.arrays().items():
        array[:] = np.concatenate([getattr(state, name) for state in alone])
    for at in range(40):
        tokens = [int(text(1, 5 + 9 * row + row + at)[0]) for row in range(rows)]
        expected = np.stack([engine.step(state, token) for state, token in zip(alone, tokens, strict=True)])
        logits = engine_package.numpy_step.step(engine.shape, engine.weights, together, np.array(tokens), loops())
        require_equal(logits, expected)
    found = together.tensors()
    for row, state in enumerate(alone):
        for name, array in state.tensors().items():
            np.testing.assert_allclose(found[name][row], array[0], rtol=1e-4, atol=1e-4, err_msg=name)


def test_many_rows_are_read_in_one_product(monkeypatch):
    engine = engine_of(make_model())
    seen = []
    step = engine_package.numpy_step.step
    monkeypatch.setattr(engine_package.numpy_step, "step", lambda *rest: (seen.append(1), step(*rest))[1])
    for rows in (1, engine_package.MANY_ROWS - 1, engine_package.MANY_ROWS):
        engine.step_rows(engine.start(rows), [65] * rows)
    assert len(seen) == 1


@pytest.mark.parametrize("scope", ["document", "stream"])
def test_a_new_document_recalls_what_the_scope_says(scope, form):
    model = make_model(slot_scope=scope, slot_layers=[0, 2])
    engine, ids = engine_of(model), text(90)
    _, cache = read_by_torch(model, ids)
    _, state = read_by_engine(engine, ids)
    cache.start_document()
    state.start_document()
    kept = engine.state_from({name: part.numpy() for name, part in cache.tensors().items()}, 0)
    expected, _ = read_by_torch(model, ids[:40], cache)
    for begun in (state, kept):
        logits, _ = read_by_engine(engine, ids[:40], begun)
        require_equal(logits, expected)


def test_copies_and_choices_of_rows_go_on_by_themselves():
    engine = engine_of(make_model())
    _, state = read_by_engine(engine, text(30))
    twin, pair = state.copy(), state.select([0, 0])
    first = engine.step(state, 65)
    engine.step(state, 66)
    assert np.array_equal(first, engine.step(twin, 65))
    assert np.allclose(engine.step_rows(pair, [65, 66])[0], first, atol=1e-5)


def test_threads_may_share_an_engine():
    """Each with a state of its own. Compiled code runs without Python's lock."""
    engine, texts = engine_of(make_model()), [text(400, begin) for begin in (0, 50, 90, 130)]
    alone = [read_by_engine(engine, ids)[0] for ids in texts]
    with ThreadPoolExecutor(4) as threads:
        together = list(threads.map(lambda ids: read_by_engine(engine, ids)[0], texts))
    for mine, theirs in zip(together, alone, strict=True):
        assert np.array_equal(mine, theirs)


def test_saved_states_are_those_of_torch(tmp_path):
    model = make_model()
    engine, ids = engine_of(model), text(70)
    _, cache = read_by_torch(model, ids)
    _, state = read_by_engine(engine, ids)
    cache.save(tmp_path / "torch", model.config)
    engine.save_state(state, tmp_path / "engine")
    mine, theirs = load_file(tmp_path / "engine"), load_file(tmp_path / "torch")
    assert mine.keys() == theirs.keys()
    for name, tensor in theirs.items():
        torch.testing.assert_close(mine[name], tensor, rtol=1e-4, atol=1e-4)
    after, _ = read_by_torch(model, text(1, 70), DyadCache.load(tmp_path / "engine", model.config))
    assert np.abs(engine.step(engine.load_state(tmp_path / "torch"), int(text(1, 70)[0])) - after[0]).max() < 1e-4
    other = engine_of(make_model(slot_entries=32))
    for name in ("torch", "engine"):
        with pytest.raises(UserError, match="slot_entries=64; use it with --set slot_entries=64"):
            other.load_state(tmp_path / name)


def test_damaged_states_are_refused():
    model = make_model()
    engine = engine_of(model)
    _, cache = read_by_torch(model, text(30))
    good = {name: part.numpy() for name, part in cache.tensors().items()}
    engine.state_from(good, 30)
    some = next(name for name in good if ".rings." in name)
    for bad in (
        {**good, "other": good["position"]},
        {name: part for name, part in good.items() if name != some},
        {**good, some: good[some][:, :-1]},
        {**good, some: good[some].astype(np.int64)},
        {**good, "position": np.array([-3])},
        {**good, "text.counts.0": good["text.counts.0"] - 100},
    ):
        with pytest.raises(UserError):
            engine.state_from(bad, 30)


@pytest.mark.parametrize(("weights", "bound"), [("bfloat16", 0.02), ("int8", 0.1)])
def test_narrow_weights_are_close(weights, bound, form):
    """And read fewer bytes. The compiled form and numpy agree on what they round to."""
    model, ids = make_model(), text(120)
    exact, _ = read_by_torch(model, ids)
    engine = engine_of(model, weights=weights)
    logits, _ = read_by_engine(engine, ids)
    error = np.abs(logits - exact).std() / exact.std()
    assert 1e-4 < error < bound
    assert engine.weight_bytes < 0.6 * engine_of(model).weight_bytes


def test_both_forms_round_alike(monkeypatch):
    model, ids = make_model(), text(60)
    for weights in ("bfloat16", "int8"):
        monkeypatch.undo()
        compiled, _ = read_by_engine(engine_of(model, weights=weights), ids)
        without_numba(monkeypatch)
        plain, _ = read_by_engine(engine_of(model, weights=weights), ids)
        require_equal(compiled, plain)


def test_without_numba_numpy_decodes_and_the_log_says_so(monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "dyadlm.engine.numba_step", None)
    for cached in (engine_package._compiled_step, engine_package._loops):
        cached.cache_clear()
    try:
        model = make_model()
        with caplog.at_level(logging.WARNING, "dyadlm.engine"):
            engine = engine_of(model)
        assert "several times slower" in caplog.text
        expected, _ = read_by_torch(model, text(20))
        logits, _ = read_by_engine(engine, text(20))
        require_equal(logits, expected)
    finally:
        for cached in (engine_package._compiled_step, engine_package._loops):
            cached.cache_clear()


@pytest.mark.parametrize("sizes", [[1] * 45, [12, 12, 1, 12, 8], [12, 33]])
def test_numpy_reads_the_first_tokens_and_then_numba(sizes):
    model, ids = make_model(), text(45)
    expected, _ = read_by_torch(model, ids)
    engine, at = engine_of(model, compile_after=25), 0
    state = engine.start()
    for size in sizes:
        require_equal(engine.read(state, ids[at : at + size]), expected[at : at + size])
        at += size
        assert (engine._compiled is not None) == (at >= 25)
    assert engine.is_compiled


def test_without_a_folder_for_compiled_code_numpy_decodes(tmp_path):
    """As in a container whose files cannot be written. A process of its own, since numba looks once."""
    program = (
        "import sys, logging\n"
        "logging.basicConfig(level=logging.WARNING)\n"
        "from numba.core import caching\n"
        "caching.CacheImpl._locator_classes = []\n"
        "from dyadlm import engine\n"
        "assert engine._compiled_step() is None\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "NUMBA_CACHE_DIR" in done.stderr


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"selector": "topk", "selector_heads": 4, "selector_margin": 0.1}, "selector"),
        ({"semantic_levels": ["learned"]}, "learned boundary"),
        ({"level_rank": [4] * 7 + [5]}, "several ranks"),
        ({"level_feature": "pair"}, "level_feature"),
        ({"level_alignment": "block"}, "sliding and then dual"),
        ({"slot_contexts": ["code"]}, "learned code"),
        ({"slot_contexts": [40]}, "too long"),
        ({"forgetting": True}, "forget"),
    ],
)
def test_what_the_engine_cannot_run_is_named(fields, reason):
    model = make_model(**{"slot_layers": [1], **fields})
    assert reason in (unsupported(model.config.to_dict()) or "")
    with pytest.raises(UserError, match=reason):
        engine_of(model)


def test_wrong_requests_are_errors():
    engine = engine_of(make_model())
    for token in (-1, 259):
        with pytest.raises(IndexError, match="vocabulary"):
            engine.step(engine.start(), token)
    with pytest.raises(ValueError, match="2 rows"):
        engine.step_rows(engine.start(2), [65])
    with pytest.raises(UserError, match="int4"):
        engine_of(make_model(), weights="int4")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("num_levels", 0),
        ("num_levels", "many"),
        ("hidden_size", -4),
        ("slot_ways", 0),
        ("slot_entries", 24),
        ("slot_layers", [7]),
        ("slot_contexts", [0]),
        ("vocab_size", 1.5),
        ("level_rank", None),
        ("semantic_levels", [3]),
        ("hidden_size", 48),
    ],
)
def test_damaged_folders_are_refused(tmp_path, name, value):
    """Before compiled code reads past the end of an array."""
    make_model().save_pretrained(tmp_path)
    Engine.from_folder(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), name: value}))
    with pytest.raises(UserError):
        Engine.from_folder(tmp_path)


def test_damaged_weights_are_refused(tmp_path):
    make_model().save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    whole = path.read_bytes()
    weights = {name: tensor.clone() for name, tensor in load_file(path).items()}  # the file is about to change
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match="no model folder"):
        Engine.from_folder(tmp_path)
    for name, changed in (
        ("model.boundaries.marks", weights["model.boundaries.marks"].float()),
        ("model.norm.weight", weights["model.norm.weight"].long()),
        ("model.embed_tokens.weight", weights["model.embed_tokens.weight"][:-1].clone()),
    ):
        save_file({**weights, name: changed}, path)
        with pytest.raises(UserError):
            Engine.from_folder(tmp_path)


def test_folders_without_a_model_are_refused(tmp_path):
    with pytest.raises(UserError, match="no model folder"):
        Engine.from_folder(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(UserError):
        Engine.from_folder(tmp_path)


def test_the_engine_imports_neither_torch_nor_transformers():
    program = (
        "import sys, dyadlm.engine, dyadlm.engine.numba_step; "
        "assert not {'torch', 'transformers'} & set(sys.modules), sorted(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


def test_a_state_of_another_engine_is_refused():
    """Compiled code does not look where an array ends."""
    small, large = engine_of(make_model()), engine_of(make_model(num_hidden_layers=4))
    alike = engine_of(make_model(num_levels=6))
    for engine, state in ((large, small.start()), (small, large.start()), (alike, engine_of(make_model()).start())):
        with pytest.raises(UserError, match="belongs to another engine"):
            engine.step(state, 65)


def test_copies_of_a_state_that_was_used():
    engine = engine_of(make_model())
    state = engine.start()
    for token in text(20):
        engine.step(state, int(token))
    for twin in (copy.deepcopy(state), pickle.loads(pickle.dumps(state))):  # noqa: S301 - our own
        own = engine.state_from(twin.tensors(), twin.columns_seen)
        assert own.position == 20
        np.testing.assert_allclose(engine.step(own, 65), engine.step(state.copy(), 65), rtol=1e-5, atol=1e-5)
        assert own.tensors()["position"].tolist() == [21]


def test_an_engine_keeps_copies_of_its_weights_alone():
    model = make_model()
    tensors = {name: part.numpy() for name, part in model.state_dict().items()}
    engine = Engine(model.config.to_dict(), tensors, weights="int8")
    held = [value for value in vars(engine.weights).values() if isinstance(value, np.ndarray)]
    held += [part for matrix in vars(engine.weights).values() if isinstance(matrix, Matrix) for part in matrix]
    assert not any(np.shares_memory(part, tensor) for part in held for tensor in tensors.values())
    assert not any(isinstance(value, dict) and value for value in vars(engine.weights).values())


def test_weights_that_are_not_numbers_are_refused_in_every_form():
    model = make_model()
    with torch.no_grad():
        model.model.layers[0].mlp.down.weight[0, 0] = torch.inf
    for form in FORMATS:
        with pytest.raises(RunFailed, match=r"model.layers.0.mlp.down.weight holds values that are not numbers"):
            engine_of(model, weights=form)


def test_one_file_wins_over_an_index_as_in_transformers(tmp_path):
    make_model().save_pretrained(tmp_path)
    other = make_model()
    with torch.no_grad():
        other.model.norm.weight.mul_(2)
    other.save_pretrained(tmp_path / "other")
    (tmp_path / "other" / "model.safetensors").rename(tmp_path / "part.safetensors")
    index = {"metadata": {}, "weight_map": dict.fromkeys(load_file(tmp_path / "model.safetensors"), "part.safetensors")}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    engine = Engine.from_folder(tmp_path)
    np.testing.assert_array_equal(engine.weights.norm, make_model().model.norm.weight.detach().numpy())
    (tmp_path / "model.safetensors").unlink()
    np.testing.assert_array_equal(Engine.from_folder(tmp_path).weights.norm, other.model.norm.weight.detach().numpy())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_folders_in_half_precision(tmp_path, dtype):
    model = make_model().to(dtype)
    model.save_pretrained(tmp_path)
    engine = Engine.from_folder(tmp_path)
    expected = model.model.layers[0].mlp.down.weight.float().detach().numpy()
    np.testing.assert_array_equal(engine.weights.wide("down")[0], expected)


def test_the_defaults_of_the_configuration_are_those_of_the_model():
    config = DyadConfig()
    for name, _, default, _ in REQUIRED:
        assert getattr(config, name) == default, name


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("level_alignment", 5), ("level_alignment", None), ("semantic_levels", 3), ("slot_contexts", 5),
        ("rms_norm_eps", -1.0), ("rms_norm_eps", float("nan")), ("tie_word_embeddings", "no"), ("level_rank", None),
    ],
)  # fmt: skip
def test_fields_that_no_model_can_have(name, value):
    model = make_model()
    tensors = {key: part.numpy() for key, part in model.state_dict().items()}
    with pytest.raises(UserError, match=r"damaged|cannot run"):
        Engine({**model.config.to_dict(), name: value}, tensors)


def test_a_configuration_that_lacks_fields():
    model = make_model()
    tensors = {key: part.numpy() for key, part in model.state_dict().items()}
    fields = model.config.to_dict()
    for name in fields:
        rest = {key: value for key, value in fields.items() if key != name}
        try:
            engine = Engine(rest, tensors)
        except UserError:
            continue
        assert engine.signature == engine_of(model).signature, name
