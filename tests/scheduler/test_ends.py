"""How a choice ends: by its tokens, its length, a failure or an abort; chunks of four tokens."""

from __future__ import annotations

from chunkllama.scheduler.output import SampledTokens
from chunkllama.simulation.engine import SimulatedEngine


def engine(num_chunks: int = 32, **limits: object) -> SimulatedEngine:
    defaults = {"max_num_seqs": 4, "max_num_batched_tokens": 64, "spare_chunks": 0}
    return SimulatedEngine(num_chunks, 4, vocab_size=50, **{**defaults, **limits})


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

    def test_a_grammar_closed_because_the_tokens_run_out(self) -> None:
        run = engine()
        run.add([1, 2], 5)
        output = run.scheduler.schedule()
        assert output is not None
        sampled = SampledTokens(token_ids={0: 3}, finished_grammar={0}, closed_grammar={0})
        (delta,) = run.scheduler.commit(output, sampled)
        assert delta.choices[0].finish_reason == "length"

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
        run.scheduler.abort("unknown")
        run.scheduler.abort("unknown", 3)
