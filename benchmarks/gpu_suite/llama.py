"""Compare the logits of a seeded random Llama on two backends along one token sequence."""

from __future__ import annotations

from dataclasses import dataclass, fields

import numpy as np
import torch

from chunkllama.attention.plan import Planner
from chunkllama.backends.base import Backend
from chunkllama.backends.model import LayerWeights, Linear, ModelWeights
from chunkllama.model_spec import ModelSpec
from chunkllama.models.attention import Attention
from chunkllama.models.llama import Llama
from chunkllama.models.loading.weights import random_weights as seeded_weights
from chunkllama.models.rotary import rotary_tables

CHUNK = 64
# Largest difference of a logit (their standard deviation is LOGIT_SCALE) between a bfloat16 or
# float16 model and the float32 reference over the same rounded weights.
LOGIT_TOLERANCE = {torch.bfloat16: 0.25, torch.float16: 0.04}
LOGIT_SCALE = 3.0


@dataclass(frozen=True)
class Slice:
    """Implement ``models.attention.PlannedSlice``."""

    slot: int
    first_position: int
    num_tokens: int
    chunk_ids: np.ndarray
    shared: int


@dataclass(frozen=True)
class PlannedStep:
    """Implement ``models.attention.PlannedStep``, with the tokens of its rows."""

    slices: list[Slice]
    plan_version: int
    tokens: list[int]


def random_spec(head_dim: int = 64, num_qo_heads: int = 6, num_kv_heads: int = 2) -> ModelSpec:
    return ModelSpec(
        num_layers=3,
        hidden_size=256,
        intermediate_size=512,
        num_qo_heads=num_qo_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        vocab_size=500,
        max_position=512,
    )


def random_weights(spec: ModelSpec, dtype: torch.dtype, seed: int = 0) -> ModelWeights:
    """Return weights on the CPU that keep activations near 1 and logits near LOGIT_SCALE."""
    weights = seeded_weights(spec, seed, dtype)
    weights.embedding.mul_(spec.hidden_size**0.5)
    weights.lm_head.weight.mul_(LOGIT_SCALE)
    return weights


def moved(
    weights: ModelWeights, spec: ModelSpec, device: torch.device, dtype: torch.dtype
) -> ModelWeights:
    """Return the weights on a device; norms with an offset stay float32, as when loaded."""
    norm_dtype = torch.float32 if spec.norm_offset else dtype

    def move(x: torch.Tensor | Linear | None) -> torch.Tensor | Linear | None:
        if isinstance(x, Linear):
            bias = None if x.bias is None else x.bias.to(device=device, dtype=dtype)
            return Linear(x.weight.to(device=device, dtype=dtype), bias)
        return None if x is None else x.to(device=device, dtype=norm_dtype)

    layers = [
        LayerWeights(**{item.name: move(getattr(layer, item.name)) for item in fields(layer)})
        for layer in weights.layers
    ]
    embedding = weights.embedding.to(device=device, dtype=dtype)
    return ModelWeights(embedding, layers, move(weights.norm), move(weights.lm_head))


class ForcedLlama:
    """The model on one backend; ``step`` returns the logits of each slice's last row."""

    def __init__(
        self, ops: Backend, spec: ModelSpec, weights: ModelWeights, dtype: torch.dtype
    ) -> None:
        packing = ops.packing(
            num_qo_heads=spec.num_qo_heads,
            num_kv_heads=spec.num_kv_heads,
            head_dim=spec.head_dim,
        )
        kv = ops.allocate_kv(
            num_layers=spec.num_layers,
            num_chunks=64,
            chunk_size=CHUNK,
            num_kv_heads=spec.num_kv_heads,
            head_dim=spec.head_dim,
            dtype=dtype,
        )
        for layer in kv.layers:
            layer.fill_(float("nan"))
        planner = Planner(packing, CHUNK)
        self.device = ops.device
        self.backend = Attention(
            *(ops, kv, planner, spec.num_qo_heads, spec.score_scale, spec.attention_softcap),
            [layer.window for layer in spec.layers],
        )
        rotary = tuple(t.to(ops.device) for t in rotary_tables(spec, spec.max_position))
        self.model = Llama(spec, moved(weights, spec, ops.device, dtype), self.backend, rotary)

    def step(self, step: PlannedStep) -> torch.Tensor:
        positions = np.concatenate(
            [np.arange(s.first_position, s.first_position + s.num_tokens) for s in step.slices]
        ).astype(np.int32)
        hidden = self.model.forward(
            torch.tensor(step.tokens, device=self.device),
            torch.from_numpy(positions).to(self.device),
            self.backend.plan(step),
        )
        last = np.cumsum([s.num_tokens for s in step.slices]) - 1
        return self.model.logits(hidden[torch.from_numpy(last).to(self.device)]).cpu()


def conversation_steps(
    reference: ForcedLlama, vocab_size: int, decode_steps: int
) -> tuple[list[PlannedStep], list[torch.Tensor]]:
    """Decode greedily on the reference: one prefix, three prompts that continue it.

    Returns the steps (with the reference's tokens) and the reference's logits of each.
    """
    rng = np.random.default_rng(1)
    prefix, tails = 130, (1, 70, 33)  # two whole chunks are shared
    tokens = rng.integers(0, vocab_size, prefix + 200).tolist()
    paths = [np.array([7, 3, 10 + 4 * i, 11 + 4 * i, 12 + 4 * i], np.int32) for i in range(3)]
    whole = prefix // CHUNK * CHUNK
    steps = [PlannedStep([Slice(0, 0, whole, paths[0], 0)], 0, tokens[:whole])]
    slices, step_tokens = [], []
    for i, tail in enumerate(tails):
        count = prefix - whole + tail
        slices.append(Slice(i, whole, count, paths[i], 2 if i else 0))
        step_tokens += tokens[whole:prefix] + tokens[prefix + i : prefix + i + tail]
    steps.append(PlannedStep(slices, 0, step_tokens))
    logits = [reference.step(step) for step in steps]
    for n in range(decode_steps):
        slices = [
            Slice(i, prefix + tail + n, 1, paths[i], 2 if i else 0) for i, tail in enumerate(tails)
        ]
        steps.append(PlannedStep(slices, 1, logits[-1].argmax(-1).tolist()))
        logits.append(reference.step(steps[-1]))
    return steps, logits


def compare_with_reference(
    ops: Backend,
    reference_ops: Backend,
    spec: ModelSpec,
    dtype: torch.dtype,
    decode_steps: int = 40,
    reference_spec: ModelSpec | None = None,
) -> dict[str, float]:
    """Force the reference's greedy tokens through ``ops``; raise AssertionError where the logits
    leave the tolerance, or the top token differs though its lead is above twice the tolerance.

    ``reference_spec`` differs from ``spec`` where a test plants a fault.
    """
    weights = random_weights(spec, dtype)
    reference = ForcedLlama(reference_ops, reference_spec or spec, weights, torch.float32)
    steps, expected = conversation_steps(reference, spec.vocab_size, decode_steps)
    forced = ForcedLlama(ops, spec, weights, dtype)
    tolerance, worst, decided = LOGIT_TOLERANCE[dtype], 0.0, 0
    for step, want in zip(steps, expected, strict=True):
        got = forced.step(step)
        worst = max(worst, float((got - want).abs().max()))
        top = want.topk(2).values
        clear = top[:, 0] - top[:, 1] > 2 * tolerance
        same = got.argmax(-1) == want.argmax(-1)
        assert bool(same[clear].all()), f"a clear top token differs at {step.slices}"
        decided += int(clear.sum())
    assert worst <= tolerance, f"logits differ by {worst:.3f}, tolerance {tolerance}"
    answers = sum(len(want) for want in expected)
    return {"logit_error": worst, "answers": answers, "clear_answers": decided}
