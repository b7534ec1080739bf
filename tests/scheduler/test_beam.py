"""Beam search: the bookkeeping alone, and as forks in the engine against a plain search."""

from __future__ import annotations

import pytest

from chunkllama.sampling_params import SamplingParams
from chunkllama.scheduler.beam import BeamSearch, Extension
from chunkllama.simulation.engine import SimulatedEngine


def search(width: int = 2, max_tokens: int = 3, **params: object) -> BeamSearch:
    sampling = SamplingParams(beam_width=width, temperature=0.0, seed=0, **params)
    return BeamSearch(sampling, max_tokens, frozenset({9}))


def test_the_best_continuations_of_all_beams_go_on() -> None:
    beam = search()
    beam.feed(0, [(5, -0.1), (6, -0.5), (7, -2.0)])
    assert beam.advance({0: []}) == [Extension(0, 5, -0.1), Extension(0, 6, -0.5)]
    beam.bind({0: -0.1, 1: -0.5})
    beam.feed(0, [(1, -3.0), (2, -4.0)])
    assert not beam.is_fed
    beam.feed(1, [(3, -0.2), (4, -0.3)])
    assert beam.is_fed
    chosen = beam.advance({0: [5], 1: [6]})
    assert [(e.parent, e.token_id) for e in chosen] == [(1, 3), (1, 4)]


def test_an_end_of_sequence_is_a_hypothesis() -> None:
    beam = search()
    beam.feed(0, [(9, -0.1), (6, -0.5), (7, -2.0)])
    assert [e.token_id for e in beam.advance({0: []})] == [6, 7]
    beam.bind({0: -0.5, 1: -2.0})
    beam.feed(0, [(9, -0.1), (1, -9.0)])
    beam.feed(1, [(2, -8.0), (3, -9.0)])
    assert beam.advance({0: [6], 1: [7]}) == [], "no live beam can beat the two that ended"
    (best,) = beam.best()
    assert (best.token_ids, best.finish_reason, best.stop_token_id) == ([9], "stop", 9)


def test_length_penalty_prefers_longer_or_shorter() -> None:
    for penalty, expected in ((0.0, [9]), (2.0, [6, 1])):
        beam = search(max_tokens=2, length_penalty=penalty)
        beam.feed(0, [(9, -1.0), (6, -0.6), (7, -5.0)])
        beam.advance({0: []})
        beam.bind({0: -0.6, 1: -5.0})
        beam.feed(0, [(1, -0.6), (2, -5.0)])
        beam.feed(1, [(3, -8.0), (4, -9.0)])
        beam.advance({0: [6], 1: [7]})
        assert beam.best()[0].token_ids == expected


def test_nothing_ends_before_min_tokens() -> None:
    beam = search(min_tokens=2)
    beam.feed(0, [(9, -0.1), (6, -0.5), (7, -2.0)])
    assert [e.token_id for e in beam.advance({0: []})] == [9, 6]


def test_n_choices_even_where_fewer_sequences_exist() -> None:
    """A client waits for the end of each of them."""
    beam = search(width=3, max_tokens=1, n=3)
    beam.feed(0, [(5, -0.1), (6, -0.5)])
    assert beam.advance({0: []}) == []
    assert [best.token_ids for best in beam.best()] == [[5], [6], [6]]


@pytest.mark.parametrize("spare", [0, 1])
@pytest.mark.parametrize("width", [2, 3, 4])
@pytest.mark.parametrize("num_prompt", [1, 3, 4, 5, 8])
def test_the_engine_equals_a_plain_search(num_prompt: int, width: int, spare: int) -> None:
    run = SimulatedEngine(
        64,
        4,
        vocab_size=8,
        max_num_seqs=4,
        max_num_batched_tokens=32,
        eos_token_ids=frozenset({7}),
        spare_chunks=spare,
    )
    for i in range(3):
        prompt = [(i + k) % 3 for k in range(num_prompt)]
        run.add(prompt, 11, beam_width=width, n=2, length_penalty=1.0 + i / 2)
    run.run()
    run.check_outputs()


def test_beams_share_the_path_and_copy_the_tail() -> None:
    run = SimulatedEngine(
        64, 4, vocab_size=50, max_num_seqs=4, max_num_batched_tokens=32, spare_chunks=0
    )
    run.add([1, 2, 3, 4, 5, 6], 9, beam_width=3)
    run.step()
    output = run.schedule()
    assert output is not None
    assert [s.chunk_ids.tolist() for s in output.slices] == [[0, 1], [0, 2], [0, 3]]
    assert output.copies == [(1, 2, 2), (1, 3, 2)]
    assert {s.token_ids.tolist()[0] for s in output.slices} == {
        n.output_token_ids.tolist()[0] for n in output.new_sequences
    }
    run.commit()
    run.run()
    run.check_outputs()


def test_nothing_is_sent_before_the_search_ends() -> None:
    run = SimulatedEngine(64, 4, vocab_size=50, max_num_seqs=4, max_num_batched_tokens=32)
    run.add([1, 2, 3], 5, beam_width=2, n=2)
    for _ in range(4):
        assert run.step() == []
    (delta,) = run.step()
    assert [c.index for c in delta.choices] == [0, 1]
    assert all(len(c.token_ids) == 5 and c.finish_reason == "length" for c in delta.choices)


def test_a_replayed_search_begins_anew() -> None:
    run = SimulatedEngine(64, 4, vocab_size=50, max_num_seqs=4, max_num_batched_tokens=32)
    run.add([1, 2, 3], 5, beam_width=2, n=2, delivered=[[], []])
    run.run()
    run.check_outputs()


@pytest.mark.parametrize("index", [None, 0, 1])
def test_an_aborted_search_gives_everything_back(index: int | None) -> None:
    """Its choices exist only at its end: one aborted is all aborted."""
    run = SimulatedEngine(64, 4, vocab_size=50, max_num_seqs=4, max_num_batched_tokens=32)
    name = run.add([1, 2, 3, 4, 5], 9, beam_width=3, n=2)
    run.step()
    run.step()
    run.scheduler.abort(name, index)
    assert not run.scheduler.has_unfinished()
    run.check_idle()
