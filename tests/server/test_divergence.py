"""The report of early differences in prompts: what is found, what it costs, who sees it."""

from __future__ import annotations

import random

import pytest

from chunkllama_server.metrics.divergence import (
    LEAST_LOST,
    MAX_PROMPTS,
    PromptLog,
    find_divergences,
)

RULES = "You are a support agent. " + "Follow each rule of the handbook with care. " * 8
MODEL = "alias"


def log_of(prompts, cached=0, tenant="", namespace="") -> PromptLog:
    log = PromptLog(1_000_000)
    for prompt in prompts:
        log.record(tenant, namespace, list(prompt.encode()), cached)
    return log


def report(log: PromptLog):
    return find_divergences(log.prompts(), lambda ids: bytes(ids).decode())


def test_a_timestamp_costs_what_follows_it() -> None:
    start = "Today is "
    times = [f"2026-11-{day} 08:{day}" for day in range(10, 20)]
    rows = report(log_of([f"{start}{time}. {RULES}question {i}" for i, time in enumerate(times)]))
    (row,) = rows
    assert row.kind == "timestamp"
    # all the times begin equally: the first token that differs is the day's second digit
    assert row.token == len("Today is 2026-11-1")
    assert row.num_requests == 9
    rest = len(f". {RULES}question ")
    assert row.lost_tokens == 9 * rest and row.share == 1.0
    assert row.text_before == "Today is 2026-11-1"[-12:]
    assert row.examples[1] == "2026-11-12 08:12."


def test_the_share_is_of_all_possible_hits() -> None:
    prompts = [f"{'x' * 64}{i:03}{RULES}" for i in range(11)]
    log = PromptLog(10**6)
    for prompt in prompts:
        log.record("", "", list(prompt.encode()), 64)
    (row,) = report(log)
    assert row.kind == "number" and row.token == 64 + 1
    assert row.cached_tokens == 10 * 64 and row.lost_tokens == 10 * len(RULES)
    assert row.share == pytest.approx(len(RULES) / (len(RULES) + 64))


@pytest.mark.parametrize(
    ("differences", "kind"),
    [
        (["08:15", "09:31", "17:02"], "timestamp"),
        (["Nov 3", "Dec 11", "Jan 9"], "timestamp"),
        (["1764450000", "1764459999", "1764461234"], "timestamp"),
        (["3f2504e0-4f89-11d3", "9b2504e0-4f89-11d3", "a12504e0-4f89-11d3"], "identifier"),
        (["7", "12", "523"], "number"),
        (["Ann", "Bob", "Eve"], "text"),
    ],
)
def test_the_kind_of_a_difference(differences, kind) -> None:
    rows = report(log_of([f"For {each}; {RULES}" for each in differences]))
    assert [row.kind for row in rows] == [kind]


@pytest.mark.parametrize(
    "prompts",
    [
        [],
        [RULES],
        [RULES, RULES],
        [RULES + "a", RULES + "b"],
        [RULES, RULES + RULES],
        ["short 1 end", "short 2 end"],
        ["a" * 60 + RULES, "b" * 60 + RULES],  # a longer difference is another prompt
    ],
)
def test_prompts_that_lose_nothing_are_not_reported(prompts) -> None:
    assert report(log_of(prompts)) == []


def test_what_is_cached_behind_the_difference_is_not_lost() -> None:
    prompts = [f"at 1{i}:00 {RULES}" for i in range(2)]
    assert report(log_of(prompts, cached=len(prompts[0]) - 1)) == []


def test_each_system_prompt_has_its_row_and_the_costliest_is_first() -> None:
    other = "Translate the text into French. " * 12
    prompts = [f"[{i}] {RULES}" for i in range(9)] + [f"<{i}> {other}" for i in range(4)]
    random.Random(0).shuffle(prompts)
    rows = report(log_of(prompts))
    assert [row.num_requests for row in rows] == [8, 3]
    assert rows[0].lost_tokens > rows[1].lost_tokens >= LEAST_LOST


def test_namespaces_are_not_compared() -> None:
    log = PromptLog(10**6)
    for i, (tenant, namespace) in enumerate([("a", "A"), ("b", "B"), ("a", "A2")]):
        log.record(tenant, namespace, list(f"at {i}: {RULES}".encode()), 0)
    assert report(log) == []


def test_the_log_is_bounded() -> None:
    log = PromptLog(100)
    log.record("", "", [1] * 101, 0)
    assert log.prompts() == []
    for i in range(5):
        log.record("", "", [i] * 30, 0)
    assert [prompt.token_ids[0] for prompt in log.prompts()] == [2, 3, 4]
    many = PromptLog(10**9)
    for _ in range(MAX_PROMPTS + 10):
        many.record("", "", [1], 0)
    assert len(many.prompts()) == many.num_tokens == MAX_PROMPTS
    nothing = PromptLog(0)
    nothing.record("", "", [1], 0)
    assert nothing.prompts() == []


@pytest.fixture(scope="module")
def guarded(start_server):
    return start_server(api_keys={"alpha": "ka", "beta": "kb"}, operator_keys=("ko",))


def test_a_key_sees_its_own_rows_and_an_operator_all(guarded) -> None:
    guarded.engine.reset()
    for key, word in (("ka", "Apple"), ("kb", "Berry")):
        for i in range(3):
            prompt = f"{word} 1{i}:30 {RULES}"
            body = {"model": MODEL, "prompt": prompt, "max_tokens": 1}
            assert guarded.post("/v1/completions", body, **{"x-api-key": key}).status_code == 200
    with guarded.http() as http:
        reports = {
            key: http.get("/dashboard/divergence", headers={"x-api-key": key}).json()
            for key in ("ka", "kb", "ko")
        }
    assert [row["tenant"] for row in reports["ka"]["data"]] == ["alpha"]
    assert [row["tenant"] for row in reports["kb"]["data"]] == ["beta"]
    assert {row["tenant"] for row in reports["ko"]["data"]} == {"alpha", "beta"}
    assert "Berry" not in str(reports["ka"]) and "Apple" not in str(reports["kb"])
    row = reports["ka"]["data"][0]
    assert row["token"] == len("Apple 1") and row["requests"] == 2
    assert row["message"] == (
        f"a timestamp at token 7 of this prompt costs {row['lost_share']:.0%} of its cache hits"
    )
    assert reports["ko"]["prompts"] == 6


def test_the_dashboard_has_the_row(server) -> None:
    with server.http() as http:
        assert http.get("/dashboard/divergence").json()["object"] == "divergence_report"
