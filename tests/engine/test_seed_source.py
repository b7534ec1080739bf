"""--seed makes the seeds of requests that bring none reproducible, and no others."""

from __future__ import annotations

from chunkllama.engine.client import seed_source, with_seed
from chunkllama.messages import EngineRequest
from chunkllama.sampling_params import SamplingParams


def drawn(draw, seed=None) -> int | None:
    sampling = SamplingParams(seed=seed)
    request = EngineRequest(request_id="r", prompt_token_ids=[1], sampling=sampling)
    return with_seed(request, draw).sampling.seed


def test_a_seed_repeats_and_its_absence_does_not():
    sources = [seed_source(7), seed_source(7), seed_source(8), seed_source(None)]
    sequences = [[drawn(source) for _ in range(4)] for source in sources]
    assert sequences[0] == sequences[1]
    assert len({tuple(s) for s in sequences}) == 3
    assert len(set(sequences[0])) == 4
    assert all(0 <= seed < 2**63 for seed in sequences[0])


def test_a_request_keeps_the_seed_it_brings():
    assert drawn(seed_source(7), seed=5) == 5
