"""Chunks in memory, in few bits: rounded once, widened for all that share them, and counted."""

from __future__ import annotations

import errno
import os
import random
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from moved_chunks import settle

from chunkllama.backends.kivi import KiviCodec
from chunkllama.cache.node import Node, encode_tokens
from chunkllama.cache.tier_entry import ReadPrice
from chunkllama.cache_messages import CacheCommand, KeepSnapshot, WriteSnapshot
from chunkllama.config import EngineConfig
from chunkllama.engine.core import EngineCore
from chunkllama.engine.size import check_memory, plan_size
from chunkllama.engine.tier_media import Folder, Memory, MemoryThenFiles
from chunkllama.errors import ConfigError
from chunkllama.messages import EngineRequest
from chunkllama.packs.file import Pack
from chunkllama.sampling_params import SamplingParams

CHUNK = 64
MIB = 1 << 20


def tokens(seed: int, count: int) -> list[int]:
    return np.random.default_rng(seed).integers(3, 300, count).tolist()


PROMPTS = [tokens(seed, 3 * CHUNK + 9) for seed in range(6)]


@pytest.fixture(autouse=True)
def _reading_is_cheap(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model of 2 layers computes a chunk in about the time of a read: what is done may vary."""
    monkeypatch.setattr(ReadPrice, "is_lower", lambda self, num_chunks, seconds: True)


@pytest.fixture
def make(tiny_core: Any) -> Callable[..., EngineCore]:
    """Build an engine with a pool of two prompts and a tier of all."""

    def make(**flat: object) -> EngineCore:
        given = {"num_chunks": 10, "cache_tier_memory": 64 * MIB, "cache_tier_bits": 2}
        return tiny_core(**{**given, **flat})

    return make


def ask(core: EngineCore, prompt: list[int], **options: Any) -> tuple[np.ndarray, int, int]:
    """Log-probabilities of the best three tokens of each place, cached and rounded tokens."""
    sampling = SamplingParams(max_tokens=3, temperature=0.0, ignore_eos=True, seed=1, logprobs=3)
    core.add(EngineRequest(request_id="r", prompt_token_ids=prompt, sampling=sampling, **options))
    best: list[list[float]] = []
    cached = rounded = 0
    while core.has_work():
        for delta in core.step():
            assert delta.error is None, delta.error
            cached, rounded = delta.num_cached_tokens, delta.num_rounded_tokens
            for choice in delta.choices:
                best += [[value for _, value in entry.top] for entry in choice.logprobs or ()]
    settle(core)
    return np.array(best), cached, rounded


def stored(core: EngineCore, prompt: list[int]) -> list[torch.Tensor]:
    """Canonical K/V of the prompt's whole chunks in the pool."""
    cache, io = core.packs.cache, core.packs.io
    nodes = cache.match(encode_tokens(np.array(prompt, np.int32)), len(prompt), "").nodes
    return [io.canonical(io.copy(node.chunk_id)).clone() for node in nodes]


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("bits", [2, 4])
def test_a_chunk_comes_back_as_the_codec_has_rounded_it(
    make, backend: str, dtype: str, bits: int
) -> None:
    core = make(backend=backend, dtype=dtype, cache_tier_bits=bits)
    exact, cached, rounded = ask(core, PROMPTS[0])
    assert (cached, rounded) == (0, 0)
    before = stored(core, PROMPTS[0])
    for prompt in PROMPTS[1:]:
        ask(core, prompt)
    assert len(stored(core, PROMPTS[0])) < 3
    best, cached, rounded = ask(core, PROMPTS[0])
    assert cached >= 3 * CHUNK and rounded == 2 * CHUNK  # a prompt's first chunk is kept whole
    after = stored(core, PROMPTS[0])
    codec = KiviCodec(bits, core.packs.io.shape, core.packs.io.dtype)
    changed = [i for i in range(3) if not torch.equal(before[i], after[i])]
    assert len(changed) * CHUNK == rounded
    for i in changed:
        data = codec.encode(before[i])
        assert data is not None and torch.equal(after[i], codec.decode(data))
    assert 1e-5 < np.abs(best - exact).max() < {2: 8.0, 4: 2.0}[bits]
    again, cached, rounded_again = ask(core, PROMPTS[0])
    assert rounded_again == rounded and np.abs(again - best).max() < 0.05


def test_a_rounded_chunk_is_shared_whole_or_computed(make) -> None:
    """A part of it is not copied: the copy would count as computed."""
    core = make()
    for prompt in PROMPTS:
        ask(core, prompt)
    ask(core, PROMPTS[0])
    for overlap, others in [(CHUNK, 0), (40, 20)]:
        prompt = [*PROMPTS[0][: 2 * CHUNK + overlap], *tokens(90, others)]
        _, cached, rounded = ask(core, prompt)
        assert (cached, rounded) == (2 * CHUNK, CHUNK)


def test_the_tier_holds_over_five_times_what_the_pool_would(make) -> None:
    core = make(cache_tier_memory=MIB, dtype="bfloat16")
    assert core.stats().tier_chunks_capacity > 5 * (MIB // core.packs.io.stored_bytes)


def test_what_memory_does_not_hold_moves_to_files(make, tmp_path: Path) -> None:
    io = make().packs.io
    size = KiviCodec(4, io.shape, io.dtype).num_bytes
    core = make(cache_tier_bits=4, cache_tier_memory=9 * size, cache_tier_dir=tmp_path / "tier")
    for prompt in PROMPTS:
        ask(core, prompt)
    files = sorted((tmp_path / "tier").glob("*/*.chunk"))
    stats = core.stats()
    assert {path.stat().st_size for path in files} == {size, io.stored_bytes}
    assert stats.tier_file_bytes == sum(path.stat().st_size for path in files)
    assert io.stored_bytes < stats.tier_memory_bytes <= 9 * size
    assert core.packs.cache.tier.num_bytes == stats.tier_memory_bytes + stats.tier_file_bytes
    for prompt in PROMPTS:
        assert ask(core, prompt)[1] >= 3 * CHUNK
    (folder,) = (tmp_path / "tier").iterdir()
    core.close()
    assert not folder.exists()


@pytest.mark.parametrize("fails", ["at the start", "on the way"])
def test_a_full_disk_leaves_the_chunks_in_memory(
    make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog, fails: str
) -> None:
    io = make().packs.io
    size = KiviCodec(4, io.shape, io.dtype).num_bytes
    budget = 4 * (io.stored_bytes + 2 * size)  # four prompts
    if fails == "at the start":
        (tmp_path / "tier").touch()
    core = make(cache_tier_bits=4, cache_tier_memory=budget, cache_tier_dir=tmp_path / "tier")
    if fails == "on the way":
        for seed in range(80, 90):
            ask(core, tokens(seed, 3 * CHUNK))
        assert core.stats().tier_file_bytes
        write = Folder.write

        def fail(self: Folder, number: int, data: bytes) -> None:
            write(self, number, data)
            self.remove(number)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        monkeypatch.setattr(Folder, "write", fail)
    for prompt in [*PROMPTS, *PROMPTS]:
        ask(core, prompt)
        stats = core.stats()
        assert stats.tier_memory_bytes <= budget
    assert stats.tier_file_bytes == 0 and stats.tier_chunks_capacity == budget // size
    assert not list((tmp_path / "tier").glob("*/*.chunk"))
    core.packs.cache.tree.evict(10)
    settle(core)
    assert ask(core, PROMPTS[-1])[1:] == (3 * CHUNK, 2 * CHUNK)
    warnings = [each for each in caplog.records if "the cache tier" in each.getMessage()]
    assert len(warnings) == 1 and "has no files until" in warnings[0].getMessage()


@pytest.mark.parametrize("count", [30, pytest.param(600, marks=pytest.mark.nightly)])
def test_tenants_pins_and_drops_keep_answers_within_the_tolerance(
    make, tiny_core: Any, tmp_path: Path, rng: np.random.Generator, count: int
) -> None:
    """A machine of random events on real K/V; its model is what each tenant has sent."""
    rnd = random.Random(int(rng.integers(1 << 32)))
    cold = tiny_core(num_chunks=16, enable_prefix_caching=False)
    exact = [ask(cold, prompt)[0][0] for prompt in PROMPTS]
    io = cold.packs.io
    budgets = 2 * io.stored_bytes, 6 * io.stored_bytes
    core = make(
        num_chunks=14,
        cache_tier_bits=4,
        cache_tier_memory=budgets[0],
        cache_tier_dir=tmp_path / "tier",
        cache_tier_bytes=budgets[1],
    )
    sent: set[tuple[str, int]] = set()
    num_rounded = 0
    for _ in range(count):
        tenant, number = rnd.choice(["", "alice", "bob"]), rnd.randrange(len(PROMPTS))
        if rnd.random() < 0.15:
            core.packs.cache.tree.evict(rnd.randrange(1, 14))
            settle(core)
        elif rnd.random() < 0.1 and tenant:
            command = CacheCommand(command_id=1, action="drop_tenant", tenant=tenant)
            core.cache_command(command)
            sent = {each for each in sent if each[0] != tenant}
        pin = 0.01 if rnd.random() < 0.2 else 0.0
        options = {"tenant": tenant, "namespace": 32 * tenant[:1], "pin_seconds": pin}
        best, cached, rounded = ask(core, PROMPTS[number], **options)
        assert not cached or {(tenant, number), ("", number)} & sent, "found by another tenant"
        assert rounded <= max(cached - CHUNK, 0)
        assert np.abs(best[0] - exact[number]).max() < (1.0 if rounded else 1e-3)
        sent.add((tenant, number))
        num_rounded += rounded > 0
        stats = core.stats()
        assert stats.tier_memory_bytes <= budgets[0] and stats.tier_file_bytes <= budgets[1]
    assert num_rounded >= count // 10
    core.close()
    core = make(cache_tier_bits=4, cache_tier_dir=tmp_path / "tier")
    assert ask(core, PROMPTS[0])[1:] == (0, 0), "a restart begins with an empty tier"


def test_a_snapshot_leaves_out_what_was_rounded(
    make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    core = make(num_chunks=12)
    path = tmp_path / "s.ckpack"
    fields = {"tenants": [""], "template": "", "realm": "here", "seconds": 0.0}
    core.file_command(KeepSnapshot(path=str(path), max_bytes=1 << 30, **fields))
    for prompt in [*PROMPTS, PROMPTS[0], tokens(70, 2 * CHUNK + 5)]:
        ask(core, prompt)
    nodes = list(core.packs.cache.tree.nodes())
    assert any(node.bits for node in nodes)
    upward, walked = Node.upward, []

    def walk(node: Node) -> Iterator[Node]:
        walked.append(node)
        return upward(node)

    with monkeypatch.context() as patch:  # the step loop waits while nodes are chosen
        patch.setattr(Node, "upward", walk)
        core.snapshots._hot_nodes(100)
    assert not walked
    core.file_command(WriteSnapshot(command_id=1, seconds=60.0))
    settle(core)
    kept = {
        node.key
        for node in nodes
        if node.filled == CHUNK and not any(step.bits for step in node.upward())
    }
    with Pack(path) as pack:
        assert len(pack.document.chunks) == len(kept) > 0


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"cache_tier_memory": "64MiB"}, "cache_tier_memory: on a CPU .*cache_tier_bits"),
        ({"cache_tier_bits": 2}, "cache_tier_bits: there is no tier"),
        (
            {"cache_tier_bits": 2, "cache_tier_memory": "1MiB", "kv_dtype": "int8"},
            "cache_tier_bits: not available with kv_dtype int8",
        ),
        (
            {"cache_tier_bits": 4, "cache_tier_memory": "1MiB", "deterministic": True},
            "cache_tier_bits: rounded K/V .* deterministic",
        ),
    ],
    ids=["bits missing", "no tier", "int8", "deterministic"],
)
def test_settings_that_exclude_each_other(tiny_model: Any, settings: dict, reason: str) -> None:
    config = EngineConfig.from_flat(
        model=str(tiny_model[0]), device="cpu", num_chunks=8, **settings
    )
    with pytest.raises(ConfigError, match=f"^{reason}"):
        plan_size(config, tiny_model[0])


def test_memory_of_the_tier_counts(tiny_model: Any, make) -> None:
    config = EngineConfig.from_flat(
        model=str(tiny_model[0]),
        device="cpu",
        num_chunks=8,
        cache_tier_memory=1 << 50,
        cache_tier_bits=2,
    )
    size = plan_size(config, tiny_model[0])
    beside = "cache_tier_memory: 1,073,741,824 MiB are more than the [0-9,]+ MiB that this process"
    for device, others in (("cpu", " beside the weights and the pool"), ("cuda", "")):
        with pytest.raises(ConfigError, match=f"^{beside} may use{others}; give less"):
            check_memory(config, replace(size, device=device))
    with pytest.raises(ConfigError, match=r"^num_chunks: the pool takes"):
        check_memory(config, replace(size, pool_bytes=1 << 50))
    with pytest.raises(ConfigError, match=r"^cache_tier_memory: 9 bytes hold no chunk of"):
        make(cache_tier_memory=9)


class TestMedia:
    """Numbers to bytes, in memory and in files."""

    def test_memory_forgets_what_is_removed(self) -> None:
        memory = Memory()
        memory.write(1, b"one")
        assert memory.read(1) == b"one" and memory.read(2) is None
        memory.remove(1)
        memory.remove(1)
        assert memory.read(1) is None and memory.memory_bytes == 0

    def test_the_chunk_used_longest_ago_moves_to_a_file(self, tmp_path: Path) -> None:
        both = MemoryThenFiles(26, Folder(tmp_path))

        def names() -> list[int]:
            return sorted(int(path.stem, 16) for path in tmp_path.glob("*/*.chunk"))

        for number in (1, 2):
            both.write(number, bytes([number]) * 9)
        assert names() == []
        assert both.read(1) == bytes([1]) * 9
        both.write(3, bytes(9))
        assert names() == [2] and (both.memory_bytes, both.file_bytes) == (18, 9)
        for number in (1, 2):
            assert both.read(number) == bytes([number]) * 9
        both.remove(2)
        both.remove(3)
        assert names() == [] and both.read(2) is None and both.read(3) is None
        assert (both.memory_bytes, both.file_bytes) == (9, 0)
        both.write(4, bytes(20))
        assert names() == [1] and (both.memory_bytes, both.file_bytes) == (20, 9)
        both.close()
        assert (both.memory_bytes, both.file_bytes) == (0, 0)
        assert not list(tmp_path.iterdir())
