"""Rows with adapters in one native call against the reference ops, at every level of the CPU."""

from __future__ import annotations

from dataclasses import fields, replace

import numpy as np
import pytest
import torch
from attention_plans import random_case
from native_models import SPEC, make_model, native_ops, random_adapter

from chunkllama.backends.adapter import LINEARS, AdapterRows
from chunkllama.backends.reference.backend import ReferenceBackend
from chunkllama.models.tensors import layer_tensors

# (computing dtype, packed weights) -> largest error of a logit; the logits' spread is about one.
TOLERANCE = {
    (torch.float32, "auto"): 4e-5,
    (torch.bfloat16, "auto"): 0.2,
    (torch.bfloat16, "int8"): 0.3,
}
assert {field.name for field in fields(layer_tensors(SPEC, 0))} >= set(LINEARS)


@pytest.mark.parametrize("architecture", ["LlamaForCausalLM", "Phi3ForCausalLM"])
@pytest.mark.parametrize("kind", ["decode", "mixed"])
def test_rows_with_adapters_equal_the_reference_ops(
    level: str, rng: np.random.Generator, kind: str, architecture: str
) -> None:
    """Phi-3's adapters span the stacked heads, and the gate and up projections."""
    spec = replace(SPEC, architecture=architecture)
    case = random_case(rng, kind=kind, max_rows=150)  # type: ignore[arg-type]
    token_ids = torch.from_numpy(rng.integers(0, spec.vocab_size, case.num_rows))
    positions = torch.from_numpy(case.positions)
    whole = ("qkv_proj", "o_proj", "gate_up_proj", "down_proj")
    every = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", *whole)
    given = [
        random_adapter(spec, rng, every, (1, 16, 17)),
        random_adapter(spec, rng, ("v_proj", "up_proj", "gate_up_proj"), (128, 5)),
        random_adapter(spec, rng, ("down_proj",), (33,)),
    ]
    cuts = sorted(rng.choice(case.num_rows + 1, 6).tolist())  # ranges may be empty or touch
    ranges = [
        (cuts[i], cuts[i + 1], given[n]) for n, i in enumerate((0, 2, 4)) if cuts[i] < cuts[i + 1]
    ]
    model, plan = make_model(ReferenceBackend(torch.device("cpu")), spec, case, torch.float32)
    rows = [AdapterRows(b, e, model.prepare_adapter(each)[0]) for b, e, each in ranges]
    expected = model.logits(model.forward(token_ids, positions, plan, rows)).clone()
    without = model.logits(model.forward(token_ids, positions, plan))
    assert not ranges or not torch.allclose(expected, without, atol=1e-2)
    for (dtype, weights), tolerance in TOLERANCE.items():
        plain, plan = make_model(native_ops(dtype, level), spec, case, dtype)
        native = plain.attention.backend.fuse(plain, weights)  # type: ignore[arg-type]
        alone = native.logits(native.forward(token_ids, positions, plan)).clone()
        rows = [AdapterRows(b, e, native.prepare_adapter(each)[0]) for b, e, each in ranges]
        logits = native.logits(native.forward(token_ids, positions, plan, rows)).clone()
        assert (logits - expected).abs().max() <= tolerance, (dtype, weights)
        after = native.logits(native.forward(token_ids, positions, plan))
        assert torch.equal(after, alone), "a step without adapters after one with them"
