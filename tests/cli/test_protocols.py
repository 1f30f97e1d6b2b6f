"""`dyadlm evaluate --protocols`: the same figures as the ways of scoring that it names."""

import json

import pytest

from dyadlm.cli import main

TEXT = "In the beginning was the word, and the word was read again and again by all who had read it before.\n" * 12


@pytest.fixture
def text(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my.txt").write_text(TEXT)
    return "my.txt"


def call(*arguments) -> int:
    with pytest.raises(SystemExit) as ended:
        main([str(argument) for argument in arguments])
    return ended.value.code or 0


def found(capsys, *arguments) -> dict:
    assert call("evaluate", "tiny-en", "--device", "cpu", *arguments, "--json") == 0
    return json.loads(capsys.readouterr().out)


@pytest.mark.slow
def test_protocols_are_the_ways_that_they_name(text, capsys):
    every = found(capsys, "--data", text, "--protocols", "--memory")["protocols"]
    stream = found(capsys, "--data", text, "--stream")
    mixed = found(capsys, "--data", text, "--stream", "--memory")
    windows = found(capsys, "--data", text)
    assert every["carried"]["nats"] == pytest.approx(stream["nats_per_token"], abs=1e-6)
    assert every["remembered"]["nats"] == pytest.approx(mixed["nats_per_token"], abs=1e-6)
    assert every["fresh"]["nats"] == pytest.approx(windows["nats_per_token"], abs=1e-6)
    assert every["context"]["nats"] < every["fresh"]["nats"]
    assert every["carried"]["tokens"] == stream["tokens"]
    assert "remembered" not in found(capsys, "--data", text, "--protocols")["protocols"]


def test_protocols_are_no_stream_alone(text, capsys):
    assert call("evaluate", "tiny-en", "--data", text, "--protocols", "--stream") == 2
    assert "leave --stream out" in capsys.readouterr().err
