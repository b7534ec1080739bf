"""Bugs that other engines shipped, each as a named test; chunks of four tokens.

The states are ones a prefix-tree engine reaches on its first day: see nano-vllm issues 144, 208
and pull requests 211 and 233, mini-sglang pull request 142, vLLM 37076, SGLang 22819 and 23392.
"""

from __future__ import annotations

import pytest

from chunkllama.errors import InvalidRequestError
from chunkllama.simulation.engine import SimulatedEngine


def engine(num_chunks: int = 32, **limits: object) -> SimulatedEngine:
    defaults = {"max_num_seqs": 8, "max_num_batched_tokens": 64, "spare_chunks": 0}
    return SimulatedEngine(num_chunks, 4, vocab_size=50, **{**defaults, **limits})


@pytest.mark.parametrize("length", [1, 3, 4, 5, 8, 9, 12])
def test_whole_prompt_cached_still_computes_one_token(length: int) -> None:
    run = engine()
    prompt = list(range(length))
    for expected in (0, length - 1, length - 1):
        name = run.add(prompt, 3)
        output = run.schedule()
        assert output is not None
        (piece,) = output.slices
        assert piece.first_position == expected
        assert piece.num_tokens == length - expected >= 1
        assert piece.samples
        run.commit()
        run.run()
        assert run.cached[name] == expected
    run.check_outputs()


def test_rehit_after_preemption_does_not_overrun_the_chunk_list() -> None:
    """A preempted sequence matches what it left, prompt and outputs, up to its last token."""
    run = engine(8)
    for i in range(2):
        run.add([i] * 7, 10)
    for _ in range(6):
        run.step()
    sequence = run.scheduler._running.by_age[-1]
    known = sequence.num_tokens
    run.scheduler._lifecycle.preempt(sequence)
    output = run.schedule()
    assert output is not None
    (again,) = [s for s in output.slices if s.slot == sequence.slot]
    assert (again.first_position, again.num_tokens) == (known - 1, 1)
    assert len(again.chunk_ids) == -(-known // 4)
    run.commit()
    run.run()
    run.check_outputs()


def test_two_requests_inserting_the_same_prefix_in_one_step() -> None:
    run = engine(min_wait_tokens=100)
    for _ in range(2):
        run.add([1, 2, 3, 4, 5, 6, 7, 8], 6)
    run.step()
    chunks = [s.chunks.ids.tolist() for s in run.scheduler._running.by_age]
    assert chunks[0] == chunks[1], "the second joined the first chunk and adopted the other"
    assert run.cache.tree.num_nodes == 2
    run.run()
    run.check_outputs()


def test_duplicate_chunk_is_not_freed_while_referenced() -> None:
    """After an adoption the row reads the adopted chunk, and ours may be written by others."""
    run = engine()
    run.add([1, 2, 3, 4], 12)
    run.step()
    duplicate = run.add([1, 2, 3, 4], 12)
    run.step()
    first, second = run.scheduler._running.by_age
    assert second.group.request_id == duplicate
    assert first.chunks.ids[0] == second.chunks.ids[0]
    other = run.add([9] * 16, 4)  # takes the chunk that was given back, and writes it
    run.run()
    run.check_outputs()
    assert other in run.cached


@pytest.mark.parametrize("computed_steps", [0, 1, 2, 3])
def test_abort_mid_prefill_leaves_only_what_is_computed(computed_steps: int) -> None:
    run = engine(max_num_batched_tokens=8, max_num_seqs=2)
    name = run.add(list(range(30)), 4)
    for _ in range(computed_steps):
        run.step()
    run.schedule()
    run.scheduler.abort(name)
    run.commit()
    run.check_idle()
    done = min(30, 8 * (computed_steps + 1))
    assert sum(node.num_tokens for node in run.cache.tree.nodes()) == done
    again = run.add(list(range(30)), 4)
    run.run()
    assert run.cached[again] == min(done, 29)
    run.check_outputs({name})


@pytest.mark.parametrize("length", [3, 4, 5])
@pytest.mark.parametrize("max_tokens", [1, 4, 5])
@pytest.mark.parametrize("spare", [0, 1])
def test_a_token_that_fills_a_chunk_exactly(length: int, max_tokens: int, spare: int) -> None:
    run = engine(spare_chunks=spare)
    for _ in range(2):
        run.add(list(range(length)), max_tokens)
        run.run()
    run.check_outputs()


@pytest.mark.parametrize("prefix", [3, 4, 5, 8])
@pytest.mark.parametrize("seed", range(6))
def test_cancel_and_retry_storm_on_a_shared_prefix(prefix: int, seed: int) -> None:
    """Shared prefixes of chunk - 1, chunk, chunk + 1 and 2 chunks; every request is cancelled
    after a few steps and sent again."""
    run = engine(10, max_num_batched_tokens=8, min_wait_tokens=2)
    run.random.seed(seed)
    base = [1] * prefix
    cancelled: set[str] = set()
    for wave in range(12):
        names = [run.add([*base, run.random.randrange(3), wave], 6) for _ in range(3)]
        for _ in range(run.random.randrange(4)):
            run.step()
        victim = run.random.choice(names)
        output = run.schedule()
        run.scheduler.abort(victim)
        if output is not None:
            run.commit()
        if not any((victim, 0) == key for key in run.finished):
            cancelled.add(victim)
    run.run()
    run.check_outputs(cancelled)


def test_finish_reason_length_at_exactly_max_tokens() -> None:
    run = engine()
    name = run.add([1, 2, 3], 1)
    run.step()
    assert run.finished[name, 0] == "length"
    assert len(run.outputs[name, 0]) == 1


def test_more_requests_than_slots_and_chunks_all_end() -> None:
    run = engine(6, max_num_seqs=3, max_num_batched_tokens=6)
    for i in range(32):
        run.add([i % 3] * (1 + i % 7), 1 + i % 9)
    run.run()
    run.check_outputs()


@pytest.mark.parametrize("cache_until", [0, 3, 6, None])
def test_beams_whose_prompt_is_kept_out_of_the_cache_each_hold_all_of_it(
    cache_until: int | None,
) -> None:
    """What the simulator found (1): what they share was counted as if it were shown."""
    for num_chunks in range(3, 20):
        run = engine(num_chunks)
        try:
            run.add([1] * 9, 8, beam_width=3, cache_until=cache_until)
        except InvalidRequestError:
            continue
        run.run()
        run.check_outputs()


def test_a_leaf_taken_over_by_a_request_that_fails_while_others_copy_it() -> None:
    """What the simulator found (2)."""
    run = engine()
    run.add([1, 2, 3, 4, 5, 6], 1)
    run.run()
    failing = run.add([1, 2, 3, 4, 5, 6, 7, 8, 9], 4)
    copying = run.add([1, 2, 3, 4, 5, 6, 10, 11], 4)
    output = run.schedule()
    assert output is not None and len(output.copies) == 1
    run.model.fail_slots = {0}
    run.commit()
    run.model.fail_slots = set()
    assert run.errors == {failing: "model_nan"}
    run.run()
    run.check_outputs()
    assert copying in run.cached


def test_a_pin_on_a_prompt_whose_end_another_request_is_still_filling() -> None:
    """What the simulator found (3): the pin held a node that was cut when its leader left."""
    run = engine(max_num_batched_tokens=6, max_num_seqs=2)
    run.add(list(range(12)), 1)
    run.run()
    # scored, so computed again beside the equal chunks in the tree, the last of which then goes
    run.add(list(range(10)), 2, prompt_logprobs=0, pin_seconds=60.0)
    run.step()
    assert run.cache.tree.evict(1) == 1
    leader = run.add(list(range(20)), 4)
    run.schedule()
    assert [(s.first_position, s.num_tokens) for s in run.last_output.slices] == [(8, 2), (6, 4)]
    run.commit()
    run.scheduler.abort(leader)
    run.run()
    run.check_outputs({leader})


def test_a_copied_chunk_is_not_evicted_before_it_is_copied() -> None:
    run = engine(3, max_num_seqs=2)
    run.add([1, 2, 3, 4, 5, 6], 1)
    run.run()
    run.add([1, 2, 3, 4, 5, 7, 8, 9], 1)
    run.add([8] * 4, 1)
    run.run()
    run.check_outputs()
