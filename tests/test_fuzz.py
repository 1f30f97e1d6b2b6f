"""Files that a user hands in are not believed: whatever bytes they hold, the answer is a sentence or a whole result.

Each target takes a valid file, and changes it as hypothesis likes: bytes, entries of JSON, names and shapes of tensors.
`DYADLM_FUZZ_EXAMPLES=100000` goes on for hours.
"""

import contextlib
import json
import os
import shutil
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file
from safetensors.torch import load_file as load_torch

from dyadlm import DyadCache, DyadConfig, DyadForCausalLM, RunFailed, UserError
from dyadlm.data import byte_tokenizer, open_dataset, open_source, prepare
from dyadlm.engine import Engine
from dyadlm.generate import engine_model, load_model
from dyadlm.state_file import FORMAT
from dyadlm.train import TrainSettings
from dyadlm.train.checkpoint import read_manifest, write_manifest
from dyadlm.train.settings import read_record
from dyadlm.train.verification import verify

SAID = (UserError, RunFailed)
few = settings(
    max_examples=int(os.environ.get("DYADLM_FUZZ_EXAMPLES", "40")),
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)

scalars = st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=8)
values = st.recursive(
    scalars, lambda part: st.lists(part, max_size=3) | st.dictionaries(st.text(max_size=5), part, max_size=3)
)
# A byte that changes, a cut, and bytes that are put in.
spoils = st.tuples(st.sampled_from(["flip", "cut", "put"]), st.floats(0, 1), st.binary(min_size=1, max_size=9))


def spoilt(content: bytes, spoil) -> bytes:
    how, place, more = spoil
    at = int(place * max(len(content) - 1, 0))
    if how == "cut":
        return content[:at]
    return content[:at] + more + content[at + (len(more) if how == "flip" else 0) :]


def changed(content, path, value):
    """JSON with one entry replaced: `path` picks at each depth."""
    if isinstance(content, dict) and content and path:
        key = sorted(content)[path[0] % len(content)]
        return {**content, key: changed(content[key], path[1:], value)}
    if isinstance(content, list) and content and path:
        at = path[0] % len(content)
        return [*content[:at], changed(content[at], path[1:], value), *content[at + 1 :]]
    return value


paths = st.lists(st.integers(0, 60), min_size=1, max_size=4)


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    small = {"hidden_size": 16, "num_hidden_layers": 2, "slot_entries": 16, "slot_layers": [1], "intermediate_size": 16}
    DyadForCausalLM(DyadConfig.from_preset("tiny", **small)).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def state(model, tmp_path_factory) -> Path:
    engine = Engine.from_folder(model)
    held = engine.start()
    for token in b"to be":
        engine.step(held, token)
    path = tmp_path_factory.mktemp("state") / "state"
    engine.save_state(held, path)
    return path


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    (folder / "text.txt").write_text("to be or not to be\n" * 60)
    prepare([folder / "text.txt"], folder / "prepared")
    return folder / "prepared"


@pytest.fixture
def place(tmp_path) -> Path:
    return tmp_path


def copied(folder: Path, place: Path) -> Path:
    shutil.rmtree(place / "copy", ignore_errors=True)
    return Path(shutil.copytree(folder, place / "copy"))


def load_both(path: Path, folder: Path) -> None:
    """As a session does: into the engine and into torch. A state that is taken can be read on from."""
    engine, config = Engine.from_folder(folder), DyadConfig.from_pretrained(folder)
    for load in (engine.load_state, lambda file: DyadCache.load(file, config)):
        try:
            found = load(path)
        except SAID:
            continue
        if not isinstance(found, DyadCache) and found.rows == 1:
            engine.step(found, 65)  # a session refuses what is no number then


@few
@given(spoil=spoils)
def test_states_of_any_bytes(state, model, place, spoil):
    (place / "state").write_bytes(spoilt(state.read_bytes(), spoil))
    load_both(place / "state", model)
    verify(place / "state")


@few
@given(st.data())
def test_states_of_any_tensors(state, model, place, data):
    tensors = load_file(state)
    for _ in range(data.draw(st.integers(1, 3))):
        name = data.draw(st.sampled_from(sorted(tensors)))
        how = data.draw(st.sampled_from(["drop", "rename", "shape", "dtype", "value"]))
        tensor = tensors.pop(name)
        if how == "rename":
            tensors[name + data.draw(st.sampled_from([".0", "x", ""]))] = tensor
        elif how == "shape":
            tensors[name] = np.ascontiguousarray(tensor.reshape(-1)[: data.draw(st.integers(0, tensor.size))])
        elif how == "dtype":
            kind = data.draw(st.sampled_from(["<f4", "<f2", "<i8", "<i4", "u1", "?"]))
            with np.errstate(all="ignore"):
                tensors[name] = np.nan_to_num(tensor).astype(kind)
        elif how == "value":
            wild = np.array(data.draw(st.sampled_from([-1, 2**40, 1e30, np.inf, np.nan])))
            with np.errstate(all="ignore"):
                tensors[name] = np.full_like(tensor, wild.astype(tensor.dtype))
        if not tensors:
            return
    head = {"format": FORMAT, "model": Engine.from_folder(model).signature, "columns_seen": "5"}  # as 0.1 wrote it
    save_file(tensors, place / "state", head)
    load_both(place / "state", model)


@few
@given(
    name=st.sampled_from(["config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json"]),
    spoil=spoils,
)
def test_model_folders_of_any_bytes(model, place, name, spoil):
    folder = copied(model, place)
    (folder / name).write_bytes(spoilt((folder / name).read_bytes(), spoil))
    load_folder(folder)


@few
@given(
    name=st.sampled_from(["config.json", "tokenizer_config.json", "generation_config.json"]), path=paths, value=values
)
def test_model_folders_of_any_entries(model, place, name, path, value):
    folder = copied(model, place)
    content = json.loads((folder / name).read_text())
    (folder / name).write_text(json.dumps(changed(content, path, value)))
    load_folder(folder)


def load_folder(folder: Path) -> None:
    try:
        light = engine_model(folder, "cpu", "auto")
        if light is not None:
            light.reader().read(np.array([65, 66]))
    except SAID:
        pass
    with contextlib.suppress(SAID):
        load_model(folder, "cpu")


@few
@given(spoil=spoils)
def test_weights_of_any_bytes(model, place, spoil):
    folder = copied(model, place)
    (folder / "model.safetensors").write_bytes(spoilt((folder / "model.safetensors").read_bytes(), spoil))
    load_folder(folder)
    verify(folder)


@few
@given(path=paths, value=values)
def test_manifests_of_any_entries(data, place, path, value):
    folder = copied(data, place)
    content = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps(changed(content, path, value)))
    try:
        found = open_dataset(folder)
        for name in found.manifest.splits:
            stream = found.split(name)
            stream.tokens(0, len(stream))
    except SAID:
        pass
    verify(folder)


@few
@given(path=paths, value=values)
def test_records_of_any_entries(place, path, value):
    settings_ = TrainSettings.create(place / "run", preset="tiny", data=["text.txt"]).to_dict()
    content = {"settings": settings_, "result": {"steps": 3}, "earlier": []}
    (place / "run").mkdir(exist_ok=True)
    (place / "run" / "dyadlm.json").write_text(json.dumps(changed(content, path, value)))
    with contextlib.suppress(SAID):
        TrainSettings.from_dict(read_record(place / "run")["settings"], output=place / "run", resume=True)
    verify(place / "run")


@few
@given(path=paths, value=values)
def test_checkpoint_manifests_of_any_entries(place, path, value):
    folder = place / "checkpoint-2"
    folder.mkdir(exist_ok=True)
    (folder / "weights").write_bytes(b"content")
    (folder / "checkpoint.json").unlink(missing_ok=True)
    write_manifest(folder, 2, {"data": "x"})
    content = json.loads((folder / "checkpoint.json").read_text())
    (folder / "checkpoint.json").write_text(json.dumps(changed(content, path, value)))
    read_manifest(folder)
    verify(folder)


@few
@given(
    name=st.sampled_from(["a", "a.json", "a.jsonl", "a.JSON.gz", "a.parquet", "a.zip", "a.xz", "a.zst", "a.bz2"]),
    head=st.sampled_from(
        [b"", b"\x1f\x8b", b"BZh9", b"\xfd7zXZ\x00", b"\x28\xb5\x2f\xfd", b"PK\x03\x04", b"PAR1", b"[{", b'{"text": "']
    ),
    rest=st.binary(max_size=200),
)
def test_sources_of_any_bytes(place, name, head, rest):
    (place / name).write_bytes(head + rest)
    try:
        for passage in open_source(place / name).splits["train"]():
            assert isinstance(passage.content, bytes)
    except SAID:
        pass


@few
@given(sizes=st.lists(st.integers(-(2**63), 2**63 - 1), min_size=1, max_size=3), body=st.binary(max_size=64))
def test_headers_of_safetensors_that_lie(model, place, sizes, body):
    """Offsets and sizes beyond the file."""
    folder = copied(model, place)
    names = sorted(load_torch(folder / "model.safetensors"))[: len(sizes)]
    header = {
        name: {"dtype": "F32", "shape": [abs(size) % 1000], "data_offsets": [0, size]}
        for name, size in zip(names, sizes, strict=True)
    }
    text = json.dumps(header).encode()
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + body)
    load_folder(folder)
