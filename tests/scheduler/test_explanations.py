"""Why a match ended, in constructed situations, and never because of another tenant."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import pytest

from chunkllama.cache.adapter_tags import AdapterUse
from chunkllama.cache.imports import ChunkImport
from chunkllama.cache.node import encode_tokens
from chunkllama.messages import CacheExplanation
from chunkllama.simulation.engine import SimulatedEngine

SIZE = 4
BASE = list(range(10, 22))  # three chunks
LONG = list(range(10, 24))  # three chunks and a half


@dataclass
class Case:
    """What happens before, then a prompt; the expected reason, matched and known tokens.

    ``request`` are options of the prompt's request; ``seconds``: how long ago it was, if it is
    said.
    """

    reason: str
    matched: int
    known: int
    prompt: list[int] = field(default_factory=lambda: [*BASE, 1, 2])
    before: Callable[[SimulatedEngine], object] = lambda run: None
    request: dict = field(default_factory=dict)
    engine: dict = field(default_factory=dict)
    num_chunks: int = 40
    seconds: float | None = None


def sends(*prompt: int, **options: object) -> Callable[[SimulatedEngine], None]:
    """Run one prompt to its end, as tenant a in namespace A unless ``options`` say otherwise."""

    def send(run: SimulatedEngine) -> None:
        run.add(list(prompt), 1, **{"tenant": "a", "namespace": "A", **options})
        run.run()

    return send


def does(*steps: Callable[[SimulatedEngine], object]) -> Callable[[SimulatedEngine], None]:
    def do(run: SimulatedEngine) -> None:
        for step in steps:
            step(run)

    return do


def imports(*prompt: int, namespace: str = "A") -> Callable[[SimulatedEngine], object]:
    """Insert the whole chunks of a prompt as a pack or a snapshot does."""

    def insert(run: SimulatedEngine) -> None:
        chunks, parent = ChunkImport(run.cache), -1
        for end in range(SIZE, len(prompt) + 1, SIZE):
            key = encode_tokens(np.array(prompt[end - SIZE : end], np.int32))
            chunk_id, outcome = chunks.add(parent, namespace, key, "")
            assert outcome == "new"
            run.write_chunk(chunk_id, list(prompt[:end]))
            parent += 1

    return insert


def preempts(run: SimulatedEngine) -> None:
    """Run a long request and the prompt in a pool for one of them, so that one is preempted."""
    sends(99)(run)  # outputs are expected to be short
    run.add(BASE, 30, tenant="a", namespace="A", ignore_eos=True)
    run.add([*BASE[:8], 5, 6, 7], 30, tenant="a", namespace="A", ignore_eos=True)
    run.run()
    assert run.scheduler.stats().preemptions_total > 0


def evicts(count: int = 1000) -> Callable[[SimulatedEngine], object]:
    return lambda run: run.cache.tree.evict(count)


def waits(seconds: float) -> Callable[[SimulatedEngine], object]:
    def wait(run: SimulatedEngine) -> None:
        run.now += seconds

    return wait


def starts(*prompt: int) -> Callable[[SimulatedEngine], object]:
    """Begin a prompt that needs several steps, and run one of them."""

    def start(run: SimulatedEngine) -> None:
        run.add(list(prompt), 1, tenant="a", namespace="A")
        run.step()

    return start


def fills(count: int) -> Callable[[SimulatedEngine], object]:
    """Send other prompts of the same tenant."""
    return does(*(sends(100 + i, *[0] * 3, tenant="a", namespace="A") for i in range(count)))


CASES = {
    "the first prompt of all": Case("never_seen", 0, 0),
    "the same prompt again": Case("complete", 13, 13, before=sends(*BASE, 1, 2)),
    "a prompt of one token": Case("below_minimum", 0, 0, prompt=[10], before=sends(*BASE)),
    "a longer prompt": Case("never_seen", 12, 12, before=sends(*BASE)),
    "a longer prompt, from inside a chunk": Case("never_seen", 9, 9, before=sends(*BASE[:9])),
    "a shorter prompt": Case("complete", 6, 6, prompt=BASE[:7], before=sends(*BASE)),
    "another token inside the last chunk": Case("diverged", 12, 12, before=sends(*LONG)),
    "another token inside the first chunk": Case(
        "diverged", 2, 2, prompt=[10, 11, 5, *BASE[3:]], before=sends(*BASE)
    ),
    "another token at the start of a chunk": Case(
        "diverged", 8, 8, prompt=[*BASE[:8], 5, 6, 7], before=sends(*BASE)
    ),
    "another token after two branches": Case(
        "diverged", 9, 9, prompt=[*BASE[:9], 5, 6, 7],
        before=does(sends(*BASE), sends(*BASE[:8], 7, 7, 7)),
    ),
    "nothing in common with earlier prompts": Case(
        "never_seen", 0, 0, prompt=[5, 6, 7, 8, 9], before=sends(*BASE)
    ),
    "everything was evicted": Case(
        "evicted", 0, 12, before=does(sends(*BASE), waits(2), evicts(), waits(3)), seconds=3
    ),
    "the end was evicted": Case(
        "evicted", 8, 12, before=does(sends(*BASE), evicts(1), waits(4)), seconds=4
    ),
    "sent again after an eviction": Case(
        "never_seen", 12, 12, before=does(sends(*BASE), evicts(), sends(*BASE))
    ),
    "a pin ended, then evicted": Case(
        "expired", 0, 12,
        before=does(
            sends(*BASE, pin_seconds=1.0), waits(2), sends(99), evicts(), waits(3)
        ),
        seconds=3.01,
    ),
    "used again after its pin, then evicted": Case(
        "evicted", 0, 12,
        before=does(
            sends(*BASE, pin_seconds=1.0), waits(2), sends(*BASE), evicts(), waits(3)
        ),
        seconds=3,
    ),
    "sent with another salt": Case(
        "another_namespace", 0, 0, before=sends(*BASE, 1, 2, namespace="A2")
    ),
    "more with another salt than diverged here": Case(
        "another_namespace", 12, 12,
        before=does(sends(*LONG), sends(*BASE, 1, 2, namespace="A2")),
    ),
    "not stored at all": Case(
        "not_stored", 0, 12, before=sends(*BASE, cache_until=0)
    ),
    "stored up to a breakpoint": Case(
        "not_stored", 8, 12, before=sends(*BASE, cache_until=8)
    ),
    "every row is wanted": Case(
        "not_looked_up", 0, 12, before=sends(*BASE), request={"prompt_logprobs": 0}
    ),
    "an embedding is wanted": Case(
        "not_looked_up", 0, 12, before=sends(*BASE), request={"wants_hidden_states": "last"}
    ),
    "caching is disabled": Case(
        "not_looked_up", 0, 0, before=sends(*BASE), engine={"enable_prefix_caching": False}
    ),
    "being computed by the same tenant": Case(
        "in_progress", 12, 13, before=starts(*BASE, 1, 2), request={"priority": 0},
        engine={"min_wait_tokens": 100, "max_num_batched_tokens": 8, "max_num_seqs": 4},
    ),
    "no chunk for a copy": Case(
        "no_room", 8, 10, prompt=[*BASE[:10], 5, 6], before=sends(*BASE), num_chunks=3,
        engine={"spare_chunks": 0},
    ),
    "older than the record": Case(
        "unknown", 0, 0, before=does(sends(*BASE), evicts(), fills(8)),
        engine={"history_chunks": 6},
    ),
    "no record is kept": Case(
        "unknown", 0, 0, before=does(sends(*BASE), evicts()), engine={"history_chunks": 0}
    ),
    "another tenant has sent it, in its own namespace": Case(
        "never_seen", 0, 0, before=sends(*BASE, 1, 2, tenant="b", namespace="B")
    ),
    "a shared prompt of another tenant": Case(
        "complete", 13, 0, before=sends(*BASE, 1, 2, tenant="b", namespace="")
    ),
    "another tenant diverged": Case(
        "never_seen", 12, 0, before=sends(*LONG, tenant="b", namespace="")
    ),
    "a shared prompt that only another tenant sent was evicted": Case(
        "never_seen", 0, 0,
        before=does(sends(*BASE, tenant="b", namespace=""), evicts()),
    ),
    "a shared prompt that both sent was evicted": Case(
        "evicted", 0, 12,
        before=does(
            sends(*BASE, tenant="b", namespace=""), sends(*BASE), evicts(), waits(3)
        ),
    ),
    "only another tenant's pin ended": Case(
        "evicted", 0, 12,
        before=does(
            sends(*BASE, tenant="b", namespace="", pin_seconds=1.0), sends(*BASE), waits(2),
            sends(99), evicts(),
        ),
    ),
    "another tenant's record overflows": Case(
        "never_seen", 12, 12,
        before=does(
            sends(*BASE),
            *(sends(100 + i, 0, 0, 0, 0, tenant="b", namespace="B") for i in range(8)),
        ),
        engine={"history_chunks": 6},
    ),
    "its adapter has another tree": Case(
        "another_adapter", 0, 0, before=sends(*BASE), request={"adapter": AdapterUse(3, 0)}
    ),
    "an adapter becomes active in the prompt": Case(
        "another_adapter", 8, 8, before=sends(*BASE), request={"adapter": AdapterUse(3, 8)}
    ),
    "an adapter becomes active inside a chunk": Case(
        "another_adapter", 6, 6, request={"adapter": AdapterUse(3, 6)},
        before=does(sends(*BASE), sends(*BASE[:6], 9, adapter=AdapterUse(1, 2))),
    ),
    "without an adapter, after prompts with several": Case(
        "another_adapter", 0, 0,
        before=does(*(sends(*BASE, adapter=AdapterUse(number, 0)) for number in (1, 5, 2047))),
    ),
    "another token under another adapter": Case(
        "never_seen", 0, 0, before=sends(9, *BASE), request={"adapter": AdapterUse(3, 0)}
    ),
    "the same prompt under the same adapter": Case(
        "complete", 13, 13, before=sends(*BASE, 1, 2, adapter=AdapterUse(3, 4)),
        request={"adapter": AdapterUse(3, 4)},
    ),
    "another tenant used another adapter": Case(
        "never_seen", 0, 0, before=sends(*BASE, tenant="b", namespace="A"),
        request={"adapter": AdapterUse(3, 0)},
    ),
    "what was evicted is read from files": Case(
        "complete", 12, 12, prompt=[*BASE, 1], before=does(sends(*BASE), evicts(), sends(99)),
        engine={"tier_chunks": 8, "min_wait_tokens": 1},
    ),
    "rounded by the tier, and shared whole only": Case(
        "rounded", 8, 10, prompt=BASE[:11],
        before=does(sends(*BASE, 1), evicts(), sends(99), sends(*BASE, 2)),
        engine={"tier_chunks": 8, "min_wait_tokens": 1, "tier_options": {"bits": 2}},
    ),
    "files have only the end of what was evicted": Case(
        "evicted", 0, 12, before=does(sends(*BASE), evicts(1), evicts(), waits(2)), seconds=2,
        engine={"tier_chunks": 2, "min_wait_tokens": 1},
    ),
    "imported, and never sent": Case("complete", 12, 0, prompt=[*BASE, 1], before=imports(*BASE)),
    "imported in part": Case("never_seen", 8, 0, before=imports(*BASE[:8])),
    "imported for all": Case(
        "never_seen", 12, 0, before=imports(*BASE, namespace="")
    ),
    "imported, evicted, never sent": Case(
        "never_seen", 0, 0, before=does(imports(*BASE), evicts())
    ),
    "after preemptions": Case(
        "diverged", 9, 9, prompt=[*BASE[:8], 5, 0, 0], before=preempts, num_chunks=16,
        engine={"spare_chunks": 0, "reserve_quantile": 0.0},
    ),
    "three choices": Case(
        "diverged", 12, 12, before=sends(*LONG), request={"n": 3}
    ),
    "the start of a conversation was cut off": Case(
        "never_seen", 0, 0, prompt=[*BASE[4:], 1], before=sends(*BASE)
    ),
    "the middle of a conversation was cut out": Case(
        "diverged", 4, 4, prompt=[*BASE[:4], *BASE[8:], 1], before=sends(*BASE)
    ),
    "being computed by another tenant": Case(
        "evicted", 2, 12,
        before=does(
            sends(*BASE, namespace=""), evicts(),
            lambda run: (run.add([*BASE, 1, 2], 1, tenant="b", namespace=""), run.step()),
        ),
        engine={"min_wait_tokens": 100, "max_num_batched_tokens": 2, "max_num_seqs": 2},
        request={"namespace": ""},
    ),
}  # fmt: skip


def prepared(case: Case) -> SimulatedEngine:
    options = {"max_num_batched_tokens": 64, "min_wait_tokens": 2, "history_chunks": 64}
    run = SimulatedEngine(case.num_chunks, SIZE, vocab_size=1000, **{**options, **case.engine})
    case.before(run)
    return run


def check(case: Case, explanation: CacheExplanation) -> None:
    found = (explanation.reason, explanation.num_matched_tokens, explanation.num_known_tokens)
    assert found == (case.reason, case.matched, case.known)
    seconds = explanation.seconds_ago
    assert (seconds is None) == (case.seconds is None)
    assert seconds is None or seconds == pytest.approx(case.seconds, abs=0.05)


@pytest.mark.parametrize("name", CASES)
def test_a_request_says_why_its_match_ended(name: str) -> None:
    case = CASES[name]
    run = prepared(case)
    options = {"tenant": "a", "namespace": "A", **case.request}
    request = run.add(case.prompt, 1, explain=True, **options)
    run.run()
    explanation = run.first_deltas[request].explanation
    assert explanation is not None
    check(case, explanation)


@pytest.mark.parametrize(
    "name",
    [
        name
        for name, case in CASES.items()
        if not case.request.keys() - {"adapter", "n"} and case.reason != "no_room"
    ],
)
def test_the_same_is_said_without_running_the_prompt(name: str) -> None:
    case = CASES[name]
    run = prepared(case)
    before = run.scheduler.stats()
    for _ in range(2):
        adapter = case.request.get("adapter")
        check(case, run.scheduler.explain(case.prompt, "A", "a", adapter))
    assert run.scheduler.stats() == before


def test_nothing_is_said_unless_asked() -> None:
    run = SimulatedEngine(40, SIZE)
    request = run.add([1, 0, 1], 3)
    explained = run.add([1, 0, 1], 3, n=2, explain=True)
    deltas = []
    while run.scheduler.has_unfinished():
        deltas += run.step()
    said = [delta for delta in deltas if delta.explanation is not None]
    assert [delta.request_id for delta in said] == [explained]
    assert run.first_deltas[request].explanation is None


@pytest.mark.parametrize("until", [None, 0, 4])
def test_a_prompt_is_known_from_its_start_on_also_if_it_is_aborted(until: int | None) -> None:
    limits = {"max_num_seqs": 4, "max_num_batched_tokens": 5, "min_wait_tokens": 2}
    run = SimulatedEngine(40, SIZE, vocab_size=1000, history_chunks=64, **limits)
    name = run.add(LONG, 5, tenant="a", namespace="A", cache_until=until)
    assert run.scheduler.explain([*LONG, 1], "A", "a").num_known_tokens == 0
    run.step()
    assert run.scheduler.explain([*LONG, 1], "A", "a").num_known_tokens == len(LONG)
    assert run.scheduler.explain([*LONG, 1], "A", "b").num_known_tokens == 0
    run.scheduler.abort(name)
    again = run.add(LONG, 5, tenant="a", namespace="A2", cache_until=until)
    run.step()
    run.scheduler.abort(again)
    for namespace in ("A", "A2"):
        assert run.scheduler.explain([*LONG, 1], namespace, "a").num_known_tokens == len(LONG)


@pytest.mark.parametrize("seed", range(6))
def test_what_others_send_changes_no_explanation(seed: int) -> None:
    """Tenant a's own requests, with and without tenant b beside it, in a pool with room."""

    def explanations(*, with_other: bool) -> list[CacheExplanation]:
        rng = random.Random(seed)
        run = SimulatedEngine(4000, SIZE, vocab_size=3, check=False, max_num_seqs=1)
        made = []
        for _ in range(60):
            prompt = [rng.randrange(2) for _ in range(rng.randrange(1, 14))]
            other = [rng.randrange(2) for _ in range(rng.randrange(1, 14))]
            salt, kind = rng.choice(["A", "A", "A2"]), rng.random()
            if with_other:
                run.add(other, 1, tenant="b", namespace="B", pin_seconds=kind)
                run.run()
            until = rng.choice([None, None, 3])
            name = run.add(prompt, 1, tenant="a", namespace=salt, explain=True, cache_until=until)
            run.run()
            explanation = run.first_deltas[name].explanation
            assert explanation is not None
            made.append(explanation)
        return made

    assert explanations(with_other=True) == explanations(with_other=False)


@pytest.mark.parametrize("shared", [0, SIZE])
def test_what_was_dropped_behind_windows_was_evicted(shared: int) -> None:
    """A request beside another one, which may share its first chunk, in a full pool."""
    limits = {"max_num_seqs": 8, "max_num_batched_tokens": 64, "spare_chunks": 0}
    run = SimulatedEngine(12, SIZE, vocab_size=50, window=5, history_chunks=64, **limits)
    for _ in range(600):
        run.scheduler._admission.lengths.add(1)
    prompt = [1] * 4 + [2] * 8
    run.add(prompt, 24)
    run.add([1] * shared + [3] * (12 - shared), 24)
    run.run()
    assert run.scheduler.stats().preemptions_total == 0
    explanation = run.scheduler.explain([*prompt, 9], "", "")
    assert explanation.reason == "evicted"
    assert explanation.num_known_tokens == len(prompt)
