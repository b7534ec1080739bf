"""POST /v1/completions: prompts of every kind, echo, scoring, best_of, logprobs, streams."""

from __future__ import annotations

import json
import threading

import openai
import pytest
from fake_engine import MODEL

PATH = "/v1/completions"


def complete(server, prompt="say(abc)yas", **fields):
    return server.post(PATH, {"model": MODEL, "prompt": prompt, **fields})


def test_prompt_kinds_agree(client, text_parts):
    tokenizer, _ = text_parts
    text = "say(abc)yas"
    ids = tokenizer.encode(text)
    for prompt, count in ((text, 1), ([text], 1), (ids, 1), ([ids, ids], 2), ([text, text], 2)):
        answer = client.completions.create(model=MODEL, prompt=prompt)
        assert [c.text for c in answer.choices] == ["abc"] * count
        assert answer.usage.prompt_tokens == count * len(ids)


def test_default_prompt_is_bos(server, text_parts):
    tokenizer, _ = text_parts
    assert server.post(PATH, {"model": MODEL}).status_code == 200
    assert server.engine.requests[0].prompt_token_ids == [tokenizer.bos_token_id]


def test_index_is_prompt_times_n_plus_choice(client):
    answer = client.completions.create(model=MODEL, prompt=["say(a)yas", "say(b)yas"], n=2)
    assert [(c.index, c.text) for c in answer.choices] == [(0, "a"), (1, "a"), (2, "b"), (3, "b")]


def test_default_max_tokens_is_16(client):
    answer = client.completions.create(model=MODEL, prompt=f"say({'x' * 40})yas")
    assert answer.choices[0].text == "x" * 16
    assert answer.choices[0].finish_reason == "length"


def test_echo_puts_the_prompt_first(client):
    answer = client.completions.create(model=MODEL, prompt="say(abc)yas", echo=True)
    assert answer.choices[0].text == "say(abc)yasabc"


def test_logprobs(client):
    answer = client.completions.create(model=MODEL, prompt="say(ab)yas", logprobs=2)
    logprobs = answer.choices[0].logprobs
    assert logprobs.tokens[:2] == ["a", "b"]
    assert logprobs.token_logprobs[:2] == [-0.25, -0.25]
    assert logprobs.top_logprobs[0] == {"a": -0.25, "b": -0.5}
    assert logprobs.text_offset[:2] == [0, 1]


def test_text_offsets_count_the_characters_of_the_text(client, text_parts):
    tokenizer, _ = text_parts
    ids = [tokenizer.bos_token_id, *tokenizer.encode("say(aéb)yas")]
    answer = client.completions.create(model=MODEL, prompt=ids, echo=True, logprobs=0)
    choice = answer.choices[0]
    assert choice.text == "say(aéb)yasaéb"
    assert choice.logprobs.text_offset[:9] == [0, 0, 1, 2, 3, 4, 5, 5, 6]
    assert choice.logprobs.text_offset[-5:] == [11, 12, 12, 13, 14]
    stream = client.completions.create(model=MODEL, prompt=ids, logprobs=0, stream=True)
    chunks = [chunk.choices[0] for chunk in stream]
    assert [o for chunk in chunks for o in chunk.logprobs.text_offset] == [0, 1, 1, 2, 3]


def test_of_tokens_with_one_text_the_generated_one_counts(client):
    answer = client.completions.create(model=MODEL, prompt="say(é)yas", logprobs=3)
    first = answer.choices[0].logprobs
    assert first.tokens[0] == "\ufffd"
    assert first.top_logprobs[0]["\ufffd"] == first.token_logprobs[0]


def test_echoed_tokens_have_as_many_alternatives_as_asked_for(server):
    body = complete(server, "ab", echo=True, max_tokens=0, logprobs=4, prompt_logprobs=1).json()
    assert len(body["choices"][0]["logprobs"]["top_logprobs"][1]) == 4


@pytest.mark.parametrize("stream", [False, True])
def test_many_prompts_leave_room_in_the_queue(server, stream):
    server.engine.delay = 0.02
    most, done = 0, threading.Event()

    def watch() -> None:
        nonlocal most
        while not done.wait(0.001):
            most = max(most, len(server.engine.live))

    watcher = threading.Thread(target=watch)
    watcher.start()
    response = complete(server, ["say(x)yas"] * 150, stream=stream)
    done.set()
    watcher.join()
    assert response.text.count('"finish_reason":"stop"') == 150
    assert 1 < most <= 64


def test_echo_with_max_tokens_0_scores_the_prompt(client):
    answer = client.completions.create(
        model=MODEL, prompt="héy", echo=True, max_tokens=0, logprobs=0
    )
    choice = answer.choices[0]
    assert (choice.text, choice.finish_reason) == ("héy", "length")
    assert len(choice.logprobs.tokens) == len("héy".encode())
    assert choice.logprobs.token_logprobs == [None, -0.25, -0.25, -0.25]
    assert answer.usage.completion_tokens == 0


def test_tokens_as_token_ids(client):
    answer = client.completions.create(
        model=MODEL,
        prompt="say(a)yas",
        logprobs=0,
        extra_body={"return_tokens_as_token_ids": True, "return_token_ids": True},
    )
    choice = answer.choices[0]
    assert choice.logprobs.tokens == [f"token_id:{i}" for i in choice.token_ids]
    assert len(choice.prompt_token_ids) == len("say(a)yas")


def test_best_of_generates_more_and_returns_n(server):
    body = complete(server, n=2, best_of=4).json()
    assert [c["index"] for c in body["choices"]] == [0, 1]
    assert body["choices"][0]["logprobs"] is None
    assert server.engine.requests[0].sampling.num_sequences == 4
    assert body["usage"]["completion_tokens"] == 4 * 4


def test_beam_search_reaches_the_engine(server):
    assert complete(server, n=3, use_beam_search=True, length_penalty=0.5).status_code == 200
    sampling = server.engine.requests[0].sampling
    assert (sampling.beam_width, sampling.n, sampling.temperature) == (3, 3, 0.0)
    assert sampling.length_penalty == 0.5


def test_prompt_logprobs(server):
    body = complete(server, "ab", prompt_logprobs=1).json()
    first, second = body["choices"][0]["prompt_logprobs"]
    assert first is None
    assert all(entry["logprob"] <= 0 and entry["decoded_token"] for entry in second.values())


def test_stream_of_two_prompts(client):
    stream = client.completions.create(
        model=MODEL,
        prompt=["say(ab)yas", "say(cd)yas"],
        stream=True,
        echo=True,
        stream_options={"include_usage": True},
    )
    texts, reasons, usage = {0: "", 1: ""}, {}, None
    for chunk in stream:
        assert chunk.object == "text_completion"
        usage = chunk.usage or usage
        for choice in chunk.choices:
            texts[choice.index] += choice.text
            reasons[choice.index] = choice.finish_reason
    assert texts == {0: "say(ab)yasab", 1: "say(cd)yascd"}
    assert reasons == {0: "stop", 1: "stop"}
    assert usage.completion_tokens == 6


def test_stream_ends_with_done(server):
    lines = complete(server, stream=True).text.strip().split("\n\n")
    assert lines[-1] == "data: [DONE]"
    assert all(json.loads(line[6:])["object"] == "text_completion" for line in lines[:-1])


def test_one_failing_prompt_fails_the_request(server):
    response = complete(server, [[1], [10**6]])
    assert response.status_code == 400
    assert response.json()["error"]["param"] == "prompt[1]"


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"best_of": 1, "n": 2}, "best_of"),
        ({"best_of": 3, "stream": True}, "best_of"),
        ({"best_of": 21}, "best_of"),
        ({"logprobs": "many"}, "logprobs"),
        ({"logprobs": 6}, "logprobs"),
        ({"suffix": "end"}, "suffix"),
        ({"max_tokens": -3}, "max_tokens"),
        ({"prompt": ""}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"prompt": [[]]}, "prompt[0]"),
        ({"prompt": [1, -1]}, "prompt[1]"),
        ({"prompt": ["x"] * 1024, "n": 2}, "prompt"),
        ({"prompt": {"a": 1}}, "prompt"),
        ({"prompt_logprobs": 1, "stream": True}, "prompt_logprobs"),
        ({"use_beam_search": True, "temperature": 1}, "temperature"),
        ({"use_beam_search": True, "stream": True}, "use_beam_search"),
        ({"use_beam_search": True, "n": 33}, "n"),
        ({"use_beam_search": True, "logprobs": 0}, "logprobs"),
        ({"use_beam_search": True, "structured_outputs": {"regex": "a"}}, "use_beam_search"),
        ({"use_beam_search": True, "best_of": 2}, "best_of"),
        ({"echo": True, "logprobs": 1, "stream": True}, "echo"),
    ],
)
def test_refusals_name_the_field(server, fields, param):
    response = complete(server, **fields)
    assert response.status_code == 400
    assert response.json()["error"]["param"] == param
    assert not server.engine.requests


def test_context_length_is_refused_with_both_numbers(client):
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(model=MODEL, prompt="x" * 100, max_tokens=2000)
    assert caught.value.code == "context_length_exceeded"
    assert "2048" in caught.value.message
    assert "2100" in caught.value.message
