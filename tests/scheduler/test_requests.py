"""Every kind of request, and what is refused; chunks of four tokens."""

from __future__ import annotations

import numpy as np
import pytest

from chunkllama.errors import ConfigError, InvalidRequestError
from chunkllama.simulation.engine import SimulatedEngine, make_limits


def engine(num_chunks: int = 32, **limits: object) -> SimulatedEngine:
    defaults = {"max_num_seqs": 4, "max_num_batched_tokens": 64, "spare_chunks": 0}
    return SimulatedEngine(num_chunks, 4, vocab_size=50, **{**defaults, **limits})


class TestKindsOfRequests:
    def test_the_prompt_is_scored_and_nothing_sampled(self) -> None:
        run = engine()
        run.add([1, 2, 3, 4, 5], 1)
        run.run()
        name = run.add([1, 2, 3, 4, 5], 0, prompt_logprobs=0)
        output = run.schedule()
        assert output is not None
        (piece,) = output.slices
        assert (piece.first_position, piece.num_tokens) == (0, 5), "every row is wanted"
        assert piece.wants_prompt_logits and not piece.samples
        run.commit()
        assert run.finished[name, 0] == "length"
        assert run.outputs[name, 0] == []
        assert run.cached[name] == 0
        run.check_outputs()

    def test_prompt_logprobs_over_several_slices(self) -> None:
        run = engine(max_num_batched_tokens=4)
        run.add([1, 2, 3, 4, 5, 6, 7, 8, 9], 2, prompt_logprobs=0)
        run.run()
        run.check_outputs()
        assert len(run.first_deltas["r0"].prompt_logprobs or []) == 9

    def test_a_pooled_prompt(self) -> None:
        run = engine(max_num_batched_tokens=4)
        name = run.add([1, 2, 3, 4, 5, 6], None, wants_hidden_states="mean")
        run.run()
        assert run.first_deltas[name].embedding is not None
        assert run.finished[name, 0] == "stop"
        assert run.cached[name] == 0

    def test_choices_that_wait_have_the_prompt_once(self) -> None:
        run = engine(128, max_num_seqs=16)
        name = run.add([*range(20)], 5, n=16, temperature=1.0)
        sequences = [*run.scheduler._groups[name].sequences.values()]
        first = sequences[0].token_ids
        assert len(sequences) == 16
        assert all(np.shares_memory(first, each.token_ids) for each in sequences)
        run.run()
        assert not any(np.shares_memory(first, each.token_ids) for each in sequences)
        assert all(each.prompt_token_ids.tolist() == [*range(20)] for each in sequences)
        run.check_outputs()

    def test_what_was_delivered_is_not_sent_again(self) -> None:
        run = engine()
        whole = run.add([1, 2, 3, 4, 5], 9)
        run.run()
        tokens = run.outputs[whole, 0]
        again = run.add([1, 2, 3, 4, 5], 9, delivered=[tokens[:4]])
        output = run.schedule()
        assert output is not None
        assert output.new_sequences[0].output_token_ids.tolist() == tokens[:4]
        run.commit()
        run.run()
        assert run.outputs[again, 0] == tokens[4:]
        run.check_outputs()

    def test_a_choice_delivered_whole_is_not_run_again(self) -> None:
        run = engine()
        whole = run.add([1, 2, 3], 3, n=2)
        run.run()
        delivered = [run.outputs[whole, 0], run.outputs[whole, 1][:1]]
        again = run.add([1, 2, 3], 3, n=2, delivered=delivered)
        run.run()
        assert (again, 0) not in run.finished
        assert run.outputs[again, 1] == run.outputs[whole, 1][1:]

    def test_eight_choices_store_the_prompt_once(self) -> None:
        run = engine(num_chunks=64, max_num_seqs=8, max_num_batched_tokens=128)
        name = run.add(list(range(40)), 4, n=8)
        run.step()
        stats = run.scheduler.stats()
        assert stats.prompt_tokens_total == stats.prefix_tokens_queried_total == 40
        assert stats.chunks_referenced == 10
        run.run()
        run.check_outputs()
        assert run.cached[name] == 0
        assert run.scheduler.stats().prefill_tokens_computed_total == 40 + 7 * 4

    def test_cache_until_and_what_was_written(self) -> None:
        run = engine()
        name = run.add(list(range(10)), 9, cache_until=6)
        run.run()
        assert run.written[name] == 6
        assert run.cache.tree.num_nodes == 2
        again = run.add(list(range(10)), 9)
        run.run()
        assert (run.cached[again], run.written[again]) == (6, 4)
        run.check_outputs()

    def test_tenants_share_public_chunks_alone(self) -> None:
        run = engine()
        prompt = list(range(8))
        run.add(prompt, 1)
        run.run()
        own = run.add([*prompt, 20, 21, 22, 23, 24], 1, namespace="A")
        run.run()
        other = run.add([*prompt, 20, 21, 22, 23, 24], 1, namespace="B")
        same = run.add([*prompt, 20, 21, 22, 23, 24], 1, namespace="A")
        run.run()
        assert [run.cached[name] for name in (own, other, same)] == [8, 8, 12]
        run.check_outputs()

    def test_without_prefix_caching_nothing_is_shared_or_kept(self) -> None:
        run = engine(enable_prefix_caching=False)
        for _ in range(3):
            run.add(list(range(9)), 4)
        run.run()
        run.check_outputs()
        assert set(run.cached.values()) == {0}
        assert run.scheduler.stats().chunks_free == 32


@pytest.mark.parametrize(
    ("options", "param"),
    [
        ({"prompt": []}, "prompt"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"beam_width": 9}, "beam_width"),
        ({"beam_width": 2, "n": 3}, "beam_width"),
        ({"beam_width": 2, "max_tokens": 0, "prompt_logprobs": 0}, "max_tokens"),
        ({"wants_hidden_states": "mean", "n": 2}, "n"),
        ({"delivered": [[1], [2]]}, "delivered"),
        ({"delivered": [[1, 2, 3, 4]]}, "delivered"),
    ],
)
def test_what_could_never_run_is_refused(options: dict[str, object], param: str) -> None:
    run = engine()
    prompt = options.pop("prompt", [1, 2, 3])
    with pytest.raises(InvalidRequestError) as refused:
        run.add(prompt, options.pop("max_tokens", 4), **options)
    assert refused.value.param == param
    assert not run.scheduler.has_unfinished()


def test_an_id_in_use_is_refused() -> None:
    run = engine()
    run.add([1], 1)
    with pytest.raises(InvalidRequestError, match="'r0' is in use"):
        run.scheduler.add(run.requests["r0"])


@pytest.mark.parametrize(
    "limits",
    [
        {"max_num_seqs": 0},
        {"max_num_seqs": 9, "max_num_batched_tokens": 8},
        {"max_waiting": -1},
        {"min_wait_tokens": -1},
    ],
)
def test_limits_that_make_no_sense(limits: dict[str, int]) -> None:
    with pytest.raises(ConfigError):
        make_limits(**limits)
