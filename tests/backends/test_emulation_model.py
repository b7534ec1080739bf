"""A model through the CUDA backend on the emulator: as `benchmarks/gpu.py check` runs it."""

from __future__ import annotations

import pytest
import torch
from gpu_suite.llama import compare_with_reference, random_spec
from kernel_emulator import EmulatedLauncher, shipped_libraries, table

from chunkllama.backends.cuda.backend import CudaBackend
from chunkllama.backends.reference.backend import ReferenceBackend

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", [64, 128])
def test_emulation_greedy_answers_agree_with_the_reference(head_dim: int, dtype: str) -> None:
    """Prefill, a shared prefix, decode: all six ops as the engine calls them, layer by layer."""
    spec = random_spec(head_dim)
    ops = CudaBackend(
        torch.device("cpu"),
        dtype=DTYPES[dtype],
        head_dim=head_dim,
        num_kv_heads=spec.num_kv_heads,
        launcher=EmulatedLauncher(shipped_libraries()[dtype, head_dim], table("sm_90")),
    )
    reference = ReferenceBackend(torch.device("cpu"))
    found = compare_with_reference(ops, reference, spec, DTYPES[dtype], decode_steps=6)
    assert found["clear_answers"] > found["answers"] / 3, "too few answers are clear to compare"
