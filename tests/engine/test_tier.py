"""The cache tier on disk: chunks that the pool has evicted are read again, or computed."""

from __future__ import annotations

import errno
import os
import random
import stat
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from moved_chunks import run_alone, settle

from chunkllama.cache.tier_entry import ReadPrice
from chunkllama.cache_messages import CacheCommand
from chunkllama.engine.core import EngineCore
from chunkllama.engine.tier_media import Folder
from chunkllama.errors import ConfigError
from chunkllama.messages import EngineRequest, ExplainPrompt
from chunkllama.sampling_params import SamplingParams

CHUNK = 64
NUM_PREFIXES = 6
NAMESPACES = {"": "", "alice": "a" * 32, "bob": "b" * 32}


def tokens(seed: int, count: int) -> list[int]:
    return np.random.default_rng(seed).integers(3, 300, count).tolist()


PROMPTS = [tokens(seed, 3 * CHUNK + 9) for seed in range(NUM_PREFIXES)]


@pytest.fixture(autouse=True)
def _reading_is_cheap(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model of 2 layers computes a chunk in about the time of a read: what is done may vary."""
    monkeypatch.setattr(ReadPrice, "is_lower", lambda self, num_chunks, seconds: True)


def request(
    name: str, prompt: list[int], tenant: str = "", max_tokens: int = 6, **options: object
) -> EngineRequest:
    return EngineRequest(
        request_id=name,
        prompt_token_ids=prompt,
        sampling=SamplingParams(max_tokens=max_tokens, temperature=0.0, ignore_eos=True, seed=1),
        namespace=NAMESPACES[tenant],
        tenant=tenant,
        **options,
    )


def ask(core: EngineCore, prompt: list[int], tenant: str = "") -> tuple[list[int], int]:
    """The greedy answer, and how many tokens of the prompt were cached."""
    return run_alone(core, request("r", prompt, tenant))


@pytest.fixture
def make(tiny_core, tmp_path) -> Callable[..., EngineCore]:
    """Build an engine with a pool of two prompts and a tier of all."""

    def make(**flat: object) -> EngineCore:
        given = {"num_chunks": 10, "cache_tier_dir": tmp_path / "tier", **flat}
        return tiny_core(**given)

    return make


def files(tmp_path: Path) -> list[Path]:
    return sorted((tmp_path / "tier").glob("*/*.chunk"))


@pytest.mark.parametrize(
    "settings",
    [{"backend": "reference"}, {"backend": "cpu"}, {"kv_dtype": "int8"}, {"dtype": "bfloat16"}],
    ids=["reference", "cpu", "int8", "bfloat16"],
)
def test_evicted_prompts_are_read_again(make, tiny_core, tmp_path, settings) -> None:
    cold = tiny_core(num_chunks=64, enable_prefix_caching=False, **settings)
    expected = [ask(cold, prompt)[0] for prompt in PROMPTS]
    core = make(**settings)
    for prompt, answer in zip(PROMPTS, expected, strict=True):
        assert ask(core, prompt) == (answer, 0)
    before = core.stats()
    assert before.tier_chunks >= 2 * (NUM_PREFIXES - 3) and before.tier_chunks_promoted_total == 0
    for prompt, answer in zip(PROMPTS, expected, strict=True):
        output, cached = ask(core, prompt)
        assert output == answer and cached >= 3 * CHUNK
    stats = core.stats()
    assert stats.tier_chunks_promoted_total >= 2 * (NUM_PREFIXES - 3)
    assert stats.prefix_tokens_hit_tier_total == CHUNK * stats.tier_chunks_promoted_total
    assert stats.tier_chunks == len(files(tmp_path)) == stats.tier_chunks_written_total
    assert stats.tier_chunks_damaged_total == 0
    assert all(stat.S_IMODE(path.stat().st_mode) == 0o600 for path in files(tmp_path))
    (folder,) = (tmp_path / "tier").iterdir()
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    core.close()
    assert not folder.exists()


def test_other_requests_run_while_chunks_are_read(make) -> None:
    core = make(num_chunks=16)
    expected = [ask(core, prompt)[0] for prompt in PROMPTS]
    core.add(request("long", tokens(50, 20), max_tokens=40))
    for i, prompt in enumerate(PROMPTS[:3]):
        core.add(request(f"r{i}", prompt))
    outputs: dict[str, list[int]] = {}
    cached: dict[str, int] = {}
    while core.has_work():
        for delta in core.step():
            cached[delta.request_id] = delta.num_cached_tokens
            for choice in delta.choices:
                outputs.setdefault(delta.request_id, []).extend(choice.token_ids)
    settle(core)
    assert [outputs[f"r{i}"] for i in range(3)] == expected[:3]
    assert all(cached[f"r{i}"] >= 3 * CHUNK for i in range(3))
    assert ask(core, tokens(50, 20))[0] == outputs["long"][:6]


def test_each_tenant_finds_its_own_chunks_and_no_other(make, tmp_path) -> None:
    core = make()
    for prompt, tenant in zip(PROMPTS, ("alice", "bob", "", "", ""), strict=False):
        ask(core, prompt, tenant)
    assert ask(core, PROMPTS[0], "bob")[1] == 0 and ask(core, PROMPTS[1], "alice")[1] == 0
    assert ask(core, PROMPTS[0], "alice")[1] >= 3 * CHUNK
    assert ask(core, PROMPTS[2], "alice")[1] >= 3 * CHUNK
    reply = core.cache_command(CacheCommand(command_id=1, action="drop_tenant", tenant="alice"))
    assert reply.found and reply.num_dropped >= 3
    settle(core)
    assert core.stats().tier_chunks == len(files(tmp_path))
    assert ask(core, PROMPTS[0], "alice")[1] == 0


def test_an_explanation_counts_what_can_be_read(make) -> None:
    core = make()
    for prompt in PROMPTS:
        ask(core, prompt)
    reply = core.explain(ExplainPrompt(command_id=1, prompt_token_ids=PROMPTS[0]))
    assert reply.explanation is not None
    assert reply.explanation.num_matched_tokens == 3 * CHUNK
    core.add(request("r", PROMPTS[0][: 3 * CHUNK + 1], explain=True))
    explanations = []
    while core.has_work():
        explanations += [each.explanation for each in core.step() if each.explanation is not None]
    assert [(each.reason, each.num_matched_tokens) for each in explanations] == [
        ("complete", 3 * CHUNK)
    ]


def test_a_full_disk_turns_the_tier_off(make, tmp_path, monkeypatch, caplog) -> None:
    core = make()
    expected = [ask(core, prompt)[0] for prompt in PROMPTS]
    assert files(tmp_path)

    def fail(self: Folder, number: int, data: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Folder, "write", fail)
    for seed in range(60, 64):
        ask(core, tokens(seed, 3 * CHUNK))
    assert [ask(core, prompt)[0] for prompt in PROMPTS] == expected
    warnings = [each for each in caplog.records if "cache tier is off" in each.getMessage()]
    assert len(warnings) == 1 and "No space left" in warnings[0].getMessage()
    assert core.stats().tier_chunks == 0
    core.close()
    assert not files(tmp_path)


def test_a_folder_that_cannot_be_made_turns_the_tier_off(make, tmp_path, caplog) -> None:
    (tmp_path / "file").touch()
    core = make(cache_tier_dir=tmp_path / "file" / "tier")
    expected = [ask(core, prompt)[0] for prompt in PROMPTS]
    assert [ask(core, prompt)[0] for prompt in PROMPTS] == expected
    assert len([each for each in caplog.records if "cache tier is off" in each.getMessage()]) == 1


def test_the_folder_of_a_process_that_has_ended_is_removed_and_no_other(make, tmp_path) -> None:
    left = tmp_path / "tier" / "engine-left"
    left.mkdir(parents=True)
    (left / "0000000000000000.chunk").write_bytes(b"half")
    first = make()
    for prompt in PROMPTS:
        ask(first, prompt)
    assert not left.exists()
    kept = files(tmp_path)
    second = make()
    assert kept and files(tmp_path) == kept
    assert ask(second, PROMPTS[0])[1] == 0
    assert ask(first, PROMPTS[0])[1] >= 3 * CHUNK


def test_the_budget_holds(make, tmp_path) -> None:
    core = make()
    size = core.packs.io.stored_bytes
    core.close()
    core = make(cache_tier_bytes=4 * size + 1)
    for prompt in PROMPTS * 2:
        ask(core, prompt)
        assert sum(path.stat().st_size for path in files(tmp_path)) <= 4 * size
    with pytest.raises(ConfigError, match=f"cache_tier_bytes: {size - 1} bytes hold no chunk"):
        make(cache_tier_bytes=size - 1)


def _flip(path: Path, rnd: random.Random) -> None:
    data = bytearray(path.read_bytes())
    data[rnd.randrange(len(data))] ^= 1 << rnd.randrange(8)
    path.write_bytes(data)


def _truncate(path: Path, rnd: random.Random) -> None:
    os.truncate(path, rnd.randrange(path.stat().st_size))


def _erase(path: Path, rnd: random.Random) -> None:
    path.write_bytes(bytes(path.stat().st_size))


def _replace(path: Path, rnd: random.Random) -> None:
    """By the whole file of another chunk."""
    others = [each for each in path.parent.iterdir() if each != path and each.is_file()]
    if others:
        path.write_bytes(rnd.choice(sorted(others)).read_bytes())


def _remove(path: Path, rnd: random.Random) -> None:
    path.unlink()


def _link(path: Path, rnd: random.Random) -> None:
    path.unlink()
    path.symlink_to("/dev/zero")


def _pipe(path: Path, rnd: random.Random) -> None:
    path.unlink()
    os.mkfifo(path)


MUTATIONS = (_flip, _truncate, _erase, _replace, _remove, _link, _pipe)


def mutate_and_ask(core: EngineCore, tmp_path: Path, count: int) -> None:
    """Change files between requests; every answer stays that of an engine without a tier."""
    rnd = random.Random(3)
    expected = [ask(core, prompt)[0] for prompt in PROMPTS]
    for number in range(count):
        there = [path for path in files(tmp_path) if path.is_file() and not path.is_symlink()]
        MUTATIONS[number % len(MUTATIONS)](rnd.choice(there), rnd)
        asked = rnd.randrange(NUM_PREFIXES)
        assert ask(core, PROMPTS[asked])[0] == expected[asked]
    for prompt, answer in zip(PROMPTS, expected, strict=True):
        assert ask(core, prompt)[0] == answer
    stats = core.stats()
    assert stats.tier_chunks_damaged_total >= count // 10 and stats.tier_chunks_promoted_total
    assert stats.invariant_violations == 0


def test_a_changed_file_is_never_used(make, tmp_path) -> None:
    mutate_and_ask(make(), tmp_path, 20)


@pytest.mark.nightly
@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_none_of_many_changed_files_is_used(make, tmp_path, backend) -> None:
    mutate_and_ask(make(backend=backend), tmp_path, 200)
