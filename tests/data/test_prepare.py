"""Prepared folders: what is in them, that workers and shards change nothing, and that damage is named."""

import json
import struct
from itertools import pairwise

import datasets
import numpy as np
import pyarrow as pa
import pytest

from dyadlm.data import Passage, Source, TrainingWindows, byte_tokenizer, open_dataset, prepare
from dyadlm.data.dataset import ROW_TOKENS
from dyadlm.data.encoding import decode_bytes
from dyadlm.errors import UserError
from dyadlm.files import sha256_of

from .conftest import make_text

SPLITS = ("train", "validation", "test")


def made_up(documents: int = 12, words: int = 700) -> Source:
    """Documents of several passages, with sections and kinds, and one repeated name."""

    def passages(split):
        for number in range(documents):
            for part in range(3):
                text = make_text(words, seed=100 * SPLITS.index(split) + 3 * number + part)
                name = f"{split} {max(number, 1)}"
                yield Passage(name, text.encode(), f"part {part}", "song" if part == 2 else "prose", starts=part == 0)

    splits = {split: (lambda split=split: passages(split)) for split in SPLITS}
    return Source("made up", "CC0", "1", splits)


@pytest.fixture
def small_shards(monkeypatch):
    """Many rows, writes, shards and pieces of work even in small data."""
    monkeypatch.setattr("dyadlm.data.split_writer.ROWS_PER_WRITE", 2)
    monkeypatch.setattr("dyadlm.data.split_writer.SHARD_TOKENS", 5 * ROW_TOKENS)
    monkeypatch.setattr("dyadlm.data.preparation.WORK_BYTES", 5_000)


@pytest.mark.parametrize("kind", ["byte", "text"])
def test_streams_hold_the_text_and_its_tags(tmp_path, kind, text_tokenizer, small_shards):
    tokenizer = byte_tokenizer() if kind == "byte" else text_tokenizer
    source = made_up()
    manifest = prepare([source], tmp_path / "out", tokenizer)
    data = open_dataset(tmp_path / "out")
    assert data.manifest == manifest
    assert data.manifest.sources == [{"name": "made up", "licence": "CC0"}]
    assert len(manifest.splits["train"].shards) > 1
    index = 0
    for name in SPLITS:
        stream, split = data.split(name), manifest.splits[name]
        assert stream.index_start == split.index_start == index
        index += len(stream)
        tokens = stream.tokens(0, len(stream))
        assert len(tokens) == split.tokens
        passages = list(source.splits[name]())
        size = sum(len(passage.content) for passage in passages)
        assert size == split.bytes == stream.bytes_of(0, len(stream))
        assert split.bytes_per_token == split.bytes / split.tokens
        assert (kind == "byte") == (split.bytes_per_token <= 1)

        documents = stream.documents
        assert len(documents) == split.documents == 12
        assert [document.name for document in documents[:3]] == [f"{name} 1", f"{name} 1#2", f"{name} 2"]
        assert documents[0].start == 0
        assert documents[-1].stop == len(stream)
        assert all(first.stop == second.start for first, second in pairwise(documents))
        for number, document in enumerate(documents):
            ids = tokens[document.start : document.stop]
            assert ids[-1] == tokenizer.eos_token_id
            text = b"".join(passage.content for passage in passages[3 * number : 3 * number + 3])
            assert tokenizer.decode(ids[:-1]).encode() == text
            assert stream.bytes_of(document.start, document.stop) == len(text)

        segments = [stream.segments[number] for number in range(len(stream.segments))]
        assert [segment[2:] for segment in segments[:4]] == [
            ("part 0", "prose"),
            ("part 1", "prose"),
            ("part 2", "song"),
            ("part 0", "prose"),
        ]
        assert len(segments) == len(passages)
        edges = [segment.start for segment in segments]
        for (start, stop), passage in zip(pairwise([*edges, len(stream)]), passages, strict=True):
            # A token across the edge of two passages belongs to the first.
            assert abs(stream.bytes_of(start, stop) - len(passage.content)) <= (0 if kind == "byte" else 8)
        numbers = stream.segment_numbers(0, len(stream))
        assert np.array_equal(np.flatnonzero(np.diff(numbers)) + 1, edges[1:])


def test_rows_are_readable_with_datasets(tmp_path, small_shards):
    manifest = prepare([made_up()], tmp_path / "out")
    expected = 0
    for split in manifest.splits.values():
        for shard in split.shards:
            rows = datasets.Dataset.from_file(str(tmp_path / "out" / shard.file))
            assert rows.features["input_ids"].feature.dtype == "int32"
            assert rows.features["index_start"].dtype == "int64"
            for row in rows:
                assert row["index_start"] == expected
                expected += len(row["input_ids"])
                starts = [segment["start"] for segment in row["segments"]]
                assert starts[0] <= 0
                assert all(0 < start < len(row["input_ids"]) for start in starts[1:])
                assert set(row["segments"][0]) == {"start", "document", "section", "kind"}
    assert expected == sum(split.tokens for split in manifest.splits.values())


def test_workers_change_nothing(tmp_path, text_tokenizer, small_shards):
    serial = prepare([made_up()], tmp_path / "serial", text_tokenizer)
    parallel = prepare([made_up()], tmp_path / "parallel", text_tokenizer, num_proc=3)
    assert serial == parallel
    for split in serial.splits.values():
        for shard in split.shards:
            assert (tmp_path / "serial" / shard.file).read_bytes() == (tmp_path / "parallel" / shard.file).read_bytes()


def test_the_identity_follows_the_content(tmp_path):
    (tmp_path / "one.txt").write_text(make_text(100))
    (tmp_path / "two.txt").write_text(make_text(100, seed=1))
    ids = [
        prepare([tmp_path / name], tmp_path / str(number)).dataset_id
        for number, name in enumerate(("one.txt", "one.txt", "two.txt"))
    ]
    assert ids[0] == ids[1] != ids[2]


def test_one_file_gives_its_last_tenth(tmp_path):
    content = make_text(500).encode()
    (tmp_path / "page.txt").write_bytes(content)
    prepare([tmp_path / "page.txt"], tmp_path / "out")
    data = open_dataset(tmp_path / "out")
    train, validation = data.split("train"), data.split("validation")
    assert decode_bytes(train.tokens(0, len(train))) + decode_bytes(validation.tokens(0, len(validation))) == content
    assert abs(len(validation) - len(content) / 10) < 6
    assert train.name == "page.txt (train)"
    with pytest.raises(UserError, match="no split 'test'; it has train, validation"):
        data.split("test")


def test_a_source_for_validation(tmp_path):
    (tmp_path / "page.txt").write_text("all of it")
    (tmp_path / "other.txt").write_text("elsewhere")
    prepare([tmp_path / "page.txt"], tmp_path / "out", validation=tmp_path / "other.txt")
    data = open_dataset(tmp_path / "out")
    assert decode_bytes(data.split("train").tokens(0, 10)) == b"all of it"
    assert decode_bytes(data.split("validation").tokens(0, 10)) == b"elsewhere"
    assert [source["name"] for source in data.manifest.sources] == ["page.txt", "other.txt"]


def test_any_bytes_but_only_with_the_byte_tokenizer(tmp_path, text_tokenizer, small_shards):
    content = make_text(4000).encode() + b"caf\xe9 is Latin-1\n" + make_text(100).encode()
    (tmp_path / "page.txt").write_bytes(content)
    prepare([tmp_path / "page.txt"], tmp_path / "bytes")
    place = content.index(b"\xe9")
    with pytest.raises(UserError, match=rf"page.txt is not UTF-8 text: byte {place} is 0xe9 .*byte tokenizer"):
        prepare(
            [tmp_path / "page.txt"], tmp_path / "out", text_tokenizer, validation=tmp_path / "bytes" / "manifest.json"
        )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bytes", "page.txt"]


def test_specials_in_data_stay_text(tmp_path):
    (tmp_path / "page.txt").write_text("<|end|> or <|begin|>" * 5)
    prepare([tmp_path / "page.txt"], tmp_path / "out")
    stream = open_dataset(tmp_path / "out").split("train")
    tokens = stream.tokens(0, len(stream))
    assert (tokens >= 256).sum() == 1
    assert tokens[-1] == 258


def test_nothing_is_overwritten_or_left_behind(tmp_path):
    (tmp_path / "page.txt").write_text("some text")
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "thesis.txt").write_text("mine")
    before = sorted(path.name for path in tmp_path.iterdir())
    with pytest.raises(UserError, match="already exists"):
        prepare([tmp_path / "page.txt"], tmp_path / "taken")
    with pytest.raises(UserError, match=r"empty.txt holds 0 bytes"):
        prepare([tmp_path / "empty.txt"], tmp_path / "out")
    with pytest.raises(UserError, match="no text for the validation split"):
        prepare([tmp_path / "page.txt"], tmp_path / "out", validation=tmp_path / "empty.txt")
    with pytest.raises(UserError, match="name at least one source"):
        prepare([], tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == before
    assert (tmp_path / "taken" / "thesis.txt").read_text() == "mine"


def test_damage_is_named(tmp_path):
    folder = tmp_path / "out"
    manifest = prepare([made_up(documents=2)], folder)
    shard = folder / manifest.splits["validation"].shards[0].file
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    with pytest.raises(UserError, match=r"validation/shard-00000.arrow is damaged"):
        open_dataset(folder)
    assert open_dataset(folder, verify=False).manifest == manifest
    shard.unlink()
    with pytest.raises(UserError, match=r"validation/shard-00000.arrow is missing"):
        open_dataset(folder)


def resigned(folder, change):
    """The first shard of validation, changed by somebody who knows the format and writes a checksum that fits."""
    content = json.loads((folder / "manifest.json").read_text())
    shard = content["splits"]["validation"]["shards"][0]
    path = folder / shard["file"]
    table = datasets.Dataset.from_file(str(path)).data.table.combine_chunks()
    columns = {name: table.column(name).combine_chunks() for name in table.column_names}
    fresh = pa.table(change(dict(columns)))
    path.unlink()  # it is mapped into memory
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, fresh.schema) as writer:
        writer.write_table(fresh)
    shard["sha256"] = sha256_of(path)
    (folder / "manifest.json").write_text(json.dumps(content))


def with_ids(change):
    def changed(columns):
        ids = columns["input_ids"]
        values = change(ids.values.to_numpy().copy())
        columns["input_ids"] = pa.ListArray.from_arrays(pa.array([0, len(values)], pa.int32()), pa.array(values))
        return columns

    return changed


def without_documents(columns):
    rows, kind = columns["segments"].to_pylist(), columns["segments"].type
    unnamed = [[segment | {"document": None} for segment in row] for row in rows]
    return columns | {"segments": pa.array(unnamed, kind)}


DAMAGES = {
    "fewer tokens": with_ids(lambda ids: ids[:-1]),
    "a token below zero": with_ids(lambda ids: np.where(ids == ids[0], -1, ids).astype(np.int32)),
    "a token beyond the vocabulary": with_ids(lambda ids: np.where(ids == ids[0], 259, ids).astype(np.int32)),
    "tokens of another type": with_ids(lambda ids: ids.astype(np.int64)),
    "segments of numbers": lambda columns: columns | {"segments": pa.array([0] * len(columns["segments"]))},
    "a segment without a document": without_documents,
    "no segments": lambda columns: {name: column for name, column in columns.items() if name != "segments"},
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_shards_that_somebody_else_wrote_are_not_believed(tmp_path, damage):
    folder = tmp_path / "out"
    prepare([made_up(documents=2, words=100)], folder)
    resigned(folder, lambda columns: columns)
    open_dataset(folder).split("validation")
    resigned(folder, DAMAGES[damage])
    with pytest.raises(UserError, match="is damaged"):
        open_dataset(folder)


@pytest.mark.parametrize("offsets", [(-4, 20), (0, 2**30), (20, 0)])
def test_offsets_that_lead_out_of_a_list_are_not_believed(tmp_path, offsets):
    """Compiled code would read what lies there in memory; pyarrow writes no such file, so its bytes are changed."""
    folder = tmp_path / "out"
    prepare([made_up(documents=2, words=100)], folder)
    content = json.loads((folder / "manifest.json").read_text())
    shard = content["splits"]["validation"]["shards"][0]
    path = folder / shard["file"]
    stored, own = path.read_bytes(), struct.pack("<ii", 0, shard["tokens"])
    assert stored.count(own) == 2  # of the tokens, then of how many bytes each is
    path.write_bytes(stored.replace(own, struct.pack("<ii", *offsets), 1))
    shard["sha256"] = sha256_of(path)
    (folder / "manifest.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match="is damaged"):
        open_dataset(folder)


@pytest.mark.parametrize(
    "change",
    [lambda row: list(reversed(row)), lambda row: [segment | {"start": -segment["start"]} for segment in row]],
)
def test_segments_out_of_order_are_refused(tmp_path, change):
    folder = tmp_path / "out"
    prepare([made_up(documents=40, words=100)], folder)

    def disorder(columns):
        rows = columns["segments"].to_pylist()
        assert all(len(row) > 1 for row in rows)
        kind = columns["segments"].type
        columns["segments"] = pa.array([change(row) for row in rows], kind)
        return columns

    resigned(folder, disorder)
    with pytest.raises(UserError, match="out of order"):
        len(open_dataset(folder).split("validation").segments)


@pytest.mark.parametrize("name", ["../elsewhere.arrow", "/etc/passwd", "linked/shard.arrow"])
def test_shards_outside_of_the_folder_are_refused(tmp_path, name):
    folder = tmp_path / "out"
    prepare([made_up(documents=2)], folder)
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "shard.arrow").write_bytes(b"")
    (folder / "linked").symlink_to(tmp_path / "elsewhere")
    content = json.loads((folder / "manifest.json").read_text())
    content["splits"]["validation"]["shards"][0]["file"] = name
    (folder / "manifest.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match="lies outside the folder"):
        open_dataset(folder)


@pytest.mark.parametrize("value", [-1, 1.5, "many", None, True])
def test_counts_of_a_manifest_are_whole_numbers(tmp_path, value):
    folder = tmp_path / "out"
    prepare([made_up(documents=2)], folder)
    content = json.loads((folder / "manifest.json").read_text())
    content["splits"]["validation"]["shards"][0]["tokens"] = value
    (folder / "manifest.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match="damaged"):
        open_dataset(folder)


def test_folders_that_are_not_prepared(tmp_path):
    with pytest.raises(UserError, match="no prepared data"):
        open_dataset(tmp_path)
    folder = tmp_path / "out"
    prepare([made_up(documents=2)], folder)
    with pytest.raises(UserError, match="is prepared already"):
        prepare([folder], tmp_path / "again")
    manifest = json.loads((folder / "manifest.json").read_text())
    for content, message in [
        (json.dumps(manifest | {"format": 99}), "has format 99"),
        (json.dumps(manifest | {"splits": 1}), "damaged"),
        ("{", "damaged"),
        ("[]", "damaged"),
    ]:
        (folder / "manifest.json").write_text(content)
        with pytest.raises(UserError, match=message):
            open_dataset(folder)


def test_neighbours_with_the_same_tags_are_one_segment(tmp_path):
    """A section that comes in several passages is one segment; the same section of the next document is another."""

    def passages():
        for document in ("one", "two"):
            for part, section in enumerate(("a", "a", "b", "b", "a")):
                yield Passage(document, b"text" * (part + 1), section, "prose", starts=part == 0)

    prepare([Source("made up", "CC0", "1", {"train": passages, "validation": passages})], tmp_path / "out")
    for split in ("train", "validation"):
        segments = open_dataset(tmp_path / "out").split(split).segments
        found = [tuple(segments[number]) for number in range(len(segments))]
        assert found == [
            (0, "one", "a", "prose"), (12, "one", "b", "prose"), (40, "one", "a", "prose"),
            (61, "two", "a", "prose"), (73, "two", "b", "prose"), (101, "two", "a", "prose"),
        ]  # fmt: skip


def test_windows_over_shards(tmp_path, small_shards):
    prepare([made_up()], tmp_path / "out")
    stream = open_dataset(tmp_path / "out").split("train")
    windows = TrainingWindows([(stream, 1.0)], 512, 40, with_index=True)
    tokens = stream.tokens(0, len(stream))
    for number in range(40):
        item = windows[number]
        assert np.array_equal(item["input_ids"].numpy(), tokens[item["index"].numpy() - stream.index_start])


def test_the_byte_tokenizer_keeps_its_name_wherever_it_is_loaded_from(tmp_path):
    byte_tokenizer().save_pretrained(tmp_path / "tokenizer")
    (tmp_path / "text.txt").write_text(make_text(300, seed=1))
    manifest = prepare([str(tmp_path / "text.txt")], tmp_path / "out", tokenizer=str(tmp_path / "tokenizer"))
    assert manifest.tokenizer["name"] == "byte"
