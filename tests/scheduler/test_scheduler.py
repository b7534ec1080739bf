"""Steps with exact ids and counts; chunks of four tokens, a fake model."""

from __future__ import annotations

import pytest
from simulated_engine import SimulatedEngine

from chunkllama.errors import ConfigError, InvalidRequestError
from chunkllama.scheduler.limits import SchedulerLimits
from chunkllama.scheduler.output import SampledTokens, SchedulerOutput


def engine(num_chunks: int = 32, **limits: object) -> SimulatedEngine:
    defaults = {"max_num_seqs": 4, "max_num_batched_tokens": 64, "spare_chunks": 0}
    return SimulatedEngine(num_chunks, 4, vocab_size=50, **{**defaults, **limits})


def shape(output: SchedulerOutput | None) -> list[tuple[int, int, int, list[int], int]]:
    """(slot, first position, tokens, chunks, shared) of each slice."""
    assert output is not None
    return [
        (s.slot, s.first_position, s.num_tokens, s.chunk_ids.tolist(), s.shared)
        for s in output.slices
    ]


class TestSteps:
    def test_nothing_to_do(self) -> None:
        assert engine().scheduler.schedule() is None

    def test_a_prompt_then_its_tokens(self) -> None:
        run = engine()
        run.add([1, 2, 3, 4, 5, 6], 3)
        first = run.schedule()
        assert shape(first) == [(0, 0, 6, [0, 1], 0)]
        assert first is not None and first.plan_version == 0
        assert first.slices[0].token_ids.tolist() == [1, 2, 3, 4, 5, 6]
        assert first.slices[0].samples
        (new,) = first.new_sequences
        assert (new.slot, new.request_id, new.index) == (0, "r0", 0)
        assert new.prompt_token_ids.tolist() == [1, 2, 3, 4, 5, 6]
        assert new.output_token_ids.tolist() == []
        run.commit()
        second = run.schedule()
        assert shape(second) == [(0, 6, 1, [0, 1], 0)]
        assert second is not None and second.plan_version > 0
        assert second.slices[0].token_ids.tolist() == run.outputs["r0", 0]
        assert second.new_sequences == []
        run.commit()
        run.step()
        assert run.finished == {("r0", 0): "length"}
        assert not run.scheduler.has_unfinished()
        run.check_outputs()

    def test_a_long_prompt_is_cut_to_the_budget_and_decodes_go_first(self) -> None:
        run = engine(max_num_batched_tokens=8)
        run.add([1] * 3, 9)
        run.step()
        run.add([2] * 20, 2)
        pieces = []
        for _ in range(4):
            output = run.schedule()
            pieces.append([(s[0], s[1], s[2]) for s in sorted(shape(output))])
            run.commit()
        assert pieces == [
            [(0, 3, 1), (1, 0, 7)],
            [(0, 4, 1), (1, 7, 7)],
            [(0, 5, 1), (1, 14, 6)],
            [(0, 6, 1), (1, 20, 1)],
        ]
        run.run()
        run.check_outputs()

    def test_slices_stand_in_tree_order_with_their_shared_chunks(self) -> None:
        run = engine()
        run.add([1, 1, 1, 1, 2, 2, 2, 2, 3], 9)
        run.add([9, 9, 9, 9, 9], 9)
        run.add([1, 1, 1, 1, 4], 9)
        run.add([1, 1, 1, 1, 2, 2, 2, 2, 5], 9)
        output = run.schedule()
        assert shape(output) == [
            (0, 0, 9, [0, 1, 2], 0),
            (3, 8, 1, [0, 1, 6], 2),
            (2, 4, 1, [0, 5], 1),
            (1, 0, 5, [3, 4], 0),
        ]
        run.commit()
        run.run()
        run.check_outputs()
        assert run.cached == {"r0": 0, "r1": 0, "r2": 4, "r3": 8}

    def test_a_freed_slot_is_told_and_used_again(self) -> None:
        run = engine(max_num_seqs=1)
        run.add([1, 2], 1)
        run.step()
        run.add([3, 4], 1)
        output = run.schedule()
        assert output is not None
        assert output.freed_slots == [0]
        assert [new.slot for new in output.new_sequences] == [0]

    def test_priority_before_arrival(self) -> None:
        run = engine(max_num_seqs=1)
        names = [run.add([i, i], 1, priority=p) for i, p in ((1, 0), (2, 5), (3, -1))]
        order = []
        while run.scheduler.has_unfinished():
            order += [delta.request_id for delta in run.step()]
        assert order == [names[2], names[0], names[1]]


class TestPlanVersion:
    def versions(self, run: SimulatedEngine, count: int) -> list[int]:
        found = []
        for _ in range(count):
            output = run.schedule()
            assert output is not None
            found.append(output.plan_version)
            run.commit()
        return found

    def test_it_stays_while_tails_fill_and_changes_when_spares_are_used_up(self) -> None:
        run = engine(spare_chunks=1)
        run.add([1, 2, 3, 4, 5], 30)
        # chunks 0, 1 and spare 2 last to position 11; then chunk 3 and spare 4 to position 19
        versions = self.versions(run, 17)
        assert versions[0] == 0
        assert len(set(versions[1:8])) == 1
        assert versions[8] != versions[7]
        assert len(set(versions[8:16])) == 1
        assert versions[16] != versions[15]

    def test_join_and_leave_change_it(self) -> None:
        run = engine(spare_chunks=2)
        run.add([1, 2, 3], 12)
        (_, alone, still) = self.versions(run, 3)
        assert alone == still
        run.add([4, 5], 3)
        (join, both, last) = self.versions(run, 3)
        assert join == 0
        assert both == last != alone
        (after,) = self.versions(run, 1)
        assert after not in (alone, both)

    def test_a_one_token_join_is_a_decode_step_with_a_new_version(self) -> None:
        run = engine()
        run.add([1, 2, 3, 4, 5], 9)
        (_, alone) = self.versions(run, 2)
        run.add([1, 2, 3, 4, 9], 9)
        (join,) = self.versions(run, 1)
        assert join not in (0, alone)

    def test_adoption_changes_it(self) -> None:
        run = engine(spare_chunks=2)
        run.add([1, 2, 3, 4], 9, n=2)
        run.model.vocab_size = run.oracle.vocab_size = 1  # both choices sample the same
        versions = self.versions(run, 8)
        rows = run.scheduler._running.order.sequences
        assert rows[0].chunks.ids.tolist()[:2] == rows[1].chunks.ids.tolist()[:2]
        assert len(set(versions[1:5])) == 1
        assert versions[5] != versions[4], "both filled their second chunk in the fifth step"
        run.run()
        run.check_outputs()


class TestEnds:
    def finish(self, run: SimulatedEngine, tokens: list[int], **params: object) -> tuple:
        """Feed these tokens to a request; its finish reason and stop token."""
        run.add([1, 2], 5, **params)
        for token_id in tokens:
            output = run.scheduler.schedule()
            assert output is not None
            slot = output.slices[0].slot
            sampled = SampledTokens(token_ids={slot: token_id})
            for delta in run.scheduler.commit(output, sampled):
                (choice,) = delta.choices
        return choice.finish_reason, choice.stop_token_id

    def test_eos(self) -> None:
        run = engine(eos_token_ids=frozenset({7, 8}))
        assert self.finish(run, [3, 8]) == ("stop", 8)
        assert not run.scheduler.has_unfinished()

    def test_eos_ignored(self) -> None:
        run = engine(eos_token_ids=frozenset({7}))
        assert self.finish(run, [7, 7, 7, 7, 7], ignore_eos=True) == ("length", None)

    def test_stop_token_ids_hold_even_then(self) -> None:
        run = engine(eos_token_ids=frozenset({7}))
        params = {"ignore_eos": True, "stop_token_ids": (9,)}
        assert self.finish(run, [7, 9], **params) == ("stop", 9)

    def test_nothing_stops_before_min_tokens(self) -> None:
        run = engine(eos_token_ids=frozenset({7}))
        assert self.finish(run, [7, 7], min_tokens=3) == (None, None)
        run = engine(eos_token_ids=frozenset({7}))
        assert self.finish(run, [7, 7, 7], min_tokens=3) == ("stop", 7)

    def test_a_finished_grammar(self) -> None:
        run = engine()
        run.add([1, 2], 5)
        output = run.scheduler.schedule()
        assert output is not None
        sampled = SampledTokens(token_ids={0: 3}, finished_grammar={0})
        (delta,) = run.scheduler.commit(output, sampled)
        assert delta.choices[0].finish_reason == "stop"

    def test_max_tokens_null_is_what_fits_the_context(self) -> None:
        run = engine(max_model_len=11)
        run.add([1, 2, 3, 4], None)
        run.run()
        assert len(run.outputs["r0", 0]) == 7
        assert run.finished["r0", 0] == "length"
        run.check_outputs()

    def test_max_tokens_null_is_what_fits_the_pool_alone(self) -> None:
        run = engine(num_chunks=3)
        run.add([1, 2, 3, 4], None)
        run.run()
        assert len(run.outputs["r0", 0]) == 9  # 12 slots, and the last token needs none
        run.check_outputs()

    def test_the_kv_pair_that_failed_ends_with_an_error(self) -> None:
        run = engine()
        run.add([1, 2, 3], 5)
        run.add([4, 5, 6], 5)
        run.schedule()
        run.model.fail_slots = {0}
        deltas = run.commit()
        run.model.fail_slots = set()
        (failed,) = [d for d in deltas if d.error is not None]
        assert (failed.request_id, failed.error.kind, failed.error.code) == (
            "r0",
            "failed",
            "model_nan",
        )
        run.run()
        run.check_outputs()
        assert run.cache.tree.num_nodes == 2, "nothing of the failed request is kept"


class TestKindsOfRequests:
    def test_the_prompt_is_scored_and_nothing_sampled(self) -> None:
        run = engine()
        run.add([1, 2, 3, 4, 5], 1)
        run.run()
        name = run.add([1, 2, 3, 4, 5], 0, prompt_logprobs=0)
        output = run.schedule()
        assert shape(output)[0][1:3] == (0, 5), "every row is wanted: nothing is matched"
        assert output is not None and output.slices[0].wants_prompt_logits
        assert not output.slices[0].samples
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


class TestAbort:
    def test_in_the_queue(self) -> None:
        run = engine(max_num_seqs=1)
        run.add([1, 2], 9)
        waiting = run.add([3, 4], 9)
        run.step()
        run.scheduler.abort(waiting)
        run.run()
        run.check_outputs({waiting})
        assert run.outputs[waiting, 0] == []

    def test_in_flight_it_takes_effect_after_the_commit(self) -> None:
        run = engine()
        name = run.add([1, 2, 3, 4, 5], 9)
        run.schedule()
        run.scheduler.abort(name)
        assert run.scheduler.has_unfinished()
        assert run.commit() == []
        assert not run.scheduler.has_unfinished()
        run.check_idle()
        again = run.add([1, 2, 3, 4, 5, 6], 1)
        run.run()
        assert run.cached[again] == 5, "what the step computed is kept"

    def test_one_choice_of_three(self) -> None:
        run = engine()
        name = run.add([1, 2, 3], 6, n=3)
        run.step()
        run.scheduler.abort(name, 1)
        run.run()
        assert sorted(i for _, i in run.finished) == [0, 2]

    def test_an_unknown_request(self) -> None:
        run = engine()
        run.scheduler.abort("nobody")
        run.scheduler.abort("nobody", 3)


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
        SchedulerLimits(**limits)
