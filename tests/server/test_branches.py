"""Parallel branches of one answer: equal to independent requests, joined, streamed and refused."""

from __future__ import annotations

import contextlib
import itertools
import json
import time

import httpx
import pytest
from fake_engine import MODEL

from chunkllama.errors import ENDED_ON_DEMAND, OverloadedError, RequestFailedError

THREADS = 7  # of an answer that forks, at most
LEADS = ["say(red)yas", "say(green)yas"]


def branched(server, **fields):
    fields.setdefault("max_tokens", 20)
    parallel = {"branches": LEADS, "join_tokens": 0, **fields.pop("parallel", {})}
    return server.chat("colours", parallel=parallel, **fields)


def wait_until_idle(engine) -> None:
    deadline = time.monotonic() + 60
    while engine.live:
        assert time.monotonic() < deadline
        time.sleep(0.01)


def chunks(response: httpx.Response) -> list[dict]:
    lines = response.text.splitlines()
    return [json.loads(line[6:]) for line in lines if line.startswith("data: {")]


def test_concat_is_the_texts_in_order(server):
    answer = branched(server).json()["choices"]
    assert len(answer) == 1
    assert answer[0]["message"]["content"] == "say(red)yasred\n\nsay(green)yasgreen"
    assert answer[0]["finish_reason"] == "stop"


def test_the_parent_reads_the_branches_and_goes_on(server):
    answer = branched(server, parallel={"join_tokens": 8}).json()["choices"][0]
    # The fake model says what the last branch's lead tells it to.
    assert answer["message"]["content"] == "say(red)yasred\n\nsay(green)yasgreen\n\ngreen"
    first, second, after = server.engine.requests
    shared = first.prompt_token_ids[: -len(LEADS[0])]
    assert second.prompt_token_ids[: len(shared)] == shared
    text = server.engine.tokenizer.decode(after.prompt_token_ids[len(shared) :])
    assert text == "say(red)yasred\n\nsay(green)yasgreen\n\n"
    assert after.sampling.max_tokens == 8


def test_json_is_an_object_of_the_texts(server):
    answer = branched(server, parallel={"join": "json"}).json()["choices"][0]
    assert json.loads(answer["message"]["content"]) == {
        "branches": ["say(red)yasred", "say(green)yasgreen"]
    }
    answer = branched(server, parallel={"join": "json", "join_tokens": 8}).json()["choices"][0]
    assert json.loads(answer["message"]["content"])["answer"] == "green"


def test_last_is_only_what_follows(server):
    parallel = {"join": "last", "join_tokens": 8}
    answer = branched(server, parallel=parallel).json()["choices"][0]
    assert answer["message"]["content"] == "green"


def test_usage_counts_the_shared_prompt_once(server):
    alone = server.chat("colours").json()["usage"]
    server.engine.reset()
    usage = branched(server).json()["usage"]
    assert usage["prompt_tokens"] == alone["prompt_tokens"] + sum(map(len, LEADS))
    assert usage["completion_tokens"] == len("red") + len("green") + 2
    assert usage["prompt_tokens_details"]["cached_tokens"] == 0


def test_a_stream_names_the_branch_of_each_text(server):
    response = branched(server, parallel={"join_tokens": 8}, stream=True)
    texts: dict[int | None, str] = {}
    reasons = []
    for chunk in chunks(response):
        choice = chunk["choices"][0]
        assert choice["index"] == 0
        reasons.append(choice["finish_reason"])
        branch = choice.get("branch")
        texts[branch] = texts.get(branch, "") + (choice["delta"].get("content") or "")
    assert texts == {0: "say(red)yasred", 1: "say(green)yasgreen", None: "green"}
    assert reasons == [None] * (len(reasons) - 1) + ["stop"]
    assert response.text.endswith("data: [DONE]\n\n")


@contextlib.contextmanager
def failing(engine, error: Exception, num_deltas: int, fails):
    """The engine fails the requests for which ``fails(number)`` holds after so many deltas."""
    generate, numbers = engine.generate, itertools.count()

    async def generate_or_fail(request):
        number, left = next(numbers), num_deltas
        async for delta in generate(request):
            if fails(number) and left == 0:
                raise error
            left -= 1
            yield delta

    engine.generate = generate_or_fail
    try:
        yield
    finally:
        del engine.generate


def test_a_branch_that_the_operator_ends_leaves_the_others(server):
    error = RequestFailedError("ended", ENDED_ON_DEMAND)
    with failing(server.engine, error, 2, lambda number: number == 0):
        answer = branched(server).json()["choices"][0]
    assert answer["message"]["content"] == "say(red)yasre\n\nsay(green)yasgreen"


def test_a_lost_client_aborts_every_branch(server, client):
    server.engine.delay = 0.01
    stream = client.chat.completions.create(
        model=MODEL,
        messages=[{"role": "user", "content": "hi"}],
        stream=True,
        extra_body={"ignore_eos": True, "parallel": {"branches": ["a", "b", "c"]}},
    )
    next(iter(stream))
    assert len(server.engine.live) == 3
    stream.close()
    wait_until_idle(server.engine)
    assert len(server.engine.aborted) == 3


def test_branches_without_a_limit_share_the_context(server):
    server.chat("colours", parallel={"branches": LEADS})
    first, second, after = server.engine.requests
    limit = first.sampling.max_tokens
    assert limit == second.sampling.max_tokens == after.sampling.max_tokens
    prompt = len(first.prompt_token_ids) + len(LEADS[1]) + 2 * len("\n\n")
    assert 0 <= server.engine.info.max_request_tokens - (prompt + 3 * limit) < 3


def test_completions_and_responses_have_branches(server):
    parallel = {"branches": LEADS, "join_tokens": 0}
    body = {"model": MODEL, "prompt": "p", "max_tokens": 9, "parallel": parallel}
    choice = server.post("/v1/completions", body).json()["choices"][0]
    assert choice["text"] == "say(red)yasred\n\nsay(green)yasgreen"
    streamed = chunks(server.post("/v1/completions", {**body, "stream": True}))
    assert {c["choices"][0].get("branch") for c in streamed if c["choices"][0]["text"]} == {0, 1}
    body = {"model": MODEL, "input": "p", "max_output_tokens": 20, "parallel": parallel}
    answer = server.post("/v1/responses", body).json()
    assert answer["output"][0]["content"][0]["text"] == "say(red)yasred\n\nsay(green)yasgreen"
    streamed = chunks(server.post("/v1/responses", {**body, "stream": True}))
    deltas = [event for event in streamed if event["type"] == "response.output_text.delta"]
    for branch, text in enumerate(["say(red)yasred", "say(green)yasgreen"]):
        assert "".join(d["delta"] for d in deltas if d["branch"] == branch) == text


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"n": 2}, "n"),
        ({"logprobs": True}, "logprobs"),
        ({"prompt_logprobs": 0}, "prompt_logprobs"),
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"parallel": {"branches": []}}, "parallel.branches"),
        ({"parallel": {"branches": ["a"], "join": "zip"}}, "parallel.join"),
        ({"parallel": {"branches": ["a"], "join": "last"}}, "parallel.join_tokens"),
        ({"parallel": {"branches": ["a"] * 129}}, "parallel.branches"),
        ({"max_tokens": 1500}, "max_tokens"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(server, fields, param):
    response = branched(server, **fields)
    assert response.status_code == 400
    assert response.json()["error"]["param"] == param
    assert not server.engine.requests


def test_a_text_format_and_one_choice_are_no_obstacle(server):
    fields = {"n": 1, "logprobs": False, "response_format": {"type": "text"}, "tools": []}
    assert branched(server, **fields).json()["choices"][0]["finish_reason"] == "stop"
    body = {"model": MODEL, "prompt": "p", "parallel": {"branches": ["a"]}, "logprobs": 0}
    response = server.post("/v1/completions", body)
    assert (response.status_code, response.json()["error"]["param"]) == (400, "logprobs")


def test_a_branch_that_was_cut_is_said(server):
    choice = branched(server, max_tokens=2).json()["choices"][0]
    assert (choice["message"]["content"], choice["finish_reason"]) == (
        "say(red)yasre\n\nsay(green)yasgr",
        "length",
    )


def test_an_answer_ends_with_its_last_branch(server):
    server.engine.fail_after = (0, RequestFailedError("ended", ENDED_ON_DEMAND))
    assert branched(server, parallel={"join_tokens": 8}).status_code == 410
    assert len(server.engine.requests) == 2


def test_min_tokens_is_no_more_than_what_the_join_may_write(server):
    branched(server, max_tokens=9, min_tokens=9, parallel={"join_tokens": 4})
    *_, after = server.engine.requests
    assert (after.sampling.min_tokens, after.sampling.max_tokens) == (4, 4)


@pytest.mark.parametrize("background", [False, True])
def test_a_stored_response_has_the_joined_text(server, background):
    parallel = {"branches": LEADS, "join": "json", "join_tokens": 0}
    body = {"model": MODEL, "input": "p", "parallel": parallel}
    streamed = chunks(
        server.post("/v1/responses", {**body, "stream": True, "background": background})
    )
    response = streamed[-1]["response"]
    texts = {"branches": ["say(red)yasred", "say(green)yasgreen"]}
    assert json.loads(response["output"][0]["content"][0]["text"]) == texts
    with server.http() as http:
        stored = http.get(f"/v1/responses/{response['id']}").json()
    assert stored["output"] == response["output"]


@pytest.fixture(scope="module")
def forking(start_server, text_parts):
    fork, child = (text_parts[0].encode(letter)[-1] for letter in "FC")
    return start_server(fork_tokens=(fork, child), max_request_choices=THREADS)


@pytest.mark.parametrize("size", [1, 3, 9])
@pytest.mark.parametrize("stop", [[], ["Fbcx"]], ids=["", "held"])
def test_a_fork_of_the_model_begins_a_branch_in_its_place(forking, size, stop):
    forking.engine.reset()
    forking.engine.tokens_per_delta = size
    answer = forking.chat("say(aFbcd)yas", max_tokens=9, stop=stop).json()
    # The fake model answers each branch as it answers the request, up to the limit of branches.
    root, *branches = forking.engine.requests
    decode = forking.engine.tokenizer.decode
    tails = {decode(b.prompt_token_ids[len(root.prompt_token_ids) :]) for b in branches}
    assert "aFC" in tails and "aFCaFC" in tails
    assert len({b.request_id for b in branches}) == len(branches) == THREADS - 1
    text = "aF" * THREADS + "bcd" * THREADS  # each branch behind the fork of the one before
    assert answer["choices"][0]["message"]["content"] == text
    assert answer["usage"]["completion_tokens"] == 6 * len(forking.engine.requests)


def test_a_refused_branch_leaves_the_answer(forking):
    forking.engine.reset()
    with failing(forking.engine, OverloadedError("full", 1), 0, lambda number: number > 0):
        response = forking.chat("say(aFb)yas", max_tokens=9)
    assert response.json()["choices"][0]["message"]["content"] == "aFb"


def test_answers_that_cannot_fork_write_no_fork(forking):
    forking.engine.reset()
    body = {"model": MODEL, "max_tokens": 9, "messages": [{"role": "user", "content": "hi"}]}
    forking.post("/v1/messages", body)
    forking.chat("say(aFb)yas", n=2)
    fork = forking.app.state.context.fork_tokens[0]
    assert [r.sampling.bad_words_token_ids for r in forking.engine.requests] == [((fork,),)] * 2


def test_a_stream_of_forks_names_the_branches(forking):
    forking.engine.reset()
    response = forking.chat("say(aFb)yas", stream=True, max_tokens=9)
    texts: dict[int | None, str] = {}
    for chunk in chunks(response):
        choice = chunk["choices"][0]
        branch = choice.get("branch")
        texts[branch] = texts.get(branch, "") + (choice["delta"].get("content") or "")
    assert texts.pop(None) == "aFb"
    assert set(texts) == set(range(1, THREADS))
    assert set(texts.values()) == {"aFb"}


@pytest.mark.parametrize("fields", [{"n": 2}, {"logprobs": True}], ids=["n", "logprobs"])
def test_requests_that_exclude_branches_do_not_fork(forking, fields):
    forking.engine.reset()
    forking.chat("say(aFb)yas", max_tokens=9, **fields)
    assert len(forking.engine.requests) == 1


def test_a_branch_equals_an_independent_request(tiny_server):
    prompt, leads = "the system prompt of all branches " * 4, ["one", "two", "twelve", "three"]
    url = f"{tiny_server.url}/v1/completions"
    letters = {"prompt": "abcdefghijklmnopqrstuvwxyz", "add_special_tokens": False}
    shared = {
        **{"model": MODEL, "temperature": 0, "max_tokens": 12, "ignore_eos": True},
        # So that the text says which tokens it has.
        "allowed_token_ids": httpx.post(f"{tiny_server.url}/tokenize", json=letters).json()[
            "tokens"
        ],
    }
    parallel = {"branches": leads, "join": "json", "join_tokens": 4}
    body = {**shared, "prompt": prompt, "parallel": parallel, "cache_salt": "branches"}
    answer = httpx.post(url, json=body).json()
    joined = json.loads(answer["choices"][0]["text"])

    def alone(text: str, max_tokens: int) -> str:
        body = {**shared, "prompt": text, "max_tokens": max_tokens, "cache_salt": "alone"}
        return httpx.post(url, json=body).json()["choices"][0]["text"]

    assert joined["branches"] == [lead + alone(prompt + lead, 12) for lead in leads]
    read = "".join(text + "\n\n" for text in joined["branches"])
    assert joined["answer"] == alone(prompt + read, 4)
    usage = answer["usage"]
    assert usage["completion_tokens"] == 12 * len(leads) + 4
    # The full chunks of the prompt were computed once, its last part once for each branch at most.
    details = usage["prompt_tokens_details"]
    repeated = details["cached_tokens"] + details["cache_write_tokens"] - usage["prompt_tokens"]
    assert 0 <= repeated <= (len(leads) - 1) * (len(prompt) % 64 + 1)
