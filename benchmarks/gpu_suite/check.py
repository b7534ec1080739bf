"""Implement `check`: compare the kernels on a GPU with the emulator's vectors, float64 and the
reference ops.

In order of value: the device layer, the numeric suite, captured launches, the model, the sanitizer.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gpu_suite.device import DTYPES, Device
from gpu_suite.llama import compare_with_reference, random_spec
from gpu_suite.points import Point, Record
from gpu_suite.workload import Step, Workload

from chunkllama.attention.plan import Planner
from chunkllama.backends.cuda.backend import CudaBackend
from chunkllama.backends.cuda.source import DTYPES as DTYPE_NAMES
from chunkllama.backends.cuda.source import HEAD_DIMS, PARAMS, conformance_kernel
from chunkllama.backends.draws import Draw
from chunkllama.backends.reference.backend import ReferenceBackend
from chunkllama.resources import data_folder

TOLERANCE = {"bf16": 2e-3, "fp16": 5e-4}
_ROUNDING = {"bf16": 2**-7, "fp16": 2**-10}
# Words of kernels/cuda/conformance.cuh that are results of arithmetic.
_COMPUTED_WORDS = [*range(12, 20), 27, 28, 29]


def check_points(device: Device) -> list[Point]:
    points = [_conformance(device, dtype) for dtype in DTYPE_NAMES]
    points += [_attention(device, d, t) for d in (128, *HEAD_DIMS[:2], 256) for t in DTYPE_NAMES]
    points += [_bounded(device, head_dim, t) for head_dim in HEAD_DIMS for t in DTYPE_NAMES]
    points += [_small_ops(device, dtype) for dtype in DTYPE_NAMES]
    points.append(_draws(device))
    points += [_replay(device)]
    points += [_model(device, head_dim, t) for head_dim in (64, 128) for t in DTYPE_NAMES]
    return [*points, *(_sanitizer(device, tool) for tool in ("memcheck", "racecheck", "synccheck"))]


def _conformance(device: Device, dtype: str) -> Point:
    def run() -> Record:
        stored = json.loads((data_folder("kernels") / "emulation" / "conformance.json").read_text())
        vectors = stored[dtype]
        place = {"device": device.torch_device}
        elements = torch.from_numpy(np.array(vectors["elements"], np.uint16).view(np.int16))
        elements = elements.to(**place)
        numbers = torch.tensor(vectors["numbers"], dtype=torch.float32, **place)
        results = torch.zeros(32, 32, dtype=torch.int32, **place)
        params = PARAMS["ConformanceParams"].call.pack(
            elements.data_ptr(), numbers.data_ptr(), results.data_ptr()
        )
        device.launcher.launch(conformance_kernel(dtype), (1, 1, 1), params)
        expected = np.array(vectors["results"], np.uint32)
        if device.dry:
            return {"words": expected.size}
        got = results.cpu().numpy().view(np.uint32)
        moved = [word for word in range(32) if word not in _COMPUTED_WORDS]
        wrong = np.argwhere(got[:, moved] != expected[:, moved])
        assert not len(wrong), f"lane, word: {[(a, moved[b]) for a, b in wrong.tolist()][:8]}"
        values = [x[:, _COMPUTED_WORDS].copy().view(np.float32) for x in (got, expected)]
        np.testing.assert_allclose(*values, rtol=1e-5, atol=1e-5)
        return {"words": expected.size}

    return Point(f"device layer {dtype}", run)


def _cases(head_dim: int, dtype: str) -> list[Workload]:
    shapes = [(1, 0, 700), (5, 0, 100), (9, 320, 37), (40, 192, 1), (300, 64, 70), (33, 1024, 0)]
    groups = [(1, 2), (3, 2), (4, 1), (8, 2), (12, 1), (71, 1)]
    return [
        Workload(
            rows,
            shared,
            private,
            num_qo_heads=group * kv_heads,
            num_kv_heads=kv_heads,
            head_dim=head_dim,
            dtype=dtype,
        )
        for (rows, shared, private), (group, kv_heads) in zip(shapes, groups, strict=True)
    ]


def _attention(device: Device, head_dim: int, dtype: str) -> Point:
    """Compare decode steps and causal slices with float64."""

    def run() -> Record:
        torch.manual_seed(0)
        errors = {}
        for workload in _cases(head_dim, dtype):
            step = Step(workload, device, 1)
            _scale_values(step)
            _poison_ends(step)
            errors[workload.name] = _error(step, step.attend(step.upload(), 0))
        for prefix, new in ((0, 200), (100, 1), (130, 90)):
            errors[f"causal {prefix} + {new}"] = _causal_error(
                device,
                replace(_cases(head_dim, dtype)[3], rows=1, shared=0, private=prefix + new),
                new,
            )
        worst = max(errors.values())
        assert device.dry or worst <= TOLERANCE[dtype], errors
        return {"cases": len(errors), "largest_error": worst}

    return Point(f"attention {head_dim} {dtype}", run)


def _bounded(device: Device, head_dim: int, dtype: str) -> Point:
    """Compare slices seen through windows, with soft caps, and both, with float64."""

    def run() -> Record:
        torch.manual_seed(0)
        workload = replace(_cases(head_dim, dtype)[3], rows=1, shared=0, private=220)
        errors = {
            f"{new} rows, window {window}, cap {softcap}": _causal_error(
                device, workload, new, window, softcap
            )
            for new in (1, 90)
            for window, softcap in ((40, None), (None, 2.0), (100, 2.0))
        }
        assert device.dry or max(errors.values()) <= TOLERANCE[dtype], errors
        return {"cases": len(errors), "largest_error": max(errors.values())}

    return Point(f"windows, soft caps {head_dim} {dtype}", run)


def _scale_values(step: Step) -> None:
    """Scale V below 1/2, so that rounding an output uses less than half the tolerance."""
    step.kv.layers[0][:, 1].uniform_(-0.5, 0.5)


def _poison_ends(step: Step) -> None:
    """Write NaN after every sequence's end."""
    used = (step.workload.private - 1) % 64 + 1
    if step.workload.private and used < 64:
        last = torch.tensor([int(row[-1]) for row in step.workload.chunk_ids])
        step.kv.layers[0][last.to(step.device.torch_device), :, :, used:] = float("nan")


def _error(step: Step, out: torch.Tensor) -> float:
    if step.device.dry:
        return 0.0
    w = step.workload
    keys, values = (x.double() for x in step.contiguous())
    q = step.q.double().view(w.rows, w.num_kv_heads, -1, w.head_dim)
    weights = torch.softmax(q @ keys.transpose(-1, -2) * w.scale, -1)
    return float((out.view(q.shape).double() - weights @ values).abs().max())


def _causal_slice(
    step: Step, new: int, window: int | None = None, softcap: float | None = None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """One slice of ``new`` rows at the end of a context: queries, positions, our output."""
    ops, w, device = step.ops, step.workload, step.device
    first = w.context - new
    packing = ops.packing(
        num_qo_heads=w.num_qo_heads, num_kv_heads=w.num_kv_heads, head_dim=w.head_dim
    )
    plan = Planner(packing, 64).build([first], [new], w.chunk_ids, [0], 0, window=window)
    q = torch.empty(
        new, w.num_qo_heads, w.head_dim, dtype=DTYPES[w.dtype], device=device.torch_device
    ).normal_()
    positions = torch.arange(first, w.context, dtype=torch.int32, device=device.torch_device)
    device_plan = ops.upload_plan(plan, step.kv, num_qo_heads=w.num_qo_heads)
    out = ops.tpp_attention(q, step.kv, 0, positions, device_plan, w.scale, softcap)
    return q, positions, out


def _causal_error(
    device: Device,
    w: Workload,
    new: int,
    window: int | None = None,
    softcap: float | None = None,
) -> float:
    step = Step(w, device, 1)
    _scale_values(step)
    q, positions, out = _causal_slice(step, new, window, softcap)
    if device.dry:
        return 0.0
    keys, values = (x.double()[0] for x in step.contiguous())  # [Hkv, context, D]
    rows = q.double().view(new, w.num_kv_heads, -1, w.head_dim).permute(1, 2, 0, 3)
    scores = rows @ keys.unsqueeze(1).transpose(-1, -2) * w.scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    distance = positions.unsqueeze(1) - torch.arange(w.context, device=device.torch_device)
    hidden = (distance < 0) | (distance >= (window or w.context))
    weights = torch.softmax(scores.masked_fill(hidden, -torch.inf), -1)
    expected = (weights @ values.unsqueeze(1)).permute(2, 0, 1, 3).reshape(q.shape)
    return float((out.view(q.shape).double() - expected).abs().max())


def _small_ops(device: Device, dtype: str) -> Point:
    """Compare append, norm, gate and copies with the torch reference on the same device."""

    def run() -> Record:
        torch.manual_seed(0)
        for head_dim in HEAD_DIMS:
            _check_append_and_copies(device, head_dim, dtype)
        ops, reference = device.ops(64, 2, dtype), ReferenceBackend(device.torch_device)
        for size in (8, 576, 4096, 11008):
            place = {"dtype": DTYPES[dtype], "device": device.torch_device}
            x, residual = torch.empty(2, 17, size, **place).normal_()
            weight = torch.empty(size, **place).normal_()
            want = reference.rms_norm(x, weight, 1e-5, residual)
            for got, expected in zip(
                ops.rms_norm(x.clone(), weight, 1e-5, residual.clone()), want, strict=True
            ):
                _assert_close(device, got, expected, dtype)
            gate_up = torch.empty(17, 2 * size, **place).normal_()
            _assert_close(device, ops.silu_and_mul(gate_up), reference.silu_and_mul(gate_up), dtype)
        return {"head_dims": len(HEAD_DIMS)}

    return Point(f"append, copies, norm, gate {dtype}", run)


def _draws(device: Device) -> Point:
    """Compare draws of tokens with the op in torch, but where two of them nearly tie."""

    def run() -> Record:
        torch.manual_seed(0)
        ops, reference = device.ops(64, 2, "bf16"), ReferenceBackend(device.torch_device)
        kinds: tuple[dict[str, Any], ...] = ({}, {"top_k": 50}, {"top_p": 0.9}, {"min_p": 0.02})
        counts = {"draws": 0, "other_tokens": 0}
        for vocab_size in (1, 5_000, 49_152):
            logits = torch.empty(16, vocab_size, device=device.torch_device).normal_(std=3.0)
            draws = [Draw(row, row, 0, row, 0.8, **kinds[row % 4]) for row in range(16)]
            got = ops.draw(logits.clone(), draws)
            if not device.dry:  # the reference needs data
                counts["draws"] += len(draws)
                counts["other_tokens"] += int((got != reference.draw(logits, draws)).sum())
        assert counts["other_tokens"] <= 1, counts
        return dict(counts)

    return Point("draws of tokens", run)


def _check_append_and_copies(device: Device, head_dim: int, dtype: str) -> None:
    workload = Workload(9, 128, 70, num_qo_heads=6, num_kv_heads=2, head_dim=head_dim, dtype=dtype)
    step = Step(workload, device, 2)
    if device.dry:  # the reference needs data
        step.upload()
        return
    ops, reference = step.ops, ReferenceBackend(device.torch_device)
    expected = replace(step.kv, layers=[layer.clone() for layer in step.kv.layers])
    got = step.append(step.upload(), 1)
    want = reference.rope_append(
        *(step.qkv, step.positions, step.cos_sin, expected, 1),
        reference.upload_plan(workload.plan(ops), expected, num_qo_heads=6),
    )
    _assert_close(device, got, want, dtype)
    triples = [(0, 1, 64), (2, 3, 1), (1, 4, 33), (4, 2, 5)]
    ops.copy_chunks(step.kv, triples)
    reference.copy_chunks(expected, triples)
    for layer, want_layer in zip(step.kv.layers, expected.layers, strict=True):
        _assert_close(device, layer, want_layer, dtype)


def _assert_close(device: Device, got: torch.Tensor, want: torch.Tensor, dtype: str) -> None:
    assert got.shape == want.shape
    if not device.dry:
        tolerance = _ROUNDING[dtype]
        torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance / 8)


def _replay(device: Device) -> Point:
    """Check that a captured graph computes any plan of its capacity in the buffer."""

    def run() -> Record:
        torch.manual_seed(0)
        base = Workload(24, 512, 100, num_qo_heads=8, num_kv_heads=2)
        step = Step(base, device, 1)
        _scale_values(step)
        capacity = replace(base.plan(step.ops).capacity, items=512, slots=2048, chunk_ids=4096)
        others = [replace(base, private=private) for private in (100, 1, 64, 90)]
        plans = [_plan_of_capacity(other, step.ops, capacity) for other in others]
        plan = step.ops.upload_plan(plans[0], step.kv, num_qo_heads=8, replayable=True)
        if device.dry:
            step.attend(plan, 0)
            return {"plans": len(plans)}
        step.attend(plan, 0)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = step.attend(plan, 0)
        errors = []
        for other, host in zip(others, plans, strict=True):
            plan.buffer.copy_(torch.from_numpy(host.buffer))
            step.positions.fill_(other.context - 1)
            graph.replay()
            torch.cuda.synchronize()
            seen = Step(other, device, 1)
            seen.__dict__.update(kv=step.kv, q=step.q)
            errors.append(_error(seen, out))
        assert max(errors) <= TOLERANCE["bf16"], errors
        return {"plans": len(plans), "largest_error": max(errors)}

    return Point("captured launches follow the plan", run)


def _plan_of_capacity(workload: Workload, ops: CudaBackend, capacity):  # type: ignore[no-untyped-def]
    packing = ops.packing(num_qo_heads=8, num_kv_heads=2, head_dim=128)
    count = workload.rows
    return Planner(packing, 64).build(
        [workload.context - 1] * count,
        [1] * count,
        workload.chunk_ids,
        [0] + [workload.shared_chunks] * (count - 1),
        0,
        capacity,
    )


def _model(device: Device, head_dim: int, dtype: str) -> Point:
    def run() -> Record:
        spec, cpu = random_spec(head_dim), ReferenceBackend(torch.device("cpu"))
        if device.dry:
            return compare_with_reference(cpu, cpu, spec, torch.bfloat16, decode_steps=2)
        ops = device.ops(head_dim, spec.num_kv_heads, dtype)
        return dict(compare_with_reference(ops, cpu, spec, DTYPES[dtype]))

    return Point(f"greedy answers {head_dim} {dtype}", run)


def _sanitizer(device: Device, tool: str) -> Point:
    def run() -> Record:
        binary = shutil.which("compute-sanitizer")
        if binary is None or device.dry:
            return {"skipped": "compute-sanitizer is not on the path"}
        entry = Path(__file__).parents[1] / "gpu.py"
        command = [binary, "--tool", tool, "--error-exitcode", "9", sys.executable, str(entry)]
        # One allocation per tensor, so that an access past its end is invalid.
        environment = dict(os.environ, PYTORCH_NO_CUDA_MEMORY_CACHING="1")
        process = subprocess.run(
            [*command, "sanitized"], env=environment, capture_output=True, text=True, check=False
        )
        output = process.stdout + process.stderr
        if "Device not supported" in output:
            return {"skipped": "compute-sanitizer does not support this machine"}
        assert process.returncode == 0, output[-2000:]
        return {"tool": tool, "findings": 0}

    return Point(f"compute-sanitizer {tool}", run)


def run_small_cases(device: Device) -> None:
    """Run every kernel on small inputs, for the sanitizers."""
    for workload in (Workload(5, 128, 37, 4, 2, 64), Workload(20, 128, 3, 4, 2, 128)):
        step = Step(workload, device, 1)
        plan = step.upload()
        step.append(plan, 0)
        step.attend(plan, 0)
        step.ops.rms_norm(step.qkv.clone(), step.qkv[0], 1e-5, step.qkv.clone())
        step.ops.silu_and_mul(step.qkv)
        step.ops.copy_chunks(step.kv, [(0, 1, 64), (1, 2, 5)])
    logits = torch.zeros(2, 300, device=device.torch_device)
    step.ops.draw(logits, [Draw(row, 0, 0, row, 1.0, 9 * row, 0.5) for row in range(2)])
    _causal_slice(Step(Workload(1, 0, 150, 4, 2, 64), device, 1), 80)


def check_rows(records: list[Record]) -> list[Record]:
    """Print the short table: one line per point."""
    return [
        {
            "check": record["point"],
            "": "FAILED" if "error" in record else "ok",
            "detail": record.get("error") or record["result"],
        }
        for record in records
    ]
