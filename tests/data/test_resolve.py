"""What `--data` means: prepared folders, sources prepared once into the cache, weights, one tokenizer."""

import pytest

from dyadlm.data import byte_tokenizer, prepare, resolve, resolve_data, tokenizer_identity
from dyadlm.data.encoding import decode_bytes
from dyadlm.data.resolve import parse_weight
from dyadlm.errors import UserError

from .conftest import make_text


@pytest.fixture
def page(tmp_path):
    path = tmp_path / "page.txt"
    path.write_text(make_text(300))
    return path


def test_a_file_is_prepared_once_and_again_when_it_changes(page, cache):
    first = resolve_data([str(page)])
    (folder,) = (cache / "prepared").iterdir()
    written = folder.stat().st_mtime_ns
    again = resolve_data([str(page)])
    assert folder.stat().st_mtime_ns == written
    assert again.datasets[0].manifest == first.datasets[0].manifest
    page.write_text("other text entirely")
    resolve_data([str(page)])
    assert len(list((cache / "prepared").iterdir())) == 2
    (stream, weight), *_ = first.train
    assert weight == 1.0
    assert make_text(300).encode().startswith(decode_bytes(stream.tokens(0, len(stream))))
    assert first.test == []
    with pytest.raises(UserError, match="no split 'test'; it has train, validation"):
        first.split("test")
    assert first.split("validation") == first.validation


def test_sources_with_weights_have_their_own_indices(page, tmp_path):
    (tmp_path / "two.txt").write_text(make_text(100, seed=1))
    prepare([tmp_path / "two.txt"], tmp_path / "two")
    resolved = resolve_data([f"{page}:3", str(tmp_path / "two")])
    assert [weight for _, weight in resolved.train] == [3.0, 1.0]
    streams = [stream for stream, _ in resolved.train] + resolved.validation
    indices = [index for stream in streams for index in stream.index(0, len(stream)).tolist()]
    assert len(set(indices)) == len(indices)
    assert [stream.documents[0].name for stream in resolved.validation] == ["page.txt", "two.txt"]


def test_weights(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "odd:2").write_text("a name with a colon")
    assert parse_weight("odd:2") == ("odd:2", 1.0)
    assert parse_weight("odd:2:0.5") == ("odd:2", 0.5)
    assert parse_weight("shakespeare:2") == ("shakespeare", 2.0)
    assert parse_weight("owner/name:configuration") == ("owner/name:configuration", 1.0)
    assert parse_weight("owner/name:configuration:2") == ("owner/name:configuration", 2.0)
    for wrong in ("a:0", "a:-1", "a:nan", "a:inf"):
        with pytest.raises(UserError, match="give a positive number"):
            parse_weight(wrong)


def test_one_tokenizer_for_everything(page, tmp_path, text_tokenizer):
    prepare([page], tmp_path / "text", text_tokenizer)
    prepare([page], tmp_path / "bytes")
    text = resolve_data([str(page), str(tmp_path / "text")])
    assert tokenizer_identity(text.tokenizer) == tokenizer_identity(text_tokenizer)
    assert tokenizer_identity(resolve_data([str(page)]).tokenizer) == tokenizer_identity(byte_tokenizer())
    with pytest.raises(UserError, match="another tokenizer"):
        resolve_data([str(tmp_path / "text"), str(tmp_path / "bytes")])
    with pytest.raises(UserError, match="another tokenizer"):
        resolve_data([str(tmp_path / "bytes")], text_tokenizer)
    resolve_data([str(tmp_path / "bytes")], "byte")


def test_another_process_may_be_first(page, monkeypatch):
    """The folder appears while this process prepares it: it takes the other's."""

    def slow(sources, output, tokenizer, **options):
        prepare(sources, output, tokenizer, **options)
        return prepare(sources, output, tokenizer, **options)

    monkeypatch.setattr(resolve, "prepare", slow)
    assert len(resolve_data([str(page)]).train) == 1


def test_nothing_and_what_is_missing(cache):
    with pytest.raises(UserError, match="There is no data"):
        resolve_data([])
    with pytest.raises(UserError, match="'shakespere'; the nearest is shakespeare; "):
        resolve_data(["shakespere:2"])
    assert not cache.exists()
