"""Steps of the executor on fake CUDA tensors: no mixed devices, and the host's waits.

The tensors have a device, a dtype and a shape, but no data; kernels are checked, not run. What
needs CUDA's own C++ (indexing, bool(), tolist()) is replaced by arithmetic of shapes that insists
on equal devices.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from gpu_suite.device import DryLauncher
from gpu_suite.llama import random_spec
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from chunkllama.attention.plan import Planner
from chunkllama.backends.cuda.backend import CudaBackend
from chunkllama.engine.load import build_model
from chunkllama.engine.model_runner import ModelRunner
from chunkllama.engine.step_model import StepModel
from chunkllama.engine.step_sampler import StepSampler
from chunkllama.models.attention import Attention
from chunkllama.models.loading.weights import random_weights
from chunkllama.sampling_params import SamplingParams
from chunkllama.scheduler.output import NewSequence, ScheduledSlice, SchedulerOutput

DEVICE = torch.device("cuda:0")
SPEC = random_spec(128)
aten = torch.ops.aten


class FakeCudaBackend(CudaBackend):
    def upload(self, array: np.ndarray) -> torch.Tensor:  # without pinned memory
        return torch.empty(array.shape, dtype=torch.from_numpy(array).dtype, device=DEVICE)


class Waits:
    """Counts what the host reads of the device, or copies to it from memory that is not pinned."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.count = 0

        def waiting(value: Any) -> Any:
            def read(tensor: torch.Tensor) -> Any:
                self.count += tensor.device.type == "cuda"
                return value(tensor)

            return read

        def as_list(tensor: torch.Tensor) -> Any:
            kind = {torch.bool: bool}.get(tensor.dtype, int)
            kind = float if tensor.dtype.is_floating_point else kind
            return np.full(tuple(tensor.shape), kind(kind is bool)).tolist()

        real_to, real_tensor = torch.Tensor.to, torch.tensor

        def to(tensor: torch.Tensor, *args: Any, **named: Any) -> torch.Tensor:
            moved = real_to(tensor, *args, **named)
            self.count += moved.device.type == "cuda" and tensor.device.type == "cpu"
            return moved

        def make(*args: Any, **named: Any) -> torch.Tensor:
            self.count += str(named.get("device", "")).startswith("cuda")
            return real_tensor(*args, **named)

        def cpu(tensor: torch.Tensor) -> torch.Tensor:
            self.count += 1
            return torch.zeros(tensor.shape, dtype=tensor.dtype)

        replaced = {
            "tolist": waiting(as_list),
            "__bool__": waiting(lambda _: False),
            "item": waiting(lambda _: 0),
            "cpu": cpu,
            "__getitem__": lambda tensor, index: self._get(tensor, index),
            "__setitem__": lambda tensor, index, value: self._put(tensor, index, value),
            "__invert__": lambda tensor: aten.bitwise_not(tensor),
            "data_ptr": lambda _: 1 << 20,
        }
        for name, function in replaced.items():
            monkeypatch.setattr(FakeTensor, name, function, raising=False)
        monkeypatch.setattr(torch.Tensor, "to", to)
        monkeypatch.setattr(torch, "tensor", make)

    def _get(self, tensor: torch.Tensor, index: Any) -> torch.Tensor:
        index = index if isinstance(index, tuple) else (index,)
        if any(isinstance(i, torch.Tensor) for i in index):
            if any(isinstance(i, torch.Tensor) and i.dtype == torch.bool for i in index):
                self.count += 1  # how many are true
                return aten.slice(tensor, 0, 0, 1)
            shape = _indexed_shape(tensor, index)
            return torch.empty(shape, dtype=tensor.dtype, device=tensor.device)
        out, dim = tensor, 0
        for i in index:
            if i is None:
                out, dim = aten.unsqueeze(out, dim), dim + 1
            elif isinstance(i, slice):
                out, dim = aten.slice(out, dim, i.start, i.stop, i.step or 1), dim + 1
            else:
                out = aten.select(out, dim, int(i))
        return out

    def _put(self, tensor: torch.Tensor, index: Any, value: Any) -> None:
        index = index if isinstance(index, tuple) else (index,)
        if isinstance(value, torch.Tensor):
            assert value.device == tensor.device or value.numel() == 1, "a value of another device"
        if not any(isinstance(i, torch.Tensor) for i in index):
            out = self._get(tensor, index)
            out.copy_(value) if isinstance(value, torch.Tensor) else out.fill_(value)
        elif any(isinstance(i, torch.Tensor) and i.dtype == torch.bool for i in index):
            self.count += 1
        else:
            _indexed_shape(tensor, index)


def _indexed_shape(tensor: torch.Tensor, index: tuple[Any, ...]) -> tuple[int, ...]:
    parts = [
        torch.empty((), dtype=torch.int64, device=tensor.device) if isinstance(i, int) else i
        for i in index
    ]
    for part in parts:
        same = not isinstance(part, torch.Tensor) or part.device == tensor.device
        assert same or part.numel() <= 1, "an index of another device"
    if all(isinstance(part, torch.Tensor) for part in parts):
        shape = np.broadcast_shapes(*(tuple(part.shape) for part in parts))
        return (*shape, *tensor.shape[len(parts) :])
    first = next(k for k, part in enumerate(parts) if isinstance(part, torch.Tensor))
    return (*tensor.shape[:first], *parts[first].shape, *tensor.shape[first + 1 :])


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> Iterator[Waits]:
    with FakeTensorMode(allow_non_fake_inputs=True):
        yield Waits(monkeypatch)


def make_runner() -> ModelRunner:
    heads, dim = SPEC.num_kv_heads, SPEC.head_dim
    ops = FakeCudaBackend(
        DEVICE, dtype=torch.bfloat16, head_dim=dim, num_kv_heads=heads, launcher=DryLauncher()
    )
    kv = ops.allocate_kv(
        num_layers=SPEC.num_layers,
        num_chunks=64,
        chunk_size=64,
        num_kv_heads=heads,
        head_dim=dim,
        dtype=torch.bfloat16,
    )
    packing = ops.packing(num_qo_heads=SPEC.num_qo_heads, num_kv_heads=heads, head_dim=dim)
    attention = Attention(ops, kv, Planner(packing, 64), SPEC.num_qo_heads, dim**-0.5)
    weights = random_weights(SPEC, 0, torch.bfloat16, DEVICE)
    model = build_model(SPEC, weights, attention, max_model_len=512)
    return ModelRunner(StepModel(SPEC, model, attention))


SAMPLED = {"temperature": 0.8}
# Arguments of ``step_of``, and how often the host may wait.
STEPS: dict[str, tuple[dict[str, Any], int]] = {
    "greedy, prompts and decode": ({"tokens": (70, 1, 33)}, 1),
    "greedy decode": ({}, 1),
    "pooling": ({"tokens": (70, 40, 33), "pooling": "mean"}, 6),
    "copies": ({"copies": [(0, 5, 3), (5, 6, 3)]}, 1),
    "guesses": ({"tokens": (3, 1, 4), "drafts": (2, 0, 3)}, 1),
    "sampling": ({"sampling": SAMPLED}, 1),
    "sampling, prompts and decode": ({"sampling": SAMPLED, "tokens": (70, 1, 33)}, 1),
    "sampling, guesses": ({"sampling": SAMPLED, "tokens": (3, 1, 4), "drafts": (2, 0, 3)}, 1),
    "top-k and top-p": ({"sampling": {**SAMPLED, "top_k": 40, "top_p": 0.9}}, 1),
    "min-p": ({"sampling": {**SAMPLED, "min_p": 0.1}}, 1),
    "penalties": ({"sampling": {**SAMPLED, "repetition_penalty": 1.2, "presence_penalty": 1.0}}, 1),
    "bias and bans": (
        {"sampling": {"logit_bias": {4: 2.0}, "min_tokens": 9, "bad_words_token_ids": ((4,),)}},
        1,
    ),
    "allowed tokens": ({"sampling": {**SAMPLED, "allowed_token_ids": (3, 4, 5)}}, 1),
    "greedy beside sampling": ({"others": SAMPLED}, 1),
    "sampling beside top-p": ({"sampling": SAMPLED, "others": {**SAMPLED, "top_p": 0.5}}, 1),
    "a grammar's mask": ({"sampling": SAMPLED, "masked": True}, 1),
    "log-probabilities": ({"sampling": {"logprobs": 5}}, 2),
    "log-probabilities of some": ({"others": {**SAMPLED, "logprobs": 0}}, 2),
    "beams": ({"sampling": {"beam_width": 2, "n": 2}}, 4),  # one for each row
}


def step_of(
    tokens: tuple[int, ...] = (1, 1, 1),
    pooling: Any = "",
    copies: Any = (),
    drafts: tuple[int, ...] = (0, 0, 0),
    sampling: dict[str, Any] | None = None,
    others: dict[str, Any] | None = None,
) -> SchedulerOutput:
    """A step of sequences that sample by ``sampling``, all but the first by ``others`` if given."""
    slices = [
        ScheduledSlice(
            slot=slot,
            first_position=64 if count > 1 else 200,
            token_ids=np.arange(count, dtype=np.int32),
            chunk_ids=np.arange(1 + 8 * slot, 9 + 8 * slot, dtype=np.int32),
            shared=0,
            samples=not pooling,
            num_drafts=drafts[slot],
        )
        for slot, count in enumerate(tokens)
    ]
    ids = np.arange(300, dtype=np.int32)
    asked = [sampling or {}] + [others or sampling or {}] * (len(tokens) - 1)
    new = [
        NewSequence(
            i,
            str(i),
            0,
            SamplingParams(**{"seed": 1, "temperature": 0.0, **each}),
            ids,
            ids[:2],
            pooling,
        )
        for i, each in enumerate(asked)
    ]
    version = 1 if max(tokens) == 1 else 0
    return SchedulerOutput(1, slices, version, new, [], list(copies))


def masked_begin(sampler: StepSampler, output: SchedulerOutput) -> None:
    """``StepSampler.begin`` where the masks of all rows are there."""
    real_begin(sampler, output)
    for state in sampler._sequences.values():
        state.mask = np.full(-(-SPEC.vocab_size // 32), -1, np.int32)


real_begin = StepSampler.begin


@pytest.mark.parametrize("name", STEPS)
def test_a_step_on_fake_cuda(name: str, waits: Waits, monkeypatch: pytest.MonkeyPatch) -> None:
    options, most = STEPS[name]
    options = dict(options)
    runner = make_runner()
    if options.pop("masked", False):
        monkeypatch.setattr(StepSampler, "begin", masked_begin)
    waits.count = 0
    sampled = runner.execute(step_of(**options))
    assert not sampled.failed
    assert waits.count <= most, waits.count
    runner.close()
