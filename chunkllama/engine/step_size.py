"""Tokens of a step where ``max_num_batched_tokens`` is not set. No torch.

A first token waits for the end of the step in progress, so a step of prompts takes about
``STEP_SECONDS``: as many tokens as a machine computes in that time by an estimate from the model's
size, the instruction set and the threads. Steps of fewer than ``LEAST`` tokens would cost
throughput: each reads all weights.
"""

from __future__ import annotations

from typing import Final

from chunkllama.config import EngineConfig
from chunkllama.model_spec import ModelSpec

STEP_SECONDS: Final = 0.07
LEAST: Final = 128
MOST: Final = 512
_ROUNDING: Final = 64

# Multiplications a thread adds up in a second while it computes prompts in bfloat16. amx: as in the
# built-in cost model of simulation/cost_model.py, 0.13 ms a token of the demo model on two cores;
# avx512_bf16: a step of 512 tokens in 0.25 s on two cores of an AMD. avx512: 1.7 ms of processor
# time for a token on an Intel. avx2 is an estimate, and levels that are not listed (ARM, baseline)
# and the reference backend count as the slowest.
_RATES: Final = {"amx": 400e9, "avx512_bf16": 110e9, "avx512": 60e9, "avx2": 30e9}


def choose_step_tokens(
    config: EngineConfig, spec: ModelSpec, device: str, isa_level: str, threads: int
) -> int:
    """Return ``max_num_batched_tokens`` as it was set, else what fits the machine.

    Args:
        device: "cpu", "cuda" or "cuda:N".
        isa_level: of the cpu backend; "" for another one.
    """
    scheduler = config.scheduler
    if scheduler.max_num_batched_tokens is not None:
        return scheduler.max_num_batched_tokens
    if device != "cpu":
        return max(MOST, 2 * scheduler.max_num_seqs)
    rate = _RATES.get(isa_level, min(_RATES.values())) * threads
    return step_tokens(num_multiplications(spec) / rate, scheduler.max_num_seqs)


def step_tokens(seconds: float, max_num_seqs: int) -> int:
    """Return the tokens of a step if a prompt token takes ``seconds``.

    At least half of a step is left to prompts while all sequences decode.
    """
    fitting = MOST if seconds * MOST <= STEP_SECONDS else int(STEP_SECONDS / seconds)
    return max(fitting // _ROUNDING * _ROUNDING, LEAST, 2 * max_num_seqs)


def num_multiplications(spec: ModelSpec) -> int:
    """Return the multiplications of a token in the layers, those of attention apart."""
    attention = spec.qkv_size + spec.num_qo_heads * spec.head_dim
    total = 0
    for index in range(spec.num_layers):
        mlp = 3 if spec.layer(index).gated else 2
        total += spec.hidden_size * (attention + mlp * spec.intermediate_size)
    return total
