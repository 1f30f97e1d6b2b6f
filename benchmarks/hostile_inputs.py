"""The trials of `hostile.py`: one function for each class, which damages copies of intact inputs.

The first trial that a function yields is the intact one. Files are made anew for each trial, in `place`.
"""

import bz2
import contextlib
import gzip
import io
import json
import lzma
import os
import random
import shutil
import signal
import struct
import time
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import torch
import zstandard
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from dyadlm.files import sha256_of

SAMPLE = 40  # of what is drawn at random, in each class
ODD = (None, "x", -1, 0, 1.5, True, [], {}, [None], 2**70, float("nan"), "../x")
NEXT = b"bad cafe dab.\nfade\n"


@dataclass
class Told:
    """What a call left: its exit code (below zero: the signal that ended it; None: it hung) and its outputs."""

    code: int | None
    out: bytes
    err: bytes


def shown(told: Told) -> Any:
    """The whole output."""
    return told.out


def loss(told: Told) -> Any:
    """The loss of `evaluate --json`."""
    found = json.loads(told.out)
    return found["nats_per_token"], found["tokens"]


@dataclass
class Trial:
    """A call of the command line. expect: `same` figure as the intact input, `refuse`, or `any` good end.

    act: what is done to the process while it runs. check: instead of `expect`, whether an end is right. A name
    `KIND: ...` is compared with the intact trial `intact KIND`, where there is one.
    """

    name: str
    arguments: list[str]
    expect: str = "same"
    stdin: bytes = b""
    figure: Callable[[Told], Any] = shown
    act: Callable[[int, Any, Any], None] | None = None
    check: Callable[[Told], bool] | None = None


@dataclass
class Intact:
    """The undamaged inputs, by name."""

    place: Path

    def __truediv__(self, name: str) -> Path:
        return self.place / name


Trials = Iterator[Trial]


def spoilt(draw: random.Random, content: bytes, within: int | None = None) -> tuple[str, bytes]:
    """Content with a bit flipped, cut off, or with bytes put in, in its first `within` bytes."""
    at, how = draw.randrange(min(within or len(content), len(content))), draw.choice(["flip", "cut", "put"])
    changed = {
        "flip": content[:at] + bytes([content[at] ^ 1 << draw.randrange(8)]) + content[at + 1 :],
        "cut": content[:at],
        "put": content[:at] + draw.randbytes(4) + content[at:],
    }[how]
    return f"{how} at {at}", changed


def entries(content: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The places of all entries of JSON."""
    inner = content.items() if isinstance(content, dict) else enumerate(content) if isinstance(content, list) else ()
    return [place for key, value in inner for place in [(*path, key), *entries(value, (*path, key))]]


def changed(content: Any, path: tuple[Any, ...], value: Any) -> Any:
    """JSON with one entry replaced, or removed where the value is Ellipsis."""
    copy = json.loads(json.dumps(content))
    inner = copy
    for key in path[:-1]:
        inner = inner[key]
    if value is ...:
        del inner[path[-1]]
    else:
        inner[path[-1]] = value
    return copy


def odd_entries(draw: random.Random, file: Path, number: int, leave: tuple[str, ...] = ()) -> Trials:
    """Names and texts of JSON files with one entry that is odd or missing. leave: keys whose change nothing shows."""
    content = json.loads(file.read_text())
    places = [path for path in entries(content) if not set(map(str, path)) & set(leave)]
    for _ in range(number):
        path, value = draw.choice(places), draw.choice([*ODD, ...])
        what = "missing" if value is ... else f"= {value!r}"
        yield f"{'.'.join(map(str, path))} {what}", json.dumps(changed(content, path, value))


def tensor_damages(tensors: dict[str, np.ndarray], draw: random.Random) -> Iterator[tuple[str, dict[str, np.ndarray]]]:
    """Tensors missing, of other shapes and kinds, not numbers, or too many."""
    for name in draw.sample(sorted(tensors), min(12, len(tensors))):
        tensor = tensors[name]
        yield f"without {name}", {key: value for key, value in tensors.items() if key != name}
        how = draw.choice(["flat", "shorter", "longer", "integer", "half", "complex", "nan", "empty"])
        with np.errstate(all="ignore"):
            other = {
                "flat": lambda t: t.reshape(-1),
                "shorter": lambda t: t[..., :-1] if t.ndim else t[None],
                "longer": lambda t: np.concatenate([t, t], axis=-1) if t.ndim else t[None],
                "integer": lambda t: np.nan_to_num(t).astype(np.int32 if t.dtype != np.int32 else np.int64),
                "half": lambda t: np.nan_to_num(t).astype(np.float16),
                "complex": lambda t: np.nan_to_num(t).astype(np.uint8),
                "nan": lambda t: np.full_like(
                    t, np.nan if t.dtype.kind == "f" else -(2**30) if t.dtype.kind == "i" else 1
                ),
                "empty": lambda t: t.reshape(-1)[:0],
            }[how](tensor)
        if other.shape != tensor.shape or other.dtype != tensor.dtype or (how == "nan" and tensor.dtype.kind == "f"):
            yield f"{name} {how}", {**tensors, name: np.ascontiguousarray(other)}
    yield "one tensor more", {**tensors, "more": np.zeros(3, np.float32)}
    yield "no tensors", {}


# ---- 1: saved states


def states(draw: random.Random, intact: Intact, place: Path) -> Trials:
    """States that `--state-in` takes up, as they are written and as version 0.1 wrote them, without a checksum."""
    state, file = intact / "state", place / "state"
    command = ["stream", str(intact / "run"), "--json", "--device", "cpu", "--state-in"]

    def trial(name: str) -> Trial:
        return Trial(name, [*command, str(file)], stdin=NEXT)

    shutil.copy(state, file)
    yield trial("intact")
    for _ in range(SAMPLE):
        how, content = spoilt(draw, state.read_bytes())
        file.write_bytes(content)
        yield trial(how)
    with safe_open(str(state), "np") as opened:
        head = opened.metadata()
    old = {key: head[key] for key in ("format", "model", "columns_seen")}
    for kind, metadata in (("as written", head), ("as 0.1", old)):
        for how, tensors in tensor_damages(load_file(state), draw):
            save_file(tensors, file, metadata)
            yield trial(f"{kind}, {how}")
    for key in head:
        for value in (None, "", "-1", "x", "9" * 30):
            if key != "version" or value is not None:  # without a version it is one of 0.1, which needs no checksum
                save_file(load_file(state), file, {k: v for k, v in (head | {key: value}).items() if v is not None})
                yield trial(f"metadata {key} = {value!r}")
    save_file(load_file(state), file)
    yield trial("no metadata")
    for name in ("other-state", "text.txt", "run/model.safetensors"):
        shutil.copy(intact / name, file)
        yield trial(f"{name} instead")
    yield trial("nothing")
    file.mkdir()
    yield trial("a folder")
    os.mkfifo(file)
    yield trial("a pipe")


# ---- 2: checkpoints


def sign(folder: Path) -> None:
    """Make the manifest of a checkpoint agree with what is in it."""
    path = folder / "checkpoint.json"
    manifest = json.loads(path.read_text())
    for name in list(manifest["files"]):
        file = folder / name
        if file.exists():
            manifest["files"][name] = {"bytes": file.stat().st_size, "sha256": sha256_of(file)}
        else:
            del manifest["files"][name]
    path.write_text(json.dumps(manifest))


def interrupted(run: Path, copy: Path) -> Path:
    """A copy of a finished run as it was at its second checkpoint; returns the checkpoint."""
    shutil.copytree(run, copy, ignore=shutil.ignore_patterns("checkpoint-6"))
    (copy / "model.safetensors").unlink()
    record = json.loads((run / "dyadlm.json").read_text())
    del record["result"]
    (copy / "dyadlm.json").write_text(json.dumps(record))
    lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    (copy / "metrics.jsonl").write_text("".join(line for line in lines if json.loads(line)["step"] <= 4))
    return copy / "checkpoint-4"


def checkpoints(draw: random.Random, intact: Intact, place: Path) -> Trials:
    """Runs that are resumed from a damaged checkpoint: the weights of a run that was not stopped, or a sentence."""
    run = place / "run"

    def weights(told: Told) -> Any:
        path = run / "model.safetensors"
        return {name: tensor.tobytes() for name, tensor in load_file(path).items()} if path.exists() else None

    def trial(name: str, signed: bool) -> Trial:
        if signed:
            sign(run / "checkpoint-4")
        return Trial(
            f"{'signed, ' if signed else ''}{name}", ["train", "--output", str(run), "--resume"], figure=weights
        )

    interrupted(intact / "run", run)
    yield trial("intact", False)
    names = sorted(path.name for path in (intact / "run" / "checkpoint-4").iterdir())
    for name in names:
        if name.startswith("tokenizer") or name == "generation_config.json":
            continue
        for how in ("missing", "empty", "cut", "spoilt", "noise"):
            for signed in (False, True) if name != "checkpoint.json" else (False,):
                if signed and (how == "spoilt" or (how == "missing" and name == "checkpoint.json")):
                    continue  # nothing may show it
                file = interrupted(intact / "run", run) / name
                content = file.read_bytes()
                file.write_bytes(
                    {
                        "cut": content[: len(content) // 2],
                        "spoilt": spoilt(draw, content)[1],
                        "noise": draw.randbytes(99),
                    }.get(how, b"")
                )
                if how == "missing":
                    file.unlink()
                yield trial(f"{name} {how}", signed)
    for how, change in OPTIMIZERS.items():
        file = interrupted(intact / "run", run) / "optimizer.pt"
        content = torch.load(file, weights_only=True)
        change(content)
        torch.save(content, file)
        yield trial(f"optimizer.pt {how}", True)
    for how, tensors in tensor_damages(load_file(intact / "run/checkpoint-4/model.safetensors"), draw):
        file = interrupted(intact / "run", run) / "model.safetensors"
        save_file(tensors, file, {"format": "pt"})
        yield trial(f"model.safetensors {how}", True)
    # Of the others nothing shows whether they were so, or nothing depends on them.
    for name, leave in (("trainer_state.json", ("log_history",)), ("checkpoint.json", ())):
        for how, text in odd_entries(draw, intact / "run/checkpoint-4" / name, 12, leave):
            (interrupted(intact / "run", run) / name).write_text(text)
            yield trial(f"{name} {how}", name != "checkpoint.json")


def _moments(change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[dict[str, Any]], None]:
    def apply(content: dict[str, Any]) -> None:
        for state in content["state"].values():
            state["exp_avg"], state["exp_avg_sq"] = change(state["exp_avg"]), change(state["exp_avg_sq"])

    return apply


OPTIMIZERS: dict[str, Callable[[dict[str, Any]], Any]] = {
    "moments flat": _moments(lambda t: t.reshape(-1)),
    "moments shorter": _moments(lambda t: t.reshape(-1)[:1].clone()),
    "moments empty": _moments(lambda t: t.reshape(-1)[:0].clone()),
    "moments longer": _moments(lambda t: torch.cat([t, t])),
    "moments integer": _moments(lambda t: t.to(torch.int8)),
    "moments half": _moments(lambda t: t.half()),
    "moments nan": _moments(lambda t: torch.full_like(t, torch.nan)),
    "moments sparse": _moments(lambda t: t.to_sparse()),
    "moments expanded": _moments(lambda t: torch.zeros(1).expand(t.shape)),
    "no moments": lambda content: [state.pop("exp_avg") for state in content["state"].values()],
    "no state": lambda content: content["state"].clear(),
    "half of the state": lambda content: [content["state"].pop(key) for key in list(content["state"])[::2]],
    "no groups": lambda content: content["param_groups"].clear(),
    "one group": lambda content: content["param_groups"].pop(),
    "groups exchanged": lambda content: content["param_groups"].reverse(),
    "steps below zero": lambda content: [state["step"].fill_(-5) for state in content["state"].values()],
    "step a string": lambda content: [state.update(step="x") for state in content["state"].values()],
    "step of two numbers": lambda content: [state.update(step=torch.ones(2)) for state in content["state"].values()],
    "learning rate nan": lambda content: content["param_groups"][0].update(lr=float("nan")),
    "betas of strings": lambda content: content["param_groups"][0].update(betas=("a", "b")),
    "params twice": lambda content: content["param_groups"][0].update(
        params=[0] * len(content["param_groups"][0]["params"])
    ),
    "state a list": lambda content: content.update(state=[]),
}


# ---- 3: prepared data


def sign_shards(folder: Path) -> None:
    """Make the checksums of a manifest agree with its shards."""
    manifest = json.loads((folder / "manifest.json").read_text())
    for split in manifest["splits"].values():
        for shard in split["shards"]:
            if (folder / shard["file"]).exists():
                shard["sha256"] = sha256_of(folder / shard["file"])
    (folder / "manifest.json").write_text(json.dumps(manifest))


def set_offset(file: Path, name: str, at: int, value: int) -> None:
    """Change one offset of a column of lists where it lies in the file; pyarrow itself would refuse to write it."""
    content = file.read_bytes()
    buffer = pa.py_buffer(content)
    column = pa.ipc.open_stream(pa.BufferReader(buffer)).read_all().column(name).chunk(0)
    place = column.buffers()[1].address - buffer.address + 4 * (at % (len(column) + 1))
    file.write_bytes(content[:place] + struct.pack("<i", value) + content[place + 4 :])


def rewritten(file: Path, change: Callable[[pa.Table], pa.Table]) -> None:
    """Change the table of a shard."""
    table = change(pa.ipc.open_stream(pa.BufferReader(file.read_bytes())).read_all())
    with pa.OSFile(str(file), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)


def _ids(change: Callable[[list[Any]], Any]) -> Callable[[pa.Table], pa.Table]:
    def apply(table: pa.Table) -> pa.Table:
        rows = table.column("input_ids").to_pylist()
        change(rows[0])
        return replaced(table, "input_ids", pa.array(rows, pa.list_(pa.int32())))

    return apply


def replaced(table: pa.Table, name: str, column: Any) -> pa.Table:
    return table.set_column(table.column_names.index(name), name, column)


def _starts(change: Callable[[int], int]) -> Callable[[pa.Table], pa.Table]:
    def apply(table: pa.Table) -> pa.Table:
        column = table.column("segments")
        rows = [[s | {"start": change(s["start"])} for s in row] for row in column.to_pylist()]
        return replaced(table, "segments", pa.array(rows, column.type))

    return apply


OFFSETS = {
    "first -1": (0, -1),
    "first -2^30": (0, -(2**30)),
    "last 2^30": (-1, 2**30),
    "last -7": (-1, -7),
    "last 99999": (-1, 99999),
}
TABLES: dict[str, Callable[[pa.Table], pa.Table]] = {
    "ids -1": _ids(lambda row: row.__setitem__(5, -1)),
    "ids 300": _ids(lambda row: row.__setitem__(5, 300)),
    "ids 2^31-1": _ids(lambda row: row.__setitem__(0, 2**31 - 1)),
    "ids fewer": _ids(lambda row: row.pop()),
    "ids more": _ids(lambda row: row.append(7)),
    "an id null": _ids(lambda row: row.__setitem__(5, None)),
    "a row null": lambda t: replaced(t, "input_ids", pa.array([None] * len(t), pa.list_(pa.int32()))),
    "ids int64": lambda t: replaced(t, "input_ids", t.column("input_ids").cast(pa.list_(pa.int64()))),
    "ids float": lambda t: replaced(t, "input_ids", t.column("input_ids").cast(pa.list_(pa.float32()))),
    "ids text": lambda t: replaced(t, "input_ids", pa.array(["x"] * len(t))),
    "ids large lists": lambda t: replaced(t, "input_ids", t.column("input_ids").cast(pa.large_list(pa.int32()))),
    "index null": lambda t: replaced(t, "index_start", pa.array([None] * len(t), pa.int64())),
    "index text": lambda t: replaced(t, "index_start", pa.array(["0"] * len(t))),
    "segments null": lambda t: replaced(t, "segments", pa.array([None] * len(t), t.column("segments").type)),
    "segments none": lambda t: replaced(t, "segments", pa.array([[]] * len(t), t.column("segments").type)),
    "segments numbers": lambda t: replaced(t, "segments", pa.array([0] * len(t))),
    "starts beyond": _starts(lambda start: start + 10**6),
    "starts reversed": _starts(lambda start: -start),
    "starts all 0": _starts(lambda start: 0),
    "no rows": lambda t: t.slice(0, 0),
    "no ids": lambda t: t.drop_columns(["input_ids"]),
    "no segments": lambda t: t.drop_columns(["segments"]),
    "no index": lambda t: t.drop_columns(["index_start"]),
}
SAME_VALUES = ("ids int64", "ids float", "ids large lists")


def prepared(draw: random.Random, intact: Intact, place: Path) -> Trials:
    """Prepared folders whose shards, with the checksums made to agree, and manifests are damaged."""
    folder = place / "prepared"
    command = ["evaluate", str(intact / "run"), "--json", "--device", "cpu", "--data", str(folder)]
    train = [
        "train",
        "--preset",
        "tiny",
        "--output",
        str(place / "out"),
        "--data",
        str(folder),
        "--device",
        "cpu",
        "--set",
    ]
    train += ["max_steps=1", "data.sequence_length=32", "model.hidden_size=16", "model.num_hidden_layers=1"]
    shutil.copytree(intact / "prepared", folder)
    manifest = json.loads((folder / "manifest.json").read_text())
    shards = {name: split["shards"][0]["file"] for name, split in manifest["splits"].items()}
    yield Trial("intact", command, figure=loss)

    def damaged(split: str, change: Callable[[Path], Any], signed: bool = True) -> None:
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(intact / "prepared", folder)
        change(folder / shards[split])
        if signed:
            sign_shards(folder)

    shard_changes: dict[str, Callable[[Path], Any]] = {
        **{
            f"{column} offsets {how}": partial(set_offset, name=column, at=at, value=value)
            for column in ("input_ids", "segments")
            for how, (at, value) in OFFSETS.items()
        },
        **{how: partial(rewritten, change=change) for how, change in TABLES.items()},
    }
    for how, change in shard_changes.items():
        damaged("validation", change)
        yield Trial(how, command, "same" if how in SAME_VALUES else "refuse", figure=loss)
        if "offsets" in how or "ids" in how:
            damaged("train", change)
            yield Trial(f"train, {how}", train, "any" if how in SAME_VALUES else "refuse")
    simple: dict[str, Callable[[Path], Any]] = {
        "missing": Path.unlink,
        "empty": lambda file: file.write_bytes(b""),
        "text": lambda file: file.write_bytes(b"text"),
        "half": lambda file: file.write_bytes(file.read_bytes()[: file.stat().st_size // 2]),
        "noise": lambda file: file.write_bytes(draw.randbytes(999)),
    }
    for how, simply in simple.items():
        for signed in (False, True):
            damaged("validation", simply, signed)
            yield Trial(f"shard {how}{', signed' * signed}", command, "refuse", figure=loss)
    for _ in range(20):  # in the description of the columns
        damaged("validation", lambda file: file.write_bytes(spoilt(draw, file.read_bytes(), 700)[1]))
        yield Trial("shard's schema spoilt, signed", command, figure=loss)
    # Nothing depends on names, licences and counts of documents; bytes are believed.
    for how, text in odd_entries(
        draw, intact / "prepared/manifest.json", SAMPLE, ("bytes", "bytes_per_token", "documents")
    ):
        damaged("validation", lambda file: None, False)
        (folder / "manifest.json").write_text(text)
        yield Trial(f"manifest {how}", command, figure=loss)
    for _ in range(10):
        damaged("validation", lambda file: None, False)
        content = (folder / "manifest.json").read_bytes()
        (folder / "manifest.json").write_bytes(content[: draw.randrange(len(content) - 4)])
        yield Trial("manifest cut", command, "refuse", figure=loss)


# ---- 4: model folders


def models(draw: random.Random, intact: Intact, place: Path) -> Trials:
    """Folders of models, read by `stream` and by `evaluate`."""
    folder = place / "model"
    commands = {
        "stream": ["stream", str(folder), "--json", "--device", "cpu"],
        "evaluate": ["evaluate", str(folder), "--json", "--device", "cpu", "--data", str(intact / "prepared")],
    }

    def fresh() -> Path:
        shutil.rmtree(folder, ignore_errors=True)
        return Path(shutil.copytree(intact / "run", folder, ignore=shutil.ignore_patterns("checkpoint-*", "*.jsonl")))

    def trial(name: str, verb: str = "", expect: str = "same") -> Trial:
        verb = verb or draw.choice(sorted(commands))
        return Trial(f"{verb}: {name}", commands[verb], expect, NEXT, loss if verb == "evaluate" else shown)

    for verb in commands:
        fresh()
        yield Trial(f"intact {verb}", commands[verb], "same", NEXT, loss if verb == "evaluate" else shown)
    for how, text in odd_entries(draw, intact / "run/config.json", 2 * SAMPLE):
        if how != "max_position_embeddings missing":  # another window is a valid one
            (fresh() / "config.json").write_text(text)
            yield trial(f"config.json {how}")
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        for how in ("cut", "empty", "noise", "list", "null", "number"):
            file = fresh() / name
            content = file.read_bytes()
            other = {"cut": content[: draw.randrange(1, len(content) - 4)], "noise": draw.randbytes(99), "empty": b""}
            file.write_bytes(other.get(how, {"list": b"[]", "null": b"null", "number": b"7"}.get(how, b"")))
            yield trial(f"{name} {how}")
    for how, text in odd_entries(draw, intact / "run/generation_config.json", 12):
        (fresh() / "generation_config.json").write_text(text)
        yield trial(f"generation_config.json {how}")
    weights = load_file(intact / "run/model.safetensors")
    for how, tensors in tensor_damages(weights, draw):
        if how.endswith(" half"):  # weights may be stored so
            continue
        file = fresh() / "model.safetensors"
        save_file(tensors, file, {"format": "pt"})
        yield trial(f"weights {how}", expect="same" if "more" in how else "refuse")
    for how in ("cut", "empty", "noise", "missing", "header beyond the file"):
        file = fresh() / "model.safetensors"
        content = file.read_bytes()
        lie = struct.pack("<Q", 2**40) + content[8:]
        file.write_bytes(
            {"cut": content[:-99], "noise": draw.randbytes(999), "header beyond the file": lie}.get(how, b"")
        )
        if how == "missing":
            file.unlink()
        yield trial(f"weights {how}", expect="refuse")
    half = dict(list(weights.items())[::2])
    for how, map_ in {
        "a shard that is not there": dict.fromkeys(weights, "model-2.safetensors"),
        "a file outside": dict.fromkeys(weights, "../../run/model.safetensors"),
        "tensors that are elsewhere": dict.fromkeys(weights, "model-1.safetensors"),
        "no tensors": {},
        "numbers": dict.fromkeys(weights, 7),
    }.items():
        (fresh() / "model.safetensors").unlink()
        save_file(half, folder / "model-1.safetensors", {"format": "pt"})
        index = {"metadata": {"total_size": 1}, "weight_map": map_}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
        yield trial(f"an index with {how}", expect="refuse")


# ---- 5: the record of a run


def records(draw: random.Random, intact: Intact, place: Path) -> Trials:
    """dyadlm.json and metrics.jsonl of a run that is resumed, reported and evaluated."""
    run = place / "run"
    commands = {
        "resume": ["train", "--output", str(run), "--resume"],
        "report": ["report", str(run), "--output", str(place / "report"), "--device", "cpu"],
        "evaluate": ["evaluate", str(run), "--device", "cpu", "--json", "--data", str(intact / "prepared")],
    }

    def trial(name: str, verb: str) -> Trial:
        return Trial(f"{verb}: {name}", commands[verb], "same" if verb == "evaluate" else "any", figure=figures[verb])

    figures: dict[str, Callable[[Told], Any]] = {"resume": shown, "report": shown, "evaluate": loss}
    verbs = ["resume", "resume", "report", "evaluate"]
    shutil.copytree(intact / "run", run)
    yield Trial("intact evaluate", commands["evaluate"], figure=loss)
    for number, (how, text) in enumerate(odd_entries(draw, intact / "run/dyadlm.json", SAMPLE)):
        shutil.copytree(intact / "run", run)
        (run / "dyadlm.json").write_text(text)
        yield trial(f"dyadlm.json {how}", verbs[number % 4])
    for name in ("dyadlm.json", "metrics.jsonl"):
        for how in ("cut", "empty", "noise", "list", "null", "missing"):
            shutil.copytree(intact / "run", run)
            file = run / name
            content = file.read_bytes()
            other = {
                "cut": content[: len(content) // 2],
                "noise": draw.randbytes(99),
                "list": b"[]\n",
                "null": b"null\n",
            }
            file.write_bytes(other.get(how, b""))
            if how == "missing":
                file.unlink()
            yield trial(f"{name} {how}", draw.choice(["resume", "report"]))
    lines = (intact / "run/metrics.jsonl").read_text().splitlines()
    for number in range(16):
        shutil.copytree(intact / "run", run)
        line = json.loads(draw.choice(lines))
        key, value = draw.choice(sorted(line)), draw.choice(ODD)
        (run / "metrics.jsonl").write_text("\n".join([*lines, json.dumps(line | {key: value}), ""]))
        yield trial(f"metrics.jsonl {key} = {value!r}", "report" if number % 2 else "resume")


# ---- 6: text


def zipped(name: str, content: bytes, method: int = zipfile.ZIP_DEFLATED) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", method) as archive:
        archive.writestr(name, content)
    return file.getvalue()


PACKERS: dict[str, Callable[[bytes], bytes]] = {
    "gz": gzip.compress,
    "bz2": bz2.compress,
    "xz": lzma.compress,
    "zst": lambda content: zstandard.ZstdCompressor().compress(content),
    "zip": partial(zipped, "text.txt"),
}


def texts(draw: random.Random, intact: Intact, place: Path) -> Trials:
    """Files and folders that `evaluate --data` reads."""
    text = (intact / "text.txt").read_bytes()
    command = ["evaluate", str(intact / "run"), "--json", "--device", "cpu", "--data"]

    def trial(name: str, path: Path, expect: str = "same", content: bytes | None = None) -> Trial:
        if content is not None:
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(content)
        return Trial(name, [*command, str(path)], expect, figure=loss)

    yield trial("intact", place / "text.txt", content=text)
    for kind, pack in PACKERS.items():
        packed = pack(text)
        for name in (f"t.txt.{kind}", f"t.TXT.{kind.upper()}", "t.txt", "t", "t.txt.gz"):
            yield trial(f"{kind} called {name}", place / name, content=packed)
        for _ in range(6):
            cut = packed[: draw.randrange(8, len(packed) - 1)]
            yield trial(f"{kind} cut", place / f"t.txt.{kind}", "refuse", cut)
        for _ in range(3):
            at = draw.randrange(len(packed) // 4, len(packed) // 2)
            yield trial(f"{kind} spoilt", place / f"t.txt.{kind}", "same", packed[:at] + b"\xff\x00" + packed[at + 2 :])
        yield trial(f"{kind} a bomb", place / f"t.txt.{kind}", "refuse", pack(bytes(150_000_000)))
        yield trial(f"{kind} is text", place / f"t.txt.{kind}", "refuse" if kind != "zip" else "same", text)
    record = json.dumps({"text": text.decode()}).encode()
    lines = {
        "cut": record[:-9],
        "of lists": b"[1, 2]\n",
        "of numbers": b"7\n",
        "without the field": b'{"body": "x"}\n',
        "field is a number": b'{"text": 7}\n',
        "field is null": b'{"text": null}\n',
        "nested deeply": b"[" * 200_000,
        "nested objects": b'{"a":' * 100_000,
        "noise": draw.randbytes(500),
        "two on a line": record + record,
    }
    for how, content in lines.items():
        for suffix in (".jsonl", ".JSONL", ".ndjson"):
            yield trial(f"lines of JSON {how} {suffix}", place / f"t{suffix}", "refuse", content)
    for suffix in (".jsonl", ".JSONL", ".ndjson", ".json"):
        yield trial(f"whole lines of JSON {suffix}", place / f"t{suffix}", content=record + b"\n")
    table = io.BytesIO()
    pyarrow.parquet.write_table(pa.table({"text": [text.decode()]}), table)
    for how, content in {
        "whole": table.getvalue(),
        "cut": table.getvalue()[:-50],
        "spoilt": table.getvalue()[:-99] + bytes(99),
    }.items():
        yield trial(f"parquet {how}", place / "t.parquet", "same" if how == "whole" else "refuse", content)
    foreign = {
        "utf-16": text.decode().encode("utf-16"),
        "a picture": b"\x89PNG\r\n\x1a\n" + draw.randbytes(999),
        "a PDF": b"%PDF-1.7\n" + draw.randbytes(999),
        "a program": b"\x7fELF" + draw.randbytes(999),
        "a 7z archive": b"7z\xbc\xaf\x27\x1c" + draw.randbytes(999),
        "a tar archive": b"x".ljust(257, b"\0") + b"ustar\0" + bytes(9999),
        "empty": b"",
    }
    for how, content in foreign.items():
        for name in ("t.txt", "t"):
            yield trial(f"{how} called {name}", place / name, "refuse", content)
    for name in ("t.png", "t.tar", "t.docx", "t.MP3"):
        yield trial(f"noise called {name}", place / name, "refuse", draw.randbytes(999))
    for device in ("/dev/zero", "/dev/null", "/dev/urandom", "/dev/full", "/proc/self/mem"):
        yield trial(device, Path(device), "refuse")
    os.mkfifo(place / "pipe")
    yield trial("a pipe", place / "pipe", "refuse")

    def folder(make: Callable[[Path], Any]) -> Path:
        (place / "f").mkdir()
        (place / "f" / "t.txt").write_bytes(text)
        make(place / "f")
        return place / "f"

    for how, make in FOLDERS.items():
        path = folder(make)
        yield trial(f"a folder with {how}", path)
    for name in (
        b"\xff\xfe.txt",
        b"[/].txt",
        b"[/bold]x[red].txt",
        b"a\nb.txt",
        b"\x1b[31mred.txt",
        b"-x.txt",
        b"a:0.txt",
        b" ",
        b"%s.txt",
    ):
        path = Path(os.fsdecode(os.fsencode(place) + b"/" + name))
        yield trial(f"called {name!r}", path, content=text)
        yield trial(f"not there: {name!r}", path, "refuse")
        yield trial(f"noise: {name!r}", Path(os.fsdecode(os.fsencode(path) + b".jsonl")), "refuse", b"noise")


FOLDERS: dict[str, Callable[[Path], Any]] = {
    "nothing else": lambda path: None,
    "a loop of links": lambda path: (path / "loop").symlink_to(path),
    "a link to itself": lambda path: (path / "self").symlink_to("self"),
    "a broken link": lambda path: (path / "broken.txt").symlink_to("nowhere"),
    "a pipe": lambda path: os.mkfifo(path / "pipe.txt"),
    "a link to a device": lambda path: (path / "zero.txt").symlink_to("/dev/zero"),
    "a picture": lambda path: (path / "p.png").write_bytes(b"\x89PNG\r\n\x1a\n"),
    "an empty file": lambda path: (path / "e.txt").write_bytes(b""),
    "a hidden file": lambda path: (path / ".hidden.txt").write_bytes(b"hidden"),
}


# ---- 7: command lines


def commands(draw: random.Random, intact: Intact, place: Path) -> Trials:
    """Values of options, outputs that cannot be written, readers that leave, and signals.

    No output is ever a device: what replaces it would replace it for the whole machine.
    """
    run, text = str(intact / "run"), str(intact / "text.txt")
    base = {
        "generate": ["generate", run, "--prompt", "bad", "--seed", "1", "--device", "cpu", "--max-new-tokens", "4"],
        "stream": ["stream", run, "--device", "cpu"],
        "evaluate": ["evaluate", run, "--data", text, "--device", "cpu"],
        "train": [
            "train",
            "--preset",
            "tiny",
            "--output",
            str(place / "out"),
            "--data",
            text,
            "--device",
            "cpu",
            "--set",
        ],
    }
    base["train"] += ["max_steps=1", "data.sequence_length=32", "model.hidden_size=16", "model.num_hidden_layers=1"]
    yield Trial("intact", base["generate"])
    wrong = {
        ("generate", "--temperature"): ("-1", "nan", "inf", "x", "", "-0.1"),
        ("generate", "--top-p"): ("0", "-1", "1.5", "nan", "x"),
        ("generate", "--top-k"): ("-1", "x", "1.5"),
        ("generate", "--max-new-tokens"): ("0", "-1", "x", "1e3", ""),
        ("generate", "--seed"): ("x", "1.5", "99999999999999999999999999"),
        ("generate", "--stop"): ("",),
        ("generate", "--prompt"): ("", "\udcff", "a\udc80b"),
        ("generate", "--device"): ("x", "", "cuda:99", "meta", "-1"),
        ("generate", "--dtype"): ("x", "int8", ""),
        ("generate", "--set"): ("x", "x=1", "hidden_size=0", "=", "", "rms_norm_eps=x", "slot_ways=-1"),
        ("stream", "--continue"): ("-1", "x"),
        ("stream", "--temperature"): ("-1", "nan", "x"),
        ("evaluate", "--window"): ("0", "-1", "x", "1.5"),
        ("evaluate", "--batch-size"): ("0", "-1", "x"),
        ("evaluate", "--split"): ("x", ""),
        ("evaluate", "--text-field"): (),
        ("train", ""): (
            *("max_steps=-5", "max_steps=0", "max_steps=x", "max_steps=1.5", "learning_rate=nan", "learning_rate=-1"),
            *(
                "learning_rate=x",
                "learning_rate=inf",
                "per_device_train_batch_size=0",
                "per_device_train_batch_size=-1",
            ),
            *("data.sequence_length=0", "data.sequence_length=-1", "data.sequence_length=x", "data.canaries=-1"),
            *("model.hidden_size=0", "model.hidden_size=-8", "model.num_hidden_layers=-1", "model.vocab_size=0"),
            *("model.slot_entries=-1", "model.slot_ways=0", "model.dropout=2", "model.dropout=nan", "weight_decay=nan"),
            *("warmup_steps=-1", "seed=-1", "seed=x", "save_steps=-1", "eval_steps=-1", "train.goldfish=-1", "x=1"),
            *("model.level_rank=0", "model.semantic_levels=[x]", "model.rms_norm_eps=-1", "data.validation_tokens=0"),
        ),
    }
    for (verb, option), values in wrong.items():
        for value in values:
            line = [*base[verb], *([option] if option else []), value]
            name = f"{verb} {option} {value!r}".replace("\udcff", "\\xff").replace("\udc80", "\\x80")
            yield Trial(name, line, "refuse", NEXT)
    for line in (
        ["x"],
        ["--x"],
        ["generate"],
        ["generate", run],
        ["evaluate", run],
        ["train"],
        ["generate", run, "--prompt"],
    ):
        yield Trial(f"the line {' '.join(line).replace(run, 'RUN')}", line, "refuse")
    for model in ("/nowhere", "nowhere/at all", "", ".", "\udcff", "[/]", "\x1b[31m", text, "a\nb"):
        yield Trial(f"the model {model!a}", ["generate", model, "--prompt", "a"], "refuse")
    outputs = {
        "an existing file": lambda path: path.write_bytes(b"old"),
        "a folder": lambda path: path.mkdir(),
        "a link to nothing": lambda path: path.symlink_to("nowhere/at/all"),
        "a pipe": lambda path: os.mkfifo(path),
    }
    for verb, option in (("generate", "--state-out"), ("stream", "--state-out"), ("train", "--output")):
        for how, make in outputs.items():
            make(place / "there")
            line = [*base[verb], "" if verb == "train" else option, str(place / "there")]
            if verb == "train":
                line = [
                    *base[verb][: base[verb].index("--output") + 1],
                    str(place / "there"),
                    *base[verb][base[verb].index("--output") + 2 :],
                ]
            expect = "any" if (verb, how) == ("train", "a folder") else "refuse"
            yield Trial(f"{verb} {option}: {how}", line, expect, NEXT)
        for where in (text + "/below", "/proc/x/y", "a" * 300, "\0"):
            line = (
                [*base[verb], option, where]
                if verb != "train"
                else ["train", "--output", where, *base[verb][1:3], *base[verb][5:]]
            )
            yield Trial(f"{verb} {option}: {where[-9:]!r}", line, "refuse", NEXT)
    for name in ("\udcff.state", "[/].state", "\x1b[31m.state"):
        path = place / name
        saved = partial(lambda file, told: told.code == 0 and file.exists() and b"\x1b" not in told.err, path)
        yield Trial(f"--state-out {name!a}", [*base["stream"], "--state-out", str(path)], stdin=NEXT, check=saved)
    for out in (False, True):
        line = ["stream", run, "--device", "cpu", *(["--state-out", str(place / "s")] if out else [])]
        kept = partial(
            lambda must, told: told.code is not None and told.code >= 0 and (not must or (place / "s").exists()), out
        )
        for name, act in (("| head -1", head), ("reader gone", gone)):
            yield Trial(f"stream {name}{' --state-out' * out}", line, act=act, check=kept)
        for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
            yield Trial(
                f"stream {number.name}{' --state-out' * out}",
                line,
                act=partial(signalled, number),
                check=partial(ended, out, place / "s", number),
            )
    train = [*base["train"][:-4], "max_steps=400", "save_steps=400", *base["train"][-3:]]
    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT):

        def saved_run(told, place=place):
            return bool(told.code and told.code > 0 and list((place / "out").glob("checkpoint-*")))

        yield Trial(
            f"train {number.name}", train, act=partial(signalled_training, number, place / "out"), check=saved_run
        )


def head(child: int, to_it: Any, from_it: Any) -> None:
    """Read one line and leave; the command is told more."""
    to_it.write(NEXT)
    from_it.readline()
    from_it.close()
    with contextlib.suppress(OSError):
        for _ in range(200):
            to_it.write(NEXT)
    to_it.close()


def gone(child: int, to_it: Any, from_it: Any) -> None:
    """Nobody reads from the beginning."""
    from_it.close()
    with contextlib.suppress(OSError):
        to_it.write(NEXT)
    to_it.close()


def signalled(number: int, child: int, to_it: Any, from_it: Any) -> None:
    """A signal while the command waits for input; then the input ends."""
    to_it.write(NEXT)
    for _ in NEXT.splitlines():
        from_it.readline()
    os.kill(child, number)


def signalled_training(number: int, run: Path, child: int, to_it: Any, from_it: Any) -> None:
    """A signal after the first steps."""
    for _ in range(300):
        metrics = run / "metrics.jsonl"
        if metrics.exists() and metrics.stat().st_size:
            break
        time.sleep(0.05)
    os.kill(child, number)


def ended(must_save: bool, state: Path, number: int, told: Told) -> bool:
    """Without a state to save any end by the signal is right; with one, only with the file or a code that is not 0."""
    if told.code is None or b"Traceback" in told.err:
        return False
    if not must_save:
        return told.code in (0, -number, 128 + number)
    return state.exists() and (told.code != 0 or number == signal.SIGINT)


# ---- 8: adapters


def adapters(draw: random.Random, intact: Intact, place: Path) -> Trials:
    """Adapters of LoRA, read by `stream`."""
    folder = place / "adapter"
    command = ["stream", str(folder), "--json", "--device", "cpu"]

    def fresh() -> Path:
        shutil.rmtree(folder, ignore_errors=True)
        return Path(shutil.copytree(intact / "adapter", folder, ignore=shutil.ignore_patterns("checkpoint-*")))

    fresh()
    yield Trial("intact", command, stdin=NEXT)
    # Other values of these are valid adapters, or mean nothing to inference.
    leave = ("r", "lora_alpha", "lora_dropout", "use_rslora", "fan_in_fan_out", "revision", "inference_mode")
    for how, text in odd_entries(draw, intact / "adapter/adapter_config.json", SAMPLE, leave):
        (fresh() / "adapter_config.json").write_text(text)
        yield Trial(f"adapter_config.json {how}", command, stdin=NEXT)
    content = json.loads((intact / "adapter/adapter_config.json").read_text())
    for value in (0, -1, "x", None, 3, 2**40, [], {}):
        fresh()
        (folder / "adapter_config.json").write_text(json.dumps(content | {"r": value}))
        yield Trial(f"rank {value!r}", command, "refuse", NEXT)
    for base in (str(folder), "/nowhere", "", "../x", str(intact / "text.txt"), str(intact / "prepared")):
        fresh()
        (folder / "adapter_config.json").write_text(json.dumps(content | {"base_model_name_or_path": base}))
        yield Trial(f"base {base.removeprefix(str(place))!r}", command, "refuse", NEXT)
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        for how in ("cut", "empty", "noise", "missing"):
            file = fresh() / name
            whole = file.read_bytes()
            file.write_bytes({"cut": whole[: len(whole) // 2], "noise": draw.randbytes(99)}.get(how, b""))
            if how == "missing":
                file.unlink()
            yield Trial(f"{name} {how}", command, "refuse", NEXT)
    for how, tensors in tensor_damages(load_file(intact / "adapter/adapter_model.safetensors"), draw):
        if not how.endswith(" half"):
            save_file(tensors, fresh() / "adapter_model.safetensors", {"format": "pt"})
            yield Trial(f"weights {how}", command, "refuse", NEXT)


CLASSES: dict[str, Callable[[random.Random, Intact, Path], Trials]] = {
    "states": states,
    "checkpoints": checkpoints,
    "prepared data": prepared,
    "model folders": models,
    "run records": records,
    "text": texts,
    "command lines": commands,
    "adapters": adapters,
}
