"""Test engine statistics: durations of requests, hits by scope, histograms of steps."""

from __future__ import annotations

import pytest

from chunkllama.engine.core import EngineCore
from chunkllama.messages import EngineReady, EngineRequest, Histogram, TokenDelta
from chunkllama.sampling_params import SamplingParams
from chunkllama.simulation.engine import SimulatedEngine

STEP = 0.01  # of the simulated engine


def deltas_of(run: SimulatedEngine) -> dict[str, list[TokenDelta]]:
    deltas: dict[str, list[TokenDelta]] = {}
    while run.scheduler.has_unfinished():
        for delta in run.step():
            deltas.setdefault(delta.request_id, []).append(delta)
    return deltas


def durations(delta: TokenDelta) -> list[int]:
    """Queue, prefill and decode in steps."""
    seconds = (delta.queue_seconds, delta.prefill_seconds, delta.decode_seconds)
    return [round(value / STEP) for value in seconds]


def test_durations_of_requests_in_turn() -> None:
    run = SimulatedEngine(32, 4, vocab_size=50, max_num_seqs=1, max_num_batched_tokens=4)
    first = run.add([1, 2, 3], 3)
    second = run.add(list(range(12)), 2)
    deltas = deltas_of(run)
    assert [durations(d) for d in deltas[first]] == [[0, 0, 0], [0, 0, 1], [0, 0, 2]]
    # Waits for three steps, then takes three for its prompt; the last of these yields a token.
    assert [durations(d) for d in deltas[second]] == [[3, 2, 0], [3, 2, 1]]


def test_beams_are_decoded_before_their_only_delta() -> None:
    run = SimulatedEngine(32, 4, vocab_size=50, max_num_seqs=4)
    name = run.add([1, 2, 3], 4, n=2, beam_width=2)
    (delta,) = deltas_of(run)[name]
    assert durations(delta) == [0, 0, 3]


def test_a_preemption_does_not_start_the_clocks_anew() -> None:
    run = SimulatedEngine(8, 4, vocab_size=50, max_num_seqs=2, spare_chunks=0)
    for _ in range(600):
        run.scheduler._admission.lengths.add(1)  # so that both are admitted
    run.add([1, 2, 3, 4], 20)
    newest = run.add([5, 6, 7, 8], 20)
    deltas = deltas_of(run)[newest]
    assert run.scheduler.stats().preemptions_total
    assert {tuple(durations(d)[:2]) for d in deltas} == {(0, 0)}
    assert durations(deltas[-1])[2] > len(deltas)


def test_hits_in_the_public_part_are_told_from_a_tenants_own() -> None:
    run = SimulatedEngine(32, 4, vocab_size=50, max_num_seqs=1)
    public, own = list(range(8)), list(range(20, 28))
    for prompt, namespace in (
        ([*public, 40], ""),
        ([*public, *own, 41], "tenant"),
        ([*public, *own, 42], "tenant"),
        ([*public, *own, 42], "other"),
        (public, ""),
    ):
        run.add(prompt, 1, namespace=namespace)
        run.run()
    stats = run.scheduler.stats()
    # Of the last prompt all but the last token: a whole chunk and a copy of three tokens.
    assert stats.prefix_tokens_hit_public_total == 8 + 8 + 8 + 7
    assert stats.prefix_tokens_hit_total == stats.prefix_tokens_hit_public_total + 8


INFO = EngineReady(
    model_name="m",
    vocab_size=50,
    max_model_len=64,
    eos_token_ids=[],
    num_chunks=32,
    chunk_size=4,
    max_request_tokens=64,
    device="cpu",
    backend="fake",
)


def test_steps_are_counted_by_duration_and_size() -> None:
    run = SimulatedEngine(32, 4, vocab_size=50, max_num_seqs=4)
    ticks = iter([0.0, 0.003, 1.0, 9.0])
    core = EngineCore(run.scheduler, run.model, INFO, clock=lambda: next(ticks))
    for name in "abc":
        sampling = SamplingParams(max_tokens=1 if name == "a" else 2, temperature=0.0, seed=1)
        core.add(EngineRequest(request_id=name, prompt_token_ids=[1, 2], sampling=sampling))
    while core.has_work():
        core.step()
    stats = core.stats()
    assert stats.step_seconds.total == pytest.approx(8.003)
    by_bound = dict(zip(stats.step_seconds.bounds, stats.step_seconds.counts, strict=False))
    assert by_bound[0.005] == stats.step_seconds.counts[-1] == 1
    assert sum(stats.step_seconds.counts) == stats.steps_total == 2
    assert stats.batch_size.total == 3 + 2


def test_a_busy_loop_sends_snapshots_unasked() -> None:
    run = SimulatedEngine(32, 4, vocab_size=50, max_num_seqs=4)
    now = [5.0]
    core = EngineCore(run.scheduler, run.model, INFO, clock=lambda: now[0])
    first = core.stats_to_push()
    assert first is not None and first.is_pushed
    now[0] += 0.4
    assert core.stats_to_push() is None
    now[0] += 0.2
    assert core.stats_to_push() is not None
    assert core.stats_to_push() is None
    assert not core.stats().is_pushed


def test_a_bound_belongs_to_its_bucket() -> None:
    histogram = Histogram.over((1, 2))
    for value in (1, 1.5, 2, 3):
        histogram.observe(value)
    assert histogram.counts == [1, 2, 1]
    histogram.add(histogram)
    assert (histogram.counts, histogram.total) == ([2, 4, 2], 15)
