"""A model through the CUDA backend on the emulator: as `benchmarks/gpu.py check` runs it, and with
every part that a layer can have.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from gpu_suite.llama import compare_with_reference, random_spec
from kernel_emulator import EmulatedLauncher, table

from chunkllama.backends.cuda.backend import CudaBackend
from chunkllama.backends.reference.backend import ReferenceBackend
from chunkllama.model_spec import LayerSpec, ModelSpec, RopeSpec

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
POST_NORM = {"pre_norm": False, "post_norm": True}
GEMMA = {"norm_offset": 1.0, "embedding_multiplier": 2.0}
# Name -> fields of the layers, fields of the model.
PARTS: dict[str, tuple[list[dict[str, Any]], dict[str, Any]]] = {
    "biases": ([{"qkv_bias": True, "output_bias": True, "mlp_bias": True}], {}),
    "q/k norms by head": ([{"qk_norm": "head"}], {}),
    "q/k norms over all heads": ([{"qk_norm": "all", **POST_NORM}], {}),
    "norms after rotation": ([{"qk_norm": "head", "norm_after_rotation": True}], {}),
    "norms around blocks": ([{"post_norm": True, "activation": "gelu_tanh"}], GEMMA),
    "exact gelu": ([{"activation": "gelu"}], {}),
    "no rotation": ([{}, {"rope": None}], {}),
    "part of a head rotates": ([{}], {"ropes": (RopeSpec(rotary_dim=32),)}),
    "no gate": (
        [{"gated": False, "activation": "relu2"}],
        {"architecture": "ArceeForCausalLM"},
    ),
    "multipliers": (
        [{}],
        {"attention_scale": 0.2, "residual_multiplier": 0.5, "logit_multiplier": 0.7},
    ),
    "windows": ([{"window": 60}, {}, {"window": 7}], {}),
    "soft caps": ([{}, {"window": 60}], {"attention_softcap": 2.0, "logit_softcap": 5.0}),
}


def spec_with(part: str, head_dim: int = 64) -> ModelSpec:
    layers, fields = PARTS[part]
    pattern = tuple(LayerSpec(**layer) for layer in layers)
    return replace(random_spec(head_dim), layers=pattern, **fields)


def backend(head_dim: int, dtype: str, num_kv_heads: int) -> CudaBackend:
    return CudaBackend(
        torch.device("cpu"),
        dtype=DTYPES[dtype],
        head_dim=head_dim,
        num_kv_heads=num_kv_heads,
        launcher=EmulatedLauncher(table("sm_90")),
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", [64, 128])
def test_emulation_greedy_answers_agree_with_the_reference(head_dim: int, dtype: str) -> None:
    """Prefill, a shared prefix, decode: all six ops as the engine calls them, layer by layer."""
    spec = random_spec(head_dim)
    ops = backend(head_dim, dtype, spec.num_kv_heads)
    reference = ReferenceBackend(torch.device("cpu"))
    found = compare_with_reference(ops, reference, spec, DTYPES[dtype], decode_steps=6)
    assert found["clear_answers"] > found["answers"] / 3, "too few answers are clear to compare"


QUICK = ("windows", "soft caps", "q/k norms over all heads")


@pytest.mark.parametrize(
    "part", [pytest.param(x, marks=() if x in QUICK else pytest.mark.nightly) for x in PARTS]
)
def test_emulation_every_part_of_a_layer_agrees_with_the_reference(part: str) -> None:
    spec = spec_with(part)
    ops = backend(64, "fp16", spec.num_kv_heads)
    reference = ReferenceBackend(torch.device("cpu"))
    compare_with_reference(ops, reference, spec, torch.float16, decode_steps=2)


@pytest.mark.parametrize("part", ["biases", "windows", "soft caps"])
def test_emulation_launches_only_kernels_that_were_prepared(part: str) -> None:
    """So no request waits for a compiler; and windows are prepared only where there are some."""
    spec = spec_with(part)
    ops = backend(64, "fp16", spec.num_kv_heads)
    is_bounded = part != "biases"
    ops.prepare(is_bounded=is_bounded)
    reference = ReferenceBackend(torch.device("cpu"))
    compare_with_reference(ops, reference, spec, torch.float16, decode_steps=2)
    launcher = ops._launcher
    assert isinstance(launcher, EmulatedLauncher)
    assert {kernel for kernel, _, _ in launcher.launched} <= set(launcher.prepared)
    assert any(k.expression.endswith("true>>") for k in launcher.prepared) == is_bounded


def test_emulation_a_window_that_is_ignored_is_noticed() -> None:
    """The comparison above is sharp enough."""
    spec = spec_with("windows")
    ops = backend(64, "fp16", spec.num_kv_heads)
    narrow = ReferenceBackend(torch.device("cpu"))
    wide = replace(spec, layers=(LayerSpec(),))
    with pytest.raises(AssertionError, match=r"logits differ|top token differs"):
        compare_with_reference(
            ops, narrow, wide, torch.float16, decode_steps=1, reference_spec=spec
        )
