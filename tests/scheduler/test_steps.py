"""Steps with exact ids and counts, and when a plan lives on; chunks of four tokens."""

from __future__ import annotations

from chunkllama.scheduler.output import SchedulerOutput
from chunkllama.simulation.engine import SimulatedEngine


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
        run = engine(policy="fcfs")
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
