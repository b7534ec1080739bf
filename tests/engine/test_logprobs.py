"""Log-probabilities equal the log-softmax of transformers' logits in fp32, prompts included."""

from __future__ import annotations

import numpy as np
import torch

from chunkllama.messages import EngineRequest
from chunkllama.sampling_params import SamplingParams

TOLERANCE = 1e-3


def test_outputs_and_prompts_against_transformers(tiny_core, tiny_model) -> None:
    prompt = np.random.default_rng(8).integers(3, 300, 150).tolist()
    sampling = SamplingParams(
        temperature=0.0, max_tokens=12, ignore_eos=True, logprobs=4, prompt_logprobs=2, seed=1
    )
    core = tiny_core(num_chunks=8, max_num_batched_tokens=70)
    core.add(EngineRequest(request_id="r", prompt_token_ids=prompt, sampling=sampling))
    ids, outputs, prompts = [], [], None
    while core.has_work():
        for delta in core.step():
            prompts = delta.prompt_logprobs or prompts
            for choice in delta.choices:
                ids += choice.token_ids
                outputs += choice.logprobs or []
    with torch.inference_mode():
        logits = tiny_model[1](torch.tensor([prompt + ids])).logits[0]
    expected = logits.log_softmax(dim=-1).numpy()
    assert len(outputs) == len(ids) == 12
    assert len(prompts) == len(prompt) and prompts[0] is None
    positions = [(i, entry) for i, entry in enumerate(prompts) if entry is not None]
    positions += [(len(prompt) + i, entry) for i, entry in enumerate(outputs)]
    for position, entry in positions:
        row = expected[position - 1]
        assert entry.token_id == (prompt + ids)[position]
        assert abs(entry.logprob - row[entry.token_id]) < TOLERANCE
        assert entry.rank == 1 + int((row > row[entry.token_id] + TOLERANCE / 10).sum())
        best = np.sort(row)[::-1][: len(entry.top)]
        np.testing.assert_allclose([value for _, value in entry.top], best, atol=TOLERANCE)
        for token, value in entry.top:
            assert abs(value - row[token]) < TOLERANCE
