"""Each sampling parameter against a plain numpy oracle, and draws that ignore the batch."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from chunkllama.backends.philox import gumbels, philox4x32
from chunkllama.backends.reference.backend import ReferenceBackend
from chunkllama.engine import sequence_state
from chunkllama.engine.sampler import Sampled, Sampler, takes_best
from chunkllama.engine.sequence_state import SequenceState
from chunkllama.sampling_params import GrammarSpec, SamplingParams

VOCAB = 1000
EOS = (3, 9)
OPS = ReferenceBackend(torch.device("cpu"))


def state(
    prompt: list[int] | None = None, output: list[int] | None = None, index: int = 0, **params: Any
) -> SequenceState:
    sampling = SamplingParams(**{"seed": 5, **params})
    return SequenceState(sampling, index, np.array(prompt or [1], np.int32), list(output or []))


def random_logits(rows: int = 1, seed: int = 0, spread: float = 2.0) -> torch.Tensor:
    values = np.random.default_rng(seed).normal(size=(rows, VOCAB)) * spread
    return torch.from_numpy(values.astype(np.float32))


def sample(logits: torch.Tensor, *states: SequenceState) -> list[Sampled]:
    return Sampler(EOS, OPS).sample(logits.clone(), list(states), {})


def support(logits: torch.Tensor, draws: int = 400, **params: Any) -> set[int]:
    """The tokens that many draws (one per position) yield."""
    rows = [state(output=[7] * position, **params) for position in range(draws)]
    return {s.token_id for s in sample(logits.expand(draws, -1), *rows)}


def oracle_distribution(logits: np.ndarray, sampling: SamplingParams) -> np.ndarray:
    """Probabilities after temperature, min-p, top-k, top-p, by sorting in float64."""
    scaled = logits.astype(np.float64) / sampling.temperature
    weights = np.exp(scaled - scaled.max())
    weights[weights < sampling.min_p * weights.max()] = 0
    if 0 < sampling.top_k < len(weights):
        weights[weights < np.sort(weights)[-sampling.top_k]] = 0
    order = np.argsort(-weights, kind="stable")
    before = np.cumsum(weights[order]) - weights[order]
    outside = before >= sampling.top_p * weights.sum()
    outside[0] = False
    weights[order[outside]] = 0
    return weights / weights.sum()


def test_philox_known_answers() -> None:
    """The reference implementation's test vectors (Random123, kat_vectors)."""

    def words(*values: int) -> list[np.ndarray]:
        return [np.array([value], np.uint64) for value in values]

    def run(counter: tuple[int, ...], key: tuple[int, ...]) -> list[int]:
        return [int(word[0]) for word in philox4x32(words(*counter), words(*key))]

    ones = 0xFFFFFFFF
    assert run((0,) * 4, (0,) * 2) == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]
    assert run((ones,) * 4, (ones,) * 2) == [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]
    counter, key = (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344), (0xA4093822, 0x299F31D0)
    assert run(counter, key) == [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1]


def test_gumbels_differ_by_seed_choice_position_stream_and_lane() -> None:
    grid = [(s, c, p) for s in (0, 1, 2**40) for c in range(3) for p in range(20)]
    keys = [list(column) for column in zip(*grid, strict=True)]
    lanes = np.broadcast_to(np.arange(5), (len(grid), 5))
    values = np.stack([gumbels(*keys, stream, lanes) for stream in (0, 1)])
    assert values.shape == (2, len(grid), 20)
    assert len(np.unique(values)) == values.size
    assert abs(values.mean() - 0.5772) < 0.03 and abs(values.std() - np.pi / 6**0.5) < 0.03


def test_greedy_is_the_argmax() -> None:
    logits = random_logits(8)
    outcomes = sample(logits, *[state(temperature=0.0)] * 8)
    assert [s.token_id for s in outcomes] == logits.argmax(dim=1).tolist()


@pytest.mark.parametrize(
    "params",
    [
        {},
        {"temperature": 0.3},
        {"temperature": 3.0},
        {"top_k": 1},
        {"top_k": 7},
        {"top_k": 300},
        {"top_k": VOCAB + 5},
        {"top_p": 0.9},
        {"top_p": 0.3},
        {"top_p": 1e-9},
        {"top_p": 0.9999, "temperature": 5.0},
        {"min_p": 0.1},
        {"min_p": 1.0},
        {"temperature": 0.7, "top_k": 40, "top_p": 0.8, "min_p": 0.02},
    ],
    ids=str,
)
def test_draw_is_the_oracles_race(params: dict[str, Any]) -> None:
    """A draw is the block, and in it the token, of the largest log-weight plus Gumbel number."""
    logits = random_logits(seed=11)
    rows = [state(output=[7] * position, **params) for position in range(200)]
    drawn = [s.token_id for s in sample(logits.expand(200, -1), *rows)]
    probabilities = oracle_distribution(logits[0].numpy(), rows[0].sampling)
    blocks = np.pad(probabilities, (0, -VOCAB % 256)).reshape(-1, 256)
    for position, token in enumerate(drawn):
        assert probabilities[token] > 0
        with np.errstate(divide="ignore"):
            outer = np.log(blocks.sum(axis=1))
            outer += gumbels([5], [0], [position], 0, np.arange(1)[None])[0][: len(blocks)]
            inner = np.log(blocks[token // 256])
        lanes = token // 256 * 64 + np.arange(64)[None]
        inner += gumbels([5], [0], [position], 1, lanes)[0]
        assert outer[token // 256] > outer.max() - 1e-4
        assert inner[token % 256] > inner.max() - 1e-4


def test_small_errors_of_logits_rarely_change_a_draw() -> None:
    """Errors of 1e-4, more than another batch makes in fp32: fewer than 1 draw in 1,000 changes.

    Facts of these seeds: 20,000 draws over 1,000 tokens.
    """
    logits = random_logits(seed=4)
    noise = np.random.default_rng(1).uniform(-1e-4, 1e-4, VOCAB).astype(np.float32)
    changed = 0
    for seed in range(20):
        rows = [state(output=[0] * position, seed=seed) for position in range(1000)]
        before = sample(logits.expand(1000, -1), *rows)
        after = sample((logits + torch.from_numpy(noise)).expand(1000, -1), *rows)
        changed += sum(a.token_id != b.token_id for a, b in zip(before, after, strict=True))
    assert changed < 20


def test_draws_follow_the_probabilities() -> None:
    """A fact of this seed, not a statistic: 20,000 draws from four tokens."""
    logits = torch.full((1, VOCAB), -torch.inf)
    logits[0, [10, 500, 501, 999]] = torch.tensor([0.1, 0.2, 0.3, 0.4]).log()
    rows = [state(index=i % 4, output=[0] * (i // 4 % 50), seed=i // 200) for i in range(20000)]
    counts = np.bincount(
        [s.token_id for s in sample(logits.expand(20000, -1), *rows)], minlength=VOCAB
    )
    shares = counts[[10, 500, 501, 999]] / 20000
    assert counts.sum() == counts[[10, 500, 501, 999]].sum()
    np.testing.assert_allclose(shares, [0.1, 0.2, 0.3, 0.4], atol=0.01)


def test_a_seed_draws_the_same_alone_and_in_any_batch() -> None:
    logits = random_logits(32, seed=3)
    kinds: list[dict[str, Any]] = [
        {"temperature": 0.0},
        {"temperature": 1.0},
        {"temperature": 0.8, "top_k": 50},
        {"temperature": 1.2, "top_p": 0.95},
        {"min_p": 0.05, "repetition_penalty": 1.3},
        {"logprobs": 3, "presence_penalty": 1.0},
        {"logit_bias": {4: 8.0}, "min_tokens": 9},
        {"top_p": 0.5, "bad_words_token_ids": ((4, 5), (6,))},
    ]
    rows = [
        state(output=list(range(i % 7)), index=i % 3, **{**kinds[i % len(kinds)], "seed": i})
        for i in range(32)
    ]
    together = sample(logits, *rows)
    alone = [sample(logits[i : i + 1], rows[i])[0] for i in range(32)]
    assert [s.token_id for s in together] == [s.token_id for s in alone]
    order = np.random.default_rng(0).permutation(32).tolist()
    shuffled = sample(logits[order], *[rows[i] for i in order])
    assert [s.token_id for s in shuffled] == [together[i].token_id for i in order]


def test_another_seed_choice_or_position_draws_another_number() -> None:
    logits = random_logits(spread=0.1)
    variants = [{}, {"seed": 6}, {"index": 1}, {"output": [0]}]
    tokens = [sample(logits, state(**variant))[0].token_id for variant in variants]
    assert len(set(tokens)) == 4
    assert sample(logits, state())[0].token_id == tokens[0]


def best(logits: torch.Tensor, **params: Any) -> int:
    return sample(logits, state(temperature=0.0, **params))[0].token_id


def peaks(**values: float) -> torch.Tensor:
    """Zero logits but for t<id>=value."""
    logits = torch.zeros(1, VOCAB)
    for name, value in values.items():
        logits[0, int(name[1:])] = value
    return logits


def test_presence_and_frequency_penalties_count_the_output_only() -> None:
    logits = peaks(t4=5.0, t5=4.0)
    assert best(logits, prompt=[4] * 50, presence_penalty=2.0, frequency_penalty=2.0) == 4
    assert best(logits, output=[4], presence_penalty=0.9) == 4
    assert best(logits, output=[4] * 40, presence_penalty=0.9) == 4
    assert best(logits, output=[4], presence_penalty=1.1) == 5
    assert best(logits, output=[4] * 4, frequency_penalty=0.24) == 4
    assert best(logits, output=[4] * 4, frequency_penalty=0.26) == 5
    assert best(logits, output=[5], presence_penalty=-1.5) == 5


def test_repetition_penalty_counts_prompt_and_output_once() -> None:
    logits = peaks(t4=6.0, t5=4.0)
    assert best(logits, prompt=[4, 4, 4], repetition_penalty=1.4) == 4
    assert best(logits, prompt=[4], repetition_penalty=1.6) == 5
    assert best(logits, output=[4, 4], repetition_penalty=1.6) == 5
    below = torch.full((1, VOCAB), -9.0)
    below[0, [4, 5]] = torch.tensor([-2.0, -3.0])
    assert best(below, prompt=[4], repetition_penalty=1.4) == 4
    assert best(below, prompt=[4], repetition_penalty=1.6) == 5
    assert best(below, output=[5], repetition_penalty=0.5) == 5


def test_logit_bias_adds() -> None:
    logits = peaks(t4=5.0, t5=4.0)
    assert best(logits, logit_bias={5: 0.9}) == 4
    assert best(logits, logit_bias={5: 1.1}) == 5
    assert best(logits, logit_bias={4: -100.0, VOCAB + 7: 100.0}) == 5


def test_allowed_token_ids() -> None:
    logits = peaks(t4=5.0, t5=4.0, t6=3.0)
    assert best(logits, allowed_token_ids=(5, 6, VOCAB, -1)) == 5
    assert best(logits.flip(1), allowed_token_ids=(-(VOCAB - 5), 2)) == 2
    assert support(random_logits(), allowed_token_ids=(17, 18)) == {17, 18}


def test_bad_words_end_is_banned_after_their_start() -> None:
    logits = peaks(t4=5.0, t5=4.0)
    assert best(logits, bad_words_token_ids=((4,),)) == 5
    words = ((8, 9, 4),)
    assert best(logits, bad_words_token_ids=words) == 4
    assert best(logits, output=[9], bad_words_token_ids=words) == 4
    assert best(logits, output=[8, 9, 1], bad_words_token_ids=words) == 4
    assert best(logits, output=[1, 8, 9], bad_words_token_ids=words) == 5


@pytest.mark.parametrize(
    ("params", "expected"),
    [
        ({}, True),
        ({"min_tokens": 9, "ignore_eos": True}, True),
        ({"top_k": 5, "top_p": 0.5, "min_p": 0.1}, True),
        ({"min_tokens": 9}, False),
        ({"min_tokens": 9, "ignore_eos": True, "stop_token_ids": (4,)}, False),
        ({"bad_words_token_ids": ((4,),)}, False),
        ({"logit_bias": {4: -9.0}}, False),
        ({"allowed_token_ids": (1, 2)}, False),
        ({"presence_penalty": 1.0}, False),
        ({"frequency_penalty": 1.0}, False),
        ({"repetition_penalty": 1.5}, False),
        ({"logprobs": 0}, False),
        ({"temperature": 0.7}, False),
        ({"beam_width": 2, "n": 2}, False),
        ({"grammar": GrammarSpec(kind="regex", text="a*")}, False),
    ],
)
def test_only_requests_whose_token_is_the_best_one_take_it_unseen(
    params: dict[str, Any], expected: bool
) -> None:
    row = state(prompt=[4], output=[4], **{"temperature": 0.0, **params})
    assert takes_best(row.sampling) == expected
    for seed in range(20 if expected else 0):
        logits = random_logits(seed=seed)
        assert sample(logits, row)[0].token_id == int(logits.argmax())


def test_min_tokens_holds_back_every_end() -> None:
    logits = peaks(t3=9.0, t9=8.0, t21=7.0, t5=1.0)
    common = {"min_tokens": 3, "stop_token_ids": (21,)}
    assert best(logits, output=[1, 1], **common) == 5
    assert best(logits, output=[1, 1, 1], **common) == 3
    assert best(logits, output=[], ignore_eos=True, **common) == 3


def test_top_k_keeps_what_ties_at_its_edge() -> None:
    logits = peaks(t4=5.0, t5=5.0, t6=5.0)
    assert support(logits, top_k=1) == {4, 5, 6}


def test_logprobs_are_of_the_models_own_logits() -> None:
    logits = random_logits(2, seed=8)
    expected = logits.log_softmax(dim=1)
    rows = [
        state(logprobs=4, temperature=0.5, logit_bias={77: 50.0}),
        state(logprobs=0, temperature=0.0),
    ]
    biased, greedy = sample(logits, *rows)
    assert biased.token_id == 77
    assert biased.logprob is not None
    assert biased.logprob.logprob == pytest.approx(float(expected[0, 77]), abs=1e-5)
    assert biased.logprob.rank == int((logits[0] > logits[0, 77]).sum()) + 1
    assert [token for token, _ in biased.logprob.top] == logits[0].topk(4).indices.tolist()
    assert greedy.logprob is not None
    assert greedy.logprob.rank == 1
    assert greedy.logprob.top == []


def test_beam_candidates_are_twice_the_width() -> None:
    logits = random_logits(2, seed=9)
    beam, plain = sample(
        logits, state(beam_width=3, temperature=0.0, logit_bias={5: -100.0}), state(temperature=0.0)
    )
    assert plain.beam_candidates is None
    assert beam.beam_candidates is not None
    edited = logits[0].clone()
    edited[5] -= 100
    values, ids = edited.log_softmax(dim=0).topk(6)
    assert [token for token, _ in beam.beam_candidates] == ids.tolist()
    np.testing.assert_allclose([lp for _, lp in beam.beam_candidates], values.numpy(), atol=1e-5)


def test_beam_candidates_are_allowed_tokens_only() -> None:
    (beam,) = sample(
        random_logits(), state(beam_width=3, temperature=0.0, allowed_token_ids=(4, 9))
    )
    assert beam.beam_candidates is not None
    assert sorted(token for token, _ in beam.beam_candidates) == [4, 9]


@pytest.mark.parametrize("params", [{"temperature": 0.0}, {"temperature": 1.0, "logprobs": 2}])
@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_a_broken_row_fails_alone(params: dict[str, Any], poison: float) -> None:
    logits = random_logits(3, seed=4)
    rows = [state(seed=i, **params) for i in range(3)]
    healthy = sample(logits, *rows)
    logits[1, 123] = poison
    outcomes = sample(logits, *rows)
    assert outcomes[1].failed == "model_nan"
    assert [outcomes[0], outcomes[2]] == [healthy[0], healthy[2]]


def test_a_row_with_no_token_left_fails_alone() -> None:
    logits = random_logits(2, seed=5)
    words = {"allowed_token_ids": (4,), "bad_words_token_ids": ((4,),)}
    edges = {"temperature": 1.0, "min_p": 0.1, "top_p": 0.9, "top_k": 5}
    for params in ({"temperature": 0.0}, {"temperature": 1.0}, edges):
        empty, other = sample(logits, state(**params, **words), state(temperature=0.0))
        assert empty.failed == "no_allowed_token"
        assert other == Sampled(int(logits[1].argmax()))


def test_sizes_that_are_no_multiple_of_anything() -> None:
    for size in (1, 2, 255, 256, 257, 4097):
        logits = torch.zeros(3, size)
        rows = [state(index=i, top_p=0.9999) for i in range(3)]
        assert all(0 <= s.token_id < size for s in sample(logits, *rows))


def test_the_mask_of_allowed_tokens_is_made_once(monkeypatch) -> None:
    """Rows behind guesses share it, whichever of them is asked first."""
    made = []
    mask_of = sequence_state.mask_of
    monkeypatch.setattr(sequence_state, "mask_of", lambda *given: made.append(1) or mask_of(*given))
    first = state(allowed_token_ids=(3, 40))
    first.drafts = [3, 40, 3]
    rows = [first.after_drafts(count) for count in (3, 2, 1)]
    masks = [row.allowed_mask(2) for row in (*rows, first)]
    assert made == [1] and all(mask is masks[0] for mask in masks)
    assert masks[0].tolist() == [1 << 3, 1 << 8]
