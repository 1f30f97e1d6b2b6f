"""The official client of OpenAI against a real server: completions, chats, streams, odds, and what is refused."""

import json
import math
import threading
import time

import numpy as np
import pytest

from dyadlm.generate import Sampling, Session
from dyadlm.serve.generation import StopGate

pytest.importorskip("fastapi", reason="needs the extra serve")
openai = pytest.importorskip("openai")

PROMPT = "To be, or not"


def complete(live, **fields):
    return live.client.completions.create(**{"model": "small", "prompt": PROMPT, "max_tokens": 24, "seed": 3, **fields})


def alone(weights, prompt=PROMPT, tokens=24, name="small", slots="all", **sampling) -> str:
    """What the library writes, without a server."""
    session = Session(*weights[name], slots=slots)
    session.read_prompt(prompt)
    return "".join(session.write(tokens, Sampling(**{"seed": 3, **sampling})))


def test_models_are_listed(shared):
    found = {model.id: model for model in shared.client.models.list()}
    assert list(found) == ["small", "talker", "llama"]
    assert found["small"].sessions
    assert found["small"].state_bytes > 0
    assert not found["llama"].sessions
    assert found["talker"].chat
    assert shared.client.models.retrieve("llama").parameters > 1000


@pytest.mark.parametrize("name", ["small", "llama"])
@pytest.mark.parametrize("sampling", [{}, {"temperature": 0}, {"temperature": 0.7, "top_p": 0.9}])
def test_a_completion_is_what_the_library_writes(shared, weights, name, sampling):
    answer = complete(shared, model=name, **sampling)
    assert answer.choices[0].text == alone(weights, name=name, **sampling)
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage.prompt_tokens == len(PROMPT)
    assert answer.usage.completion_tokens == 24


def test_slots_of_the_prompt(shared, weights):
    """As `dyadlm generate --slots prompt`, also for rows that step beside others."""
    prompts = [PROMPT, TEXT_WITH_ACCENTS]
    greedy = {"prompt": prompts, "max_tokens": 120, "temperature": 0}
    own = [alone(weights, prompt, 120, slots="prompt", temperature=0) for prompt in prompts]
    assert [choice.text for choice in complete(shared, **greedy, extra_body={"slots": "prompt"}).choices] == own
    assert [choice.text for choice in complete(shared, **greedy).choices] != own, "the slots change what is written"
    with pytest.raises(openai.BadRequestError, match="no slots"):
        complete(shared, model="llama", extra_body={"slots": "prompt"})


def test_an_answer_that_is_not_for_the_slots_is_kept_like_any(shared, weights):
    """A session goes on from where a stop string has ended the answer, and its slots hold the prompt alone."""
    whole = alone(weights, PROMPT, 60, slots="prompt", temperature=0)
    stop = whole[20:24]
    shown = whole[: whole.index(stop)]
    session = shared.http.post("/v1/sessions", json={"model": "small"}).json()["id"]
    body = {"session": session, "slots": "prompt"}
    assert complete(shared, stop=[stop], max_tokens=60, temperature=0, extra_body=body).choices[0].text == shown
    library = Session(*weights["small"], slots="prompt")
    library.read_prompt(PROMPT)
    assert "".join(library.write(len(shown.encode()), Sampling(temperature=0))) == shown
    rest = complete(shared, prompt="", max_tokens=40, temperature=0, extra_body=body).choices[0].text
    assert rest == "".join(library.write(40, Sampling(temperature=0)))
    shared.http.delete(f"/v1/sessions/{session}")


def test_a_stream_is_the_same_text(shared):
    chunks = list(complete(shared, stream=True, stream_options={"include_usage": True}))
    assert "".join(chunk.choices[0].text for chunk in chunks[:-1]) == complete(shared).choices[0].text
    assert [chunk.choices[0].finish_reason for chunk in chunks[-2:-1]] == ["length"]
    assert chunks[-1].usage.total_tokens == len(PROMPT) + 24


def test_no_half_characters_are_streamed(shared, weights):
    text = TEXT_WITH_ACCENTS * 4
    whole = complete(shared, prompt=text, max_tokens=200, temperature=0)
    pieces = [
        chunk.choices[0].text for chunk in complete(shared, prompt=text, max_tokens=200, temperature=0, stream=True)
    ]
    assert "".join(pieces) == whole.choices[0].text
    assert any("é" in piece or "€" in piece for piece in pieces)
    assert not any("\ufffd" in piece for piece in pieces)


TEXT_WITH_ACCENTS = "or not to be. été € \nTo be, or not to be. été € \n"


def test_several_answers_to_several_prompts(shared, weights):
    answer = complete(shared, prompt=[PROMPT, "Is it?"], n=2)
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    expected = [alone(weights, prompt, seed=3 + choice) for prompt in (PROMPT, "Is it?") for choice in range(2)]
    assert [choice.text for choice in answer.choices] == expected
    texts = [""] * 4
    for chunk in complete(shared, prompt=[PROMPT, "Is it?"], n=2, stream=True):
        texts[chunk.choices[0].index] += chunk.choices[0].text
    assert texts == expected


def test_tokens_may_be_sent_instead_of_text(shared):
    ids = list(PROMPT.encode())
    expected = complete(shared).choices[0].text
    assert complete(shared, prompt=ids).choices[0].text == expected
    assert [choice.text for choice in complete(shared, prompt=[ids, ids]).choices] == [expected] * 2
    with pytest.raises(openai.BadRequestError, match="numbers from 0 to 258"):
        complete(shared, prompt=[259])


def test_an_empty_prompt_begins_a_text(shared):
    assert complete(shared, prompt="").usage.prompt_tokens == 1


@pytest.mark.parametrize("stream", [False, True])
def test_a_stop_string_ends_the_answer_and_is_not_shown(shared, stream):
    whole = complete(shared).choices[0].text
    stop = whole[5:8]
    expected = whole[: whole.index(stop)]
    answer = complete(shared, stop=["never written", stop], stream=stream)
    if stream:
        chunks = list(answer)
        assert "".join(chunk.choices[0].text for chunk in chunks) == expected
        assert chunks[-1].choices[0].finish_reason == "stop"
    else:
        assert answer.choices[0].text == expected
        assert answer.choices[0].finish_reason == "stop"


def test_the_gate_holds_back_only_what_may_be_a_stop():
    gate = StopGate(["ab", "xyz"])
    assert [gate.push(text) for text in ("1a", "a", "c", "xy")] == [
        ("1", False),
        ("a", False),
        ("ac", False),
        ("", False),
    ]
    assert gate.push("xyz!") == ("xy", True)
    gate = StopGate(["abc"])
    gate.push("ab")
    assert gate.finish() == "ab"


def test_log_probabilities_with_bytes(shared, weights):
    answer = complete(shared, prompt="été", logprobs=3, echo=True, max_tokens=8, temperature=0).choices[0]
    told = answer.logprobs
    assert answer.text.startswith("été")
    assert bytes(byte for token in told.bytes for byte in token).decode(errors="replace") == answer.text
    assert told.tokens[:3] == ["bytes:\\xc3", "bytes:\\xa9", "t"]
    assert told.token_logprobs[0] is None
    assert told.text_offset[2:4] == [1, 2]
    session = Session(*weights["small"])
    nats = session.read(list("été".encode()))
    np.testing.assert_allclose(told.token_logprobs[1:5], -nats[1:], atol=1e-4)
    for value, top in zip(told.token_logprobs[5:], told.top_logprobs[5:], strict=True):
        assert len(top) == 3
        assert value == pytest.approx(max(top.values()))  # temperature 0
    streamed = list(complete(shared, prompt="été", logprobs=3, echo=True, max_tokens=8, temperature=0, stream=True))
    assert [token for chunk in streamed for token in chunk.choices[0].logprobs.tokens] == told.tokens
    offsets = [offset for chunk in streamed for offset in chunk.choices[0].logprobs.text_offset]
    assert offsets[-3:] == told.text_offset[-3:]


def test_scoring_a_text_without_writing(shared, weights):
    told = complete(shared, prompt=PROMPT, logprobs=0, echo=True, max_tokens=0)
    assert told.choices[0].text == PROMPT
    session = Session(*weights["small"])
    expected = session.read(list(PROMPT.encode()))[1:].sum()
    assert sum(told.choices[0].logprobs.token_logprobs[1:]) == pytest.approx(-expected, abs=1e-3)


def test_a_chat(shared, weights):
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Is it?"}]
    answer = shared.client.chat.completions.create(
        model="talker", messages=messages, max_tokens=12, seed=1, logprobs=True, top_logprobs=2
    )
    text = weights["talker"][1].apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert answer.choices[0].message.content == alone(weights, text, 12, "talker", seed=1)
    assert answer.choices[0].message.role == "assistant"
    told = answer.choices[0].logprobs.content
    assert len(told) == 12
    assert b"".join(bytes(token.bytes) for token in told).decode(errors="replace") == answer.choices[0].message.content
    assert all(math.exp(token.logprob) <= 1 and len(token.top_logprobs) == 2 for token in told)
    chunks = list(
        shared.client.chat.completions.create(model="talker", messages=messages, max_tokens=12, seed=1, stream=True)
    )
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == answer.choices[0].message.content


def test_a_chat_with_a_model_without_a_template_is_refused(shared):
    with pytest.raises(openai.BadRequestError, match="no chat template") as refused:
        shared.client.chat.completions.create(model="small", messages=[{"role": "user", "content": "Hi"}])
    assert refused.value.code == "no_chat_template"


def test_the_end_token_ends_an_answer(weights, serve):
    live = serve()
    model = live.server_state.models["small"]
    first = complete(live, temperature=0, max_tokens=1, logprobs=1).choices[0].logprobs.bytes[0][0]
    model.end_tokens = frozenset([first])
    answer = complete(live, temperature=0)
    assert answer.choices[0].text == ""
    assert answer.choices[0].finish_reason == "stop"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"temperature": -1}, "temperature"),
        ({"max_tokens": 10**9}, "at most 65536"),
        ({"n": 1000}, "At most 128"),
        ({"logit_bias": {"5": 1.0}}, "not supported"),
        ({"presence_penalty": 1.0}, "not supported"),
        ({"stop": ""}, "stop string"),
        ({"stop": ["a"] * 17}, "stop"),
        ({"extra_body": {"no_such_field": 1}}, "not known"),
        ({"seed": 2**63}, "seed"),
        ({"prompt": []}, "at least one prompt"),
    ],
)
def test_what_cannot_be_served_is_refused_by_name(shared, fields, message):
    with pytest.raises(openai.BadRequestError, match=message):
        complete(shared, **fields)


def test_an_unknown_model_is_not_found(shared):
    with pytest.raises(openai.NotFoundError, match="no model"):
        complete(shared, model="another")


def test_a_text_longer_than_the_positions_of_a_model(shared):
    answer = shared.http.post("/v1/completions", json={"model": "llama", "prompt": "x" * 50, "max_tokens": 2})
    assert answer.status_code == 200


def test_offsets_are_counted_in_characters_and_in_linear_time(shared):
    from dyadlm.serve.generation import TokenOdds
    from dyadlm.serve.openai_api import Offsets, legacy_logprobs

    served = shared.server_state.models["small"]
    content = "a\u00e9\u20ac\U0001f600".encode() + bytes(np.random.default_rng(0).integers(0, 256, 200).tolist())
    odds, slow = [TokenOdds(byte, None, []) for byte in content], []
    for end in range(len(content)):
        slow.append(len(content[:end].decode(errors="ignore")))
    for size in (2, len(odds)):  # chunks of a stream may end within a character
        offsets = Offsets()
        chunks = [legacy_logprobs(served, odds[at : at + size], offsets) for at in range(0, len(odds), size)]
        assert [offset for chunk in chunks for offset in chunk["text_offset"]] == slow
    began = time.monotonic()
    legacy_logprobs(served, [TokenOdds(0xE9, None, [])] * 30_000, Offsets())
    assert time.monotonic() - began < 10  # all that came before, decoded at each token, takes minutes


@pytest.mark.parametrize(
    ("path", "fields"),
    [
        ("/v1/completions", {"prompt": "a" * 65_536, "max_tokens": 1, "echo": True, "logprobs": 0}),
        ("/v1/completions", {"prompt": ["a", "b"], "max_tokens": 40_000, "logprobs": 0}),
        ("/score", {"text": "a" * 65_537, "per": "token"}),
        ("/score", {"text": "\n" * 65_537, "per": "line"}),
    ],
)
def test_answers_tell_of_a_bounded_number_of_tokens(shared, path, fields):
    answer = shared.http.post(path, json=fields)
    assert answer.status_code == 400
    assert "at most 65536" in answer.json()["error"]["message"]


def test_tokens_are_told_up_to_a_bound(shared, monkeypatch):
    monkeypatch.setattr("dyadlm.serve.texts.MOST_TOKENS", 20)
    assert shared.http.post("/tokenize", json={"text": "a" * 20}).status_code == 200
    answer = shared.http.post("/tokenize", json={"text": "a" * 21})
    assert answer.status_code == 400
    assert "21 tokens, and at most 20" in answer.json()["error"]["message"]


@pytest.mark.parametrize("stream", [False, True])
def test_large_answers_are_written_beside_the_event_loop(shared, monkeypatch, stream):
    """With the same content as small ones."""
    from dyadlm.serve import completing

    threads, own = [], completing.legacy_logprobs

    def noted(*given):
        threads.append(threading.current_thread().name)
        return own(*given)

    def answers():
        body = {"prompt": "To be", "max_tokens": 8, "seed": 1, "logprobs": 2, "stream": stream}
        text = shared.http.post("/v1/completions", json=body).text
        events = [line.removeprefix("data: ") for line in text.splitlines() if line and line != "data: [DONE]"]
        choices = [json.loads(event)["choices"][0] for event in events]
        return "".join(one["text"] for one in choices), [t for one in choices for t in one["logprobs"]["tokens"]]

    monkeypatch.setattr(completing, "legacy_logprobs", noted)
    small = answers()
    assert not any(name.startswith("asyncio_") for name in threads)
    monkeypatch.setattr("dyadlm.serve.answers.LARGE", 1)
    assert answers() == small
    assert any(name.startswith("asyncio_") for name in threads)


def test_large_texts_are_split_into_tokens_beside_the_event_loop(shared, monkeypatch):
    served, threads = shared.server_state.models["small"], []
    tokenizer = served.tokenizer

    def noted(*given, **options):
        threads.append(threading.current_thread().name)
        return tokenizer(*given, **options)

    noted.bos_token_id = tokenizer.bos_token_id
    monkeypatch.setattr(served, "tokenizer", noted)
    for size in (10, 20_000):
        assert shared.http.post("/tokenize", json={"text": "a" * size}).status_code == 200
        answer = shared.http.post("/v1/sessions", json={"text": "a" * size})
        assert answer.status_code == 201
        shared.http.delete(f"/v1/sessions/{answer.json()['id']}")
    loop = threads[0]
    assert threads[:2] == [loop] * 2
    assert len(threads) == 4
    assert loop not in threads[2:]


def test_scores_are_those_of_the_library(shared, weights):
    from dyadlm.score import Drift, Reading, Scorer, units_of
    from dyadlm.score.lines import Numbering, whole_lines

    text = "To be, or not\n\nto be: été\nthat"
    numbering = Numbering("text")
    scorer = Scorer(Session(*weights["small"]), weights["small"][1], Drift())
    lines = scorer.read([numbering.place(line) for line in whole_lines(text.encode())])
    for per in ("token", "line", "document"):
        expected = list(units_of(lines, Reading(per)))
        items = shared.http.post("/score", json={"text": text, "per": per}).json()["items"]
        assert [item["bits"] for item in items] == pytest.approx([unit.bits for unit in expected], rel=1e-3)
        assert [item["bytes"] for item in items] == [unit.size for unit in expected]
        if per != "token":  # a token is a byte here
            assert "".join(item["text"] for item in items) == text
    assert shared.http.post("/score", json={"text": ""}).json() == {"unit": "bits", "items": []}
