"""What a file holds is told by its content and its name in any case; whatever is not text is refused or left out."""

import bz2
import gzip
import io
import json
import logging
import lzma
import os
import tarfile
import zipfile

import pyarrow as pa
import pyarrow.parquet
import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from dyadlm.data import formats, open_source
from dyadlm.errors import UserError

from .conftest import make_text

RECORDS = [{"text": f"document {number}"} for number in range(3)]
LINES = "".join(json.dumps(record) + "\n" for record in RECORDS).encode()
TEXTS = [record["text"].encode() for record in RECORDS]


def named(value) -> str:
    """Of a case: packed content holds the time, and every worker has to call a case alike."""
    return value if isinstance(value, str) else ""


def contents(path, **options) -> list[bytes]:
    return [passage.content for passage in open_source(path, **options).splits["train"]()]


def zipped(files: dict[str, bytes]) -> bytes:
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return packed.getvalue()


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.JSONL", LINES),
        ("a.ndjson", LINES),
        ("a.json", LINES),
        ("a.json", json.dumps(RECORDS).encode()),
        ("a.json", json.dumps(RECORDS, indent=1).encode()),
        ("a.Json.Gz", gzip.compress(json.dumps(RECORDS).encode())),
        ("a.jsonl.GZ", gzip.compress(LINES)),
        ("a.jsonl.bz2", bz2.compress(LINES)),
        ("a.jsonl.xz", lzma.compress(LINES)),
        ("a.jsonl.ZST", zstandard.compress(LINES)),
        ("a.jsonl", gzip.compress(LINES)),
        ("a.zip", zipped({"a.jsonl": LINES})),
        ("a", zipped({"a.JSON": json.dumps(RECORDS).encode(), "z.png": b"\x89PNG"})),
    ],
    ids=named,
)
def test_records_in_every_wrapping(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    assert contents(tmp_path / name) == TEXTS


@pytest.mark.parametrize("name", ["a.PARQUET", "table"])
def test_parquet_under_any_name(tmp_path, name):
    pyarrow.parquet.write_table(pa.Table.from_pylist(RECORDS), tmp_path / name)
    assert contents(tmp_path / name) == TEXTS


@pytest.mark.parametrize("content", ["[1, 2]\n", '{"name": "a package"}', '{"a": 1}\n{"a": 2}\n', "[", ""])
def test_other_json_is_text(tmp_path, content):
    (tmp_path / "a.json").write_text(content)
    assert b"".join(contents(tmp_path / "a.json")) == content.encode()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('[{"body": "a"}]', r"a.json:1 has no field 'text' \(its fields: body\)"),
        ('[{"text": "a"}, 3]', "record 2 is no JSON object"),
        ('[{"text": "a"}', "record 2 is not JSON"),
        ('[{"text": "a"} {"text": "b"}x', "record 2 is not JSON"),
        ('[{"text": "a"},', "record 2 is not JSON"),
        pytest.param('[{"text": "a"}]' + 9 * " " + '\n[{"text": "b"}]', r"a.json goes on after its array", id="two"),
    ],
)
def test_arrays_that_are_wrong(tmp_path, content, message):
    (tmp_path / "a.json").write_text(content)
    with pytest.raises(UserError, match=message):
        contents(tmp_path / "a.json")


@given(texts=st.lists(st.text(min_size=1, max_size=40), min_size=1, max_size=6), block=st.integers(1, 50))
def test_an_array_read_in_small_pieces(texts, block):
    array = json.dumps([{"text": text} for text in texts], ensure_ascii=False) + " \n"
    patched = pytest.MonkeyPatch()
    with patched.context() as context:
        context.setattr(formats, "BLOCK_BYTES", block)
        file = io.BufferedReader(io.BytesIO(array.encode("utf-8", "surrogatepass")))
        passages = list(formats._json_array(file, "a", "text"))
    by_document = {}
    for passage in passages:
        by_document[passage.document] = by_document.get(passage.document, b"") + passage.content
    assert list(by_document.values()) == [text.encode("utf-8", "surrogatepass") for text in texts]


def tar() -> bytes:
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w") as archive:
        archive.addfile(tarfile.TarInfo("a.txt"))
    return packed.getvalue()


@pytest.mark.parametrize(
    ("name", "content", "what"),
    [
        ("a.png", bytes(range(256)), r"not text \(\.png\)"),
        ("a.PNG.gz", gzip.compress(b"abc"), r"not text \(\.png\)"),
        ("a.txt", b"\x89PNG\r\n", "a picture"),
        ("a.pdf.txt", b"%PDF-1.7", "a PDF document"),
        ("a.txt", "text".encode("utf-16"), "text in UTF-16"),
        ("a.gz", gzip.compress(tar()), "a tar archive"),
        ("a.zip", zipped({"a.png": b"\x89PNG"}), "no file of text"),
    ],
    ids=named,
)
def test_what_is_not_text_is_refused_and_left_out_of_folders(tmp_path, name, content, what, caplog):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=what):
        contents(tmp_path / name)
    with pytest.raises(UserError, match="no text"):
        contents(tmp_path)
    (tmp_path / "good.txt").write_text("good")
    with caplog.at_level(logging.WARNING, "dyadlm.data"):
        source = open_source(tmp_path)
        for _ in range(2):
            assert [passage.content for passage in source.splits["train"]()] == [b"good"]
    assert len(caplog.records) == 2  # once each for the two sources that were read


@pytest.mark.parametrize("pack", [gzip.compress, bz2.compress, lzma.compress, zstandard.compress])
def test_bombs_are_refused_and_limits_can_be_raised(tmp_path, pack, monkeypatch):
    monkeypatch.setattr(formats, "UNSUSPICIOUS_BYTES", 1 << 20)
    (tmp_path / "bomb").write_bytes(pack(bytes(30_000_000)))
    with pytest.raises(UserError, match="more than 250 times its size"):
        sum(map(len, contents(tmp_path / "bomb")))
    assert sum(map(len, contents(tmp_path / "bomb", most_decompressed=1e6))) == 30_000_000
    (tmp_path / "text").write_bytes(pack(make_text(200_000).encode()))
    assert sum(map(len, contents(tmp_path / "text"))) > 1 << 20


def test_a_bomb_in_an_archive(tmp_path, monkeypatch):
    monkeypatch.setattr(formats, "UNSUSPICIOUS_BYTES", 1 << 20)
    (tmp_path / "bomb.zip").write_bytes(zipped({"a.txt": bytes(10_000_000)}))
    with pytest.raises(UserError, match=r"bomb.zip/a.txt unpacks to more than 250 times"):
        contents(tmp_path / "bomb.zip")


def test_zstd_with_a_long_window(tmp_path):
    settings = zstandard.ZstdCompressionParameters.from_level(3, window_log=30, enable_ldm=True)
    compressor = zstandard.ZstdCompressor(compression_params=settings)
    packed = compressor.stream_reader(io.BytesIO(b"to be\n" * 10_000)).read()  # without a size in its header
    (tmp_path / "a.txt.zst").write_bytes(packed)
    assert b"".join(contents(tmp_path / "a.txt.zst")) == b"to be\n" * 10_000


@pytest.mark.parametrize("pack", [lambda content: content, gzip.compress, zstandard.compress])
def test_lines_of_json_may_be_longer_than_what_is_looked_at(tmp_path, pack):
    text = "word " * 500_000
    (tmp_path / "a.json").write_bytes(pack(json.dumps({"text": text}).encode() + b"\n"))
    assert b"".join(contents(tmp_path / "a.json")) == text.encode()


def test_compressed_data_that_changed_inside_is_refused(tmp_path):
    packed = bytearray(gzip.compress(bytes(range(32, 127)) * 40))
    for at in range(10, len(packed) - 8):
        (tmp_path / "a.txt.gz").write_bytes(packed[:at] + bytes([packed[at] ^ 0x5A]) + packed[at + 1 :])
        with pytest.raises(UserError, match="cannot be read"):
            contents(tmp_path / "a.txt.gz")


def test_records_are_bounded_and_long_ones_come_in_blocks(tmp_path, monkeypatch):
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": "word " * 1000, "section": "s"}) + "\n")
    monkeypatch.setattr(formats, "BLOCK_BYTES", 1000)
    passages = list(open_source(tmp_path / "a.jsonl").splits["train"]())
    assert len(passages) >= 5
    assert {passage.section for passage in passages} == {"s"}
    assert [passage.starts for passage in passages] == [True] + [False] * (len(passages) - 1)
    monkeypatch.setattr(formats, "LONGEST_RECORD", 1000)
    with pytest.raises(UserError, match="line 1 is longer than"):
        contents(tmp_path / "a.jsonl")
    pyarrow.parquet.write_table(pa.table({"text": ["word " * 1000]}), tmp_path / "a.parquet")
    with pytest.raises(UserError, match=r"a.parquet:1 holds more than"):
        contents(tmp_path / "a.parquet")


def test_folders_behind_links_are_read_once(tmp_path, caplog):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "most.txt").write_text("most")
    (tmp_path / "corpus").mkdir()
    (tmp_path / "corpus" / "some.txt").write_text("some")
    (tmp_path / "corpus" / "linked").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "corpus" / "round").symlink_to(tmp_path / "corpus")
    (tmp_path / "corpus" / "lost").symlink_to(tmp_path / "nowhere")
    with caplog.at_level(logging.WARNING, "dyadlm.data"):
        assert contents(tmp_path / "corpus") == [b"most", b"some"]
    assert [record.message.split("corpus/")[1].split()[0] for record in caplog.records] == ["lost", "round"]


def test_pipes_and_devices_are_named(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", "/dev/null"):
        with pytest.raises(UserError, match="a pipe or a device, not a file"):
            open_source(path)


def test_names_that_are_no_text_are_written_escaped(tmp_path):
    (tmp_path / "in").mkdir()
    with open(os.fsencode(tmp_path / "in") + b"/caf\xe9\x1b[2J.txt", "wb") as file:
        file.write(b"text")
    (passage,) = open_source(tmp_path / "in").splits["train"]()
    assert passage.document == r"caf\xe9\x1b[2J.txt"


@pytest.mark.parametrize("name", ["./a/b", "corpus/missing", "a/b.jsonl", "a/b.ZST"])
def test_what_looks_like_a_path_never_goes_to_the_hub(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "corpus").mkdir()
    monkeypatch.setattr("datasets.load_dataset_builder", lambda *given: pytest.fail("the hub was asked"))
    with pytest.raises(UserError, match="There is no file, folder or corpus"):
        open_source(name)
