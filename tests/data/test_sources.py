"""Every kind of source yields the same text, its documents and tags; what is wrong is named."""

import bz2
import gzip
import io
import itertools
import json
import sys

import datasets
import pyarrow as pa
import pyarrow.parquet
import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from dyadlm.data import Passage, Source, open_source
from dyadlm.data import formats as formats_module
from dyadlm.data.sources import with_validation
from dyadlm.errors import UserError

from .conftest import make_text


def read(source: Source, split: str = "train") -> list[Passage]:
    return list(source.splits[split]())


def joined(passages: list[Passage]) -> bytes:
    return b"".join(passage.content for passage in passages)


@pytest.mark.parametrize("suffix", ["", ".gz", ".bz2", ".zst"])
def test_text_files(tmp_path, suffix, monkeypatch):
    monkeypatch.setattr(formats_module, "BLOCK_BYTES", 1000)
    content = make_text(900).encode() + b"\xff\xfe no newline at the end"
    pack = {"": bytes, ".gz": gzip.compress, ".bz2": bz2.compress, ".zst": zstandard.compress}[suffix]
    path = tmp_path / f"page.txt{suffix}"
    path.write_bytes(pack(content))
    passages = read(open_source(path))
    assert joined(passages) == content
    assert [passage.starts for passage in passages] == [True] + [False] * (len(passages) - 1)
    assert len(passages) > 5
    for passage in passages:
        assert content[passage.offset :].startswith(passage.content)
        assert passage.document == f"page.txt{suffix}"
    assert all(passage.content.endswith(b"\n") for passage in passages[:-1])


def test_blocks_split_no_character(tmp_path, monkeypatch):
    monkeypatch.setattr(formats_module, "BLOCK_BYTES", 100)
    path = tmp_path / "page.txt"
    path.write_text("日本ü" * 500)
    passages = read(open_source(path))
    assert "".join(passage.content.decode() for passage in passages) == "日本ü" * 500


@pytest.mark.parametrize(("suffix", "content"), [(".gz", b"not gzip"), (".zst", b"junk"), (".parquet", b"PAR")])
def test_damaged_files(tmp_path, suffix, content):
    path = tmp_path / f"page{suffix}"
    path.write_bytes(content)
    with pytest.raises(UserError, match=rf"page{suffix} cannot be read"):
        read(open_source(path))


@pytest.mark.parametrize("suffix", [".gz", ".bz2", ".zst"])
def test_files_cut_short_are_never_taken_for_whole_ones(tmp_path, suffix):
    pack = {".gz": gzip.compress, ".bz2": bz2.compress, ".zst": zstandard.compress}[suffix]
    path = tmp_path / f"page{suffix}"
    path.write_bytes(pack(make_text(2000).encode())[:-50])
    with pytest.raises(UserError, match=rf"page{suffix} cannot be read"):
        read(open_source(path))


def test_zstd_of_several_frames(tmp_path):
    parts = [make_text(200, seed=number).encode() for number in range(3)]
    path = tmp_path / "page.zst"
    path.write_bytes(b"".join(map(zstandard.compress, parts)))
    assert joined(read(open_source(path))) == b"".join(parts)


def test_json_lines(tmp_path):
    path = tmp_path / "pages.jsonl.gz"
    records = [
        {"body": "one", "section": "first \ud800", "kind": "prose"},
        {"body": ""},
        {"body": "zwei \ud800", "section": 3},
    ]
    path.write_bytes(gzip.compress("\n\n".join(json.dumps(record) for record in records).encode()))
    passages = read(open_source(path, text_field="body"))
    assert passages == [
        Passage("pages.jsonl.gz:1", b"one", "first \\ud800", "prose"),  # as a shard can hold it
        Passage("pages.jsonl.gz:5", b"zwei \xed\xa0\x80"),
    ]
    with pytest.raises(UserError, match=r"pages.jsonl.gz:1 has no field 'text' \(its fields: body, section, kind\)"):
        read(open_source(path))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 2 is not JSON"),
        pytest.param("[" * 100_000, "line 2 is not JSON", id="nested"),
        ("[1]", "no JSON object"),
        ('{"text": 1}', "no text but int"),
    ],
)
def test_json_lines_that_are_wrong(tmp_path, line, message):
    path = tmp_path / "pages.jsonl"
    path.write_text(f'{{"text": "a"}}\n{line}\n')
    with pytest.raises(UserError, match=message):
        read(open_source(path))


def test_parquet(tmp_path):
    path = tmp_path / "pages.parquet"
    pyarrow.parquet.write_table(pa.table({"text": ["one", "zwei"], "kind": ["prose", None], "n": [1, 2]}), path)
    assert read(open_source(path)) == [
        Passage("pages.parquet:1", b"one", kind="prose"),
        Passage("pages.parquet:2", b"zwei"),
    ]
    with pytest.raises(UserError, match="no field 'body'; its fields are text, kind, n"):
        read(open_source(path, text_field="body"))


def test_parquet_that_is_not_utf8(tmp_path):
    offsets, content = (pa.py_buffer(part) for part in (b"\0\0\0\0\3\0\0\0", b"ab\xff"))
    path = tmp_path / "pages.parquet"
    pyarrow.parquet.write_table(
        pa.table({"text": pa.Array.from_buffers(pa.string(), 1, [None, offsets, content])}), path
    )
    with pytest.raises(UserError, match=r"pages.parquet cannot be read: .*0xff"):
        read(open_source(path))


def test_folders_are_read_in_order_and_whole(tmp_path):
    folder = tmp_path / "books"
    (folder / "b" / "c").mkdir(parents=True)
    (folder / ".hidden").mkdir()
    (folder / "b" / "c" / "two.txt").write_text("two")
    (folder / "a.md").write_text("one")
    (folder / "z.jsonl").write_text('{"text": "three"}\n')
    (folder / ".hidden" / "no.txt").write_text("no")
    passages = read(open_source(folder))
    assert [(passage.document, passage.content) for passage in passages] == [
        ("a.md", b"one"),
        ("b/c/two.txt", b"two"),
        ("z.jsonl:1", b"three"),
    ]
    key = open_source(folder).key
    (folder / "a.md").write_text("changed")
    assert open_source(folder).key != key


def test_standard_input_can_be_read_twice(monkeypatch):
    content = make_text(50).encode()
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content)))
    source = open_source("-")
    assert joined(read(source)) == joined(read(source)) == content


def test_hub_datasets_keep_their_splits(monkeypatch):
    train = datasets.Dataset.from_dict({"text": ["one", "two"]}).to_iterable_dataset(num_shards=2)
    test = datasets.Dataset.from_dict({"text": ["three"]}).to_iterable_dataset()
    stored = datasets.IterableDatasetDict(train=train, test=test)
    asked = []

    class Builder:
        hash = "1"
        info = datasets.DatasetInfo(license="mit")

    monkeypatch.setattr(datasets, "load_dataset_builder", lambda *names: Builder)
    monkeypatch.setattr(datasets, "load_dataset", lambda *names, streaming: asked.append((names, streaming)) or stored)
    source = open_source("owner/name:small")
    assert asked == [(("owner/name", "small"), True)]
    assert source.licence == "mit"
    assert [passage.content for passage in read(source)] == [b"one", b"two"]
    # Each of its files is a part of its own, so that a streamed run that goes on reads none of those before.
    assert [passage.content for part in source.parts for passage in part()] == [b"one", b"two"]
    assert len(source.parts) == 2
    assert [passage.content for passage in read(source, "test")] == [b"three"]
    assert joined(read(with_validation(source), "validation")) == b"o"  # the last tenth, here a byte


@pytest.mark.parametrize("name", ["shakespere", "missing.txt", "folder/missing.jsonl", "someone/missing"])
def test_sources_that_do_not_exist(name):
    with pytest.raises(UserError, match=f"There is no file.*{name}"):
        open_source(name)


def test_an_empty_folder(tmp_path):
    with pytest.raises(UserError, match="holds no files"):
        open_source(tmp_path)


@given(
    contents=st.lists(st.binary(min_size=1, max_size=12) | st.text("aü日", min_size=1).map(str.encode), min_size=1),
    data=st.data(),
)
def test_the_last_tenth_loses_nothing_and_splits_no_character(contents, data):
    passages = [
        Passage(f"{number}", content, starts=data.draw(st.booleans()) or number == 0)
        for number, content in enumerate(contents)
    ]
    whole = b"".join(contents)
    if len(whole) < 2:
        return
    divided = with_validation(Source("made up", "none", "", {"train": lambda: iter(passages)}))
    train, validation = read(divided), read(divided, "validation")
    assert joined(train) + joined(validation) == whole
    assert 0 <= len(joined(train)) - len(whole) * 9 // 10 <= 3
    assert not validation or validation[0].starts
    for passage in validation:
        original = contents[int(passage.document)]
        assert original[passage.offset :] == passage.content
    try:
        whole.decode()
    except UnicodeDecodeError:
        return
    joined(train).decode()


def test_the_last_tenth_needs_text(tmp_path):
    (tmp_path / "empty.txt").write_text("")
    with pytest.raises(UserError, match=r"empty.txt holds 0 bytes"):
        with_validation(open_source(tmp_path / "empty.txt"))


def test_the_last_tenth_begins_with_a_whole_character_wherever_it_would_begin():
    """The cut moves on over up to three bytes of a character of four."""
    for lead, count in itertools.product(range(8), range(3, 20)):
        content = b"a" * lead + "\U0001f642".encode() * count
        source = Source("x", "none", "key", {"train": lambda content=content: iter([Passage("x", content)])})
        parts = with_validation(source)
        head, tail = (joined(read(parts, split)) for split in ("train", "validation"))
        assert head + tail == content
        head.decode()
        tail.decode()
