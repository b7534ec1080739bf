"""An engine with K/V in int8: cold and warm, forked, packed and restarted, and how many tokens its
pool holds."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from chunkllama.config import EngineConfig
from chunkllama.engine.pack_builder import PrefixPrompt, compute_chunks, plan_pack
from chunkllama.engine.size import plan_size
from chunkllama.errors import ConfigError
from chunkllama.messages import EngineRequest
from chunkllama.models.config import kv_bytes_per_chunk
from chunkllama.packs.file import Pack, write_pack
from chunkllama.sampling_params import SamplingParams

BACKENDS = ["reference", "cpu"]
# Of log-probabilities. Two orders of summation may round a value of K to neighbouring codes.
TOLERANCE = 0.02


def prompt_of(seed: int, count: int) -> list[int]:
    return np.random.default_rng(seed).integers(3, 300, count).tolist()


def answer(core, prompt: list[int], max_tokens: int = 6) -> tuple[list[int], np.ndarray, int]:
    """Greedy tokens, the log-probabilities of the five best at each, and the cached tokens."""
    sampling = SamplingParams(
        max_tokens=max_tokens, temperature=0.0, ignore_eos=True, seed=1, logprobs=5
    )
    core.add(EngineRequest(request_id="r", prompt_token_ids=prompt, sampling=sampling))
    tokens, best, cached = [], [], 0
    while core.has_work():
        for delta in core.step():
            assert delta.error is None, delta.error
            cached = delta.num_cached_tokens
            for choice in delta.choices:
                tokens += choice.token_ids
                best += [[value for _, value in entry.top] for entry in choice.logprobs or ()]
    assert core.stats().invariant_violations == 0
    return tokens, np.array(best), cached


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_hit_answers_like_a_cold_run(tiny_core, backend: str) -> None:
    """Hits that end inside a chunk, at its end, and behind decoded tokens."""
    core = tiny_core(num_chunks=32, kv_dtype="int8", backend=backend)
    text = prompt_of(1, 200)
    answer(core, text)
    for cut in (20, 63, 64, 65, 128, 199):
        prompt = [*text[:cut], *prompt_of(cut, 30)]
        cold_core = tiny_core(num_chunks=32, kv_dtype="int8", backend=backend)
        cold, cold_best, none = answer(cold_core, prompt)
        warm, warm_best, cached = answer(core, prompt)
        assert (none, cached) == (0, cut)
        assert warm == cold
        np.testing.assert_allclose(warm_best, cold_best, atol=TOLERANCE)
        further = [*prompt, *warm, 5, 6]
        again, again_best, cached = answer(core, further)
        assert cached >= len(prompt) + len(warm) - 1
        expected, expected_best, _ = answer(cold_core, further)
        assert again == expected
        np.testing.assert_allclose(again_best, expected_best, atol=TOLERANCE)


@pytest.mark.parametrize("backend", BACKENDS)
def test_int8_answers_nearly_like_float32(tiny_core, backend: str) -> None:
    exact = tiny_core(num_chunks=16, backend=backend)
    stored = tiny_core(num_chunks=16, kv_dtype="int8", backend=backend)
    (_, expected, _), (_, best, _) = (answer(c, prompt_of(2, 150), 1) for c in (exact, stored))
    assert 1e-4 < np.abs(best - expected).max() < 0.3


@pytest.mark.parametrize("backend", BACKENDS)
def test_choices_that_fork_inside_a_chunk_go_on_with_its_tokens(tiny_core, backend: str) -> None:
    core = tiny_core(num_chunks=32, kv_dtype="int8", backend=backend)
    prompt = prompt_of(3, 90)
    alone, _, _ = answer(core, prompt, 50)
    sampling = SamplingParams(max_tokens=50, temperature=0.0, ignore_eos=True, seed=1, n=3)
    core.add(EngineRequest(request_id="forked", prompt_token_ids=prompt, sampling=sampling))
    forked: dict[int, list[int]] = {0: [], 1: [], 2: []}
    while core.has_work():
        for choice in (choice for delta in core.step() for choice in delta.choices):
            forked[choice.index] += choice.token_ids
    assert forked == dict.fromkeys(range(3), alone)


def test_the_pool_holds_nearly_twice_the_tokens_of_bfloat16(demo_path, tiny_core) -> None:
    sizes = {
        kv_dtype: plan_size(
            EngineConfig.from_flat(
                model=str(demo_path), device="cpu", kv_cache_memory="64MiB", kv_dtype=kv_dtype
            ),
            demo_path,
        )
        for kv_dtype in ("auto", "int8")
    }
    assert sizes["int8"].kv_dtype == "int8"
    assert sizes["auto"].kv_dtype == sizes["int8"].dtype == "bfloat16"
    assert sizes["int8"].num_chunks >= 1.9 * sizes["auto"].num_chunks
    assert sizes["int8"].pool_bytes <= 64 << 20
    core = tiny_core(num_chunks=8, kv_dtype="int8", dtype="bfloat16")
    kv = core._executor.kv
    held = sum(layer.numel() * layer.itemsize for layer in kv.layers)
    assert held == 8 * kv_bytes_per_chunk(core._executor.spec, 64, "int8")
    assert (core.info.kv_dtype, core.info.is_kv_quantized) == ("int8", True)


def pack(core, path) -> list[int]:
    """Write a pack of one prompt; returns the prompt."""
    prompt = prompt_of(4, 200)
    planned, ordered = plan_pack([PrefixPrompt("p", "", prompt)], core.packs.io.identify(), "t")
    write_pack(path, planned, compute_chunks(core, planned, ordered))
    return prompt


def test_a_pack_of_one_backend_is_read_by_the_other(tiny_core, tmp_path) -> None:
    cores = {
        name: tiny_core(num_chunks=16, kv_dtype="int8", backend=name, dtype="float32")
        for name in BACKENDS
    }
    for source, target in (BACKENDS, BACKENDS[::-1]):
        path = tmp_path / f"{source}.ckpack"
        prompt = pack(cores[source], path)
        io = cores[target].packs.io
        with Pack(path) as opened:
            assert opened.document.model.dtype == "int8"
            assert io.refusal(opened, "t", b"") == ""
            data = opened.read_chunk(0)
            assert len(data) == io.chunk_bytes
            assert bytes(io.restore(io.arrange(data, opened.document.model))) == bytes(data)
            ids = cores[target].packs.cache.pool.allocate(1)
            assert io.compare(prompt[:64], ids, data) < 0.01
            cores[target].packs.cache.pool.free(ids[0])


def test_a_pack_of_another_dtype_is_refused_by_name(tiny_core, tmp_path) -> None:
    settings = {
        "float32": {},
        "int8 of float32": {"kv_dtype": "int8"},
        "int8 of bfloat16": {"kv_dtype": "int8", "dtype": "bfloat16"},
    }
    cores = {name: tiny_core(num_chunks=16, **given) for name, given in settings.items()}
    found = {}
    for name, core in cores.items():
        path = tmp_path / f"{name}.ckpack"
        pack(core, path)
        with Pack(path) as opened:
            found |= {(name, n): c.packs.io.refusal(opened, "t", b"") for n, c in cores.items()}
    names = list(settings)
    assert [found[name, name] for name in names] == [""] * 3
    assert found[names[0], names[1]] == "it has dtype float32, this server has int8"
    assert found[names[1], names[0]] == "it has dtype int8, this server has float32"
    assert found[names[1], names[2]] == (
        "it has K/V of a model in float32, this server computes in bfloat16"
    )


def test_a_gpu_refuses_int8_in_one_line() -> None:
    from chunkllama.backends.choice import check_choice

    with pytest.raises(ConfigError, match=r"^kv_dtype: int8 .* device cuda; use auto$"):
        check_choice(device="cuda", backend="auto", isa_level="auto", kv_dtype="int8")


def test_an_unknown_storage_is_refused_in_one_line() -> None:
    with pytest.raises(ConfigError, match=r"^kv_dtype: .*'auto' or 'int8'.*fp8"):
        EngineConfig.from_flat(kv_dtype="fp8")


@pytest.mark.parametrize("chunk_size", [16, 128])
def test_the_reference_stores_any_chunk_size(tiny_core, chunk_size: int) -> None:
    core = tiny_core(num_chunks=64, kv_dtype="int8", chunk_size=chunk_size, backend="reference")
    first, _, _ = answer(core, prompt_of(6, 150))
    again, _, cached = answer(core, prompt_of(6, 150))
    assert again == first and cached == 149


def test_weights_in_int8_and_a_plain_model_use_the_same_pool(tiny_core) -> None:
    """Quantized weights change the numbers of the model, not those of its pool."""
    core = tiny_core(
        num_chunks=16, kv_dtype="int8", dtype="bfloat16", quantization="int8", backend="cpu"
    )
    first, best, _ = answer(core, prompt_of(7, 100))
    again, again_best, cached = answer(core, prompt_of(7, 100))
    assert (again, cached) == (first, 99)
    np.testing.assert_allclose(again_best, best, atol=0.1)
    assert core._executor.kv.layers[0].dtype == torch.int8
