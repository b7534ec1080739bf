"""Snapshots of the tree: written beside the steps, loaded by the next engine, dropped, bounded."""

from __future__ import annotations

import os
import stat
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from adapter_files import write_adapter

from chunkllama.adapter_messages import LoadAdapter
from chunkllama.cache_messages import CacheCommand, KeepSnapshot, WriteSnapshot
from chunkllama.engine import snapshot
from chunkllama.engine.core import EngineCore
from chunkllama.messages import CommandReply, EngineRequest
from chunkllama.packs.document import ModelIdentity
from chunkllama.packs.file import Pack
from chunkllama.sampling_params import SamplingParams

CHUNK = 64
NAMESPACES = {"": "", "alice": "a" * 32, "bob": "b" * 32}


def tokens(seed: int, count: int) -> list[int]:
    return np.random.default_rng(seed).integers(3, 300, count).tolist()


def prompt_of(tenant: str) -> list[int]:
    return tokens(10 + len(tenant), 2 * CHUNK + 9)


def ask(
    core: EngineCore, prompt: list[int], tenant: str = "", adapter: str = ""
) -> tuple[list[int], int]:
    """The greedy answer, and how many tokens of the prompt were cached."""
    request = EngineRequest(
        request_id="r",
        prompt_token_ids=prompt,
        sampling=SamplingParams(max_tokens=6, temperature=0.0, ignore_eos=True, seed=1),
        namespace=NAMESPACES[tenant],
        tenant=tenant,
        adapter=adapter,
    )
    core.add(request)
    output, cached = [], -1
    while core.has_work():
        for delta in core.step():
            cached = delta.num_cached_tokens
            output += [token for choice in delta.choices for token in choice.token_ids]
        core.move_chunks()
    return output, cached


def keep(core: EngineCore, path: Path, **fields: object) -> None:
    """Load the file, and wait for that."""
    given = {"tenants": ["", "alice", "bob"], "template": "", "realm": "here", "seconds": 0.0}
    core.file_command(KeepSnapshot(path=str(path), **{**given, "max_bytes": 1 << 30, **fields}))
    while core.is_moving_chunks():
        core.move_chunks()
        core.check_idle()
    assert core.stats().invariant_violations == 0


def finish(core: EngineCore) -> list[CommandReply]:
    replies = []
    while core.is_moving_chunks():
        replies += core.move_chunks()
    return replies


def write(core: EngineCore, seconds: float = 60.0) -> bool:
    replies = core.file_command(WriteSnapshot(command_id=7, seconds=seconds))
    replies += finish(core)
    (reply,) = replies
    assert reply.command_id == 7
    return reply.found


@pytest.fixture
def path(tmp_path) -> Path:
    return tmp_path / "snapshot.ckpack"


@pytest.fixture
def written(tiny_core, path) -> list[list[int]]:
    """A snapshot of what three tenants have asked; returns their answers."""
    core = tiny_core(num_chunks=32)
    keep(core, path)
    answers = [ask(core, prompt_of(tenant), tenant)[0] for tenant in NAMESPACES]
    assert write(core)
    return answers


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_every_tenant_finds_its_own_chunks_and_no_other(tiny_core, path, written, backend) -> None:
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    core = tiny_core(num_chunks=32, backend=backend)
    keep(core, path)
    assert core.stats().chunks_cached == 6 and core.stats().chunks_peak == 0
    owners = core.stats(include_tenants=True).tenants
    assert {name: stats.chunks_cached for name, stats in owners.items()} == dict.fromkeys(
        NAMESPACES, 2
    )
    for tenant, answer in zip(NAMESPACES, written, strict=True):
        for other in ("alice", "bob"):
            cached = ask(core, [*prompt_of(tenant), *tokens(len(other), 3)], other)[1]
            is_visible = tenant in ("", other)
            assert cached >= 2 * CHUNK if is_visible else cached < CHUNK
        output, cached = ask(core, prompt_of(tenant), tenant)
        assert output == answer and cached >= 2 * CHUNK


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_a_server_with_a_smaller_context_leaves_the_rest_behind(tiny_core, path, backend) -> None:
    core = tiny_core(num_chunks=32)
    keep(core, path)
    prompt = tokens(5, 9 * CHUNK + 1)
    ask(core, prompt)
    assert write(core)
    core = tiny_core(num_chunks=32, backend=backend, max_model_len=4 * CHUNK - 1)
    keep(core, path)
    (info,) = core.packs.infos()
    assert (info.state, info.chunks_loaded, info.chunks_left_out) == ("loaded", 3, 6)
    assert ask(core, prompt[: 3 * CHUNK + 1])[1] == 3 * CHUNK


def test_a_tenant_without_a_key_leaves_its_chunks_behind(tiny_core, path, written) -> None:
    core = tiny_core(num_chunks=32)
    keep(core, path, tenants=["", "bob"])
    assert ask(core, prompt_of("alice"), "alice")[1] == 0
    assert ask(core, prompt_of("bob"), "bob")[1] == 2 * CHUNK


@pytest.mark.parametrize("realm", ["elsewhere", ""])
def test_a_snapshot_of_another_realm_is_refused(tiny_core, path, written, realm) -> None:
    core = tiny_core(num_chunks=32)
    keep(core, path, realm=realm)
    assert core.stats().chunks_cached == 0
    (info,) = core.packs.infos()
    assert info.state == "refused" and info.reason == "it is a snapshot of another server"


def test_a_budget_keeps_what_was_used_last_with_all_above_it(tiny_core, path) -> None:
    core = tiny_core(num_chunks=32)
    size = core.packs.io.chunk_bytes
    keep(core, path, max_bytes=3 * size + 5)
    for seed in range(3):
        ask(core, tokens(seed, 2 * CHUNK + 9))
    trunk = tokens(0, 2 * CHUNK + 9)
    ask(core, trunk[:CHUNK] + tokens(9, CHUNK + 1))  # [0 first, 9] are the last ones used
    assert write(core)
    with Pack(path) as pack:
        assert pack.num_bytes <= 3 * size + 5
        paths = [pack.document.tokens(i) for i in range(len(pack.document.chunks))]
    assert trunk[:CHUNK] in paths and trunk[:CHUNK] + tokens(9, CHUNK) in paths
    assert tokens(1, CHUNK) not in paths


def test_time_that_is_over_ends_a_snapshot_that_can_be_loaded(tiny_core, path) -> None:
    core = tiny_core(num_chunks=32)
    keep(core, path)
    ask(core, tokens(3, 4 * CHUNK))
    assert write(core, seconds=0.0)
    with Pack(path) as pack:
        assert pack.document.chunks == []
    other = tiny_core(num_chunks=32)
    keep(other, path)
    assert other.packs.infos()[0].state == "loaded"


def test_a_snapshot_at_the_end_does_not_wait_for_the_hash_of_the_weights(
    tiny_core, path, monkeypatch
) -> None:
    core = tiny_core(num_chunks=32)
    now, identified, identify = [0.0], threading.Event(), core.packs.io._identify

    def slowly() -> ModelIdentity:
        now[0] += 100.0
        identified.set()
        return identify()

    core.packs.io._identify = slowly
    core.snapshots._clock = lambda: now[0]
    monkeypatch.setattr(snapshot, "_STAGED_BYTES", core.packs.io.chunk_bytes)
    keep(core, path)
    assert identified.wait(30)
    ask(core, tokens(3, 4 * CHUNK + 1))
    assert write(core, seconds=10.0)
    with Pack(path) as pack:
        assert len(pack.document.chunks) == 4
    assert now == [100.0]  # once, though the snapshot asks again


def test_snapshots_are_written_at_intervals_while_requests_run(tiny_core, path) -> None:
    now = [0.0]
    core = tiny_core(num_chunks=32, max_num_batched_tokens=32, max_num_seqs=4)
    core.snapshots._clock = lambda: now[0]
    keep(core, path, seconds=5.0)
    ask(core, tokens(3, 2 * CHUNK + 9))
    assert not path.exists()
    now[0] = 6.0
    output = ask(core, tokens(4, 2 * CHUNK + 9))[0]  # the first chunk of this one is in no snapshot
    finish(core)
    with Pack(path) as pack:
        assert pack.document.tokens(1) == tokens(3, 2 * CHUNK)
    before = path.stat().st_mtime_ns
    now[0] = 20.0
    core.move_chunks()
    finish(core)
    assert path.stat().st_mtime_ns != before
    before = path.stat().st_mtime_ns
    now[0] = 40.0
    core.move_chunks()
    assert not core.is_moving_chunks() and path.stat().st_mtime_ns == before  # nothing has changed
    other = tiny_core(num_chunks=32)
    keep(other, path)
    assert ask(other, tokens(4, 2 * CHUNK + 9)) == (output, 2 * CHUNK)


def drop(core: EngineCore, **fields: object) -> None:
    assert core.cache_command(CacheCommand(command_id=1, **fields)).found


def test_dropping_removes_the_file_and_the_next_one_is_without_it(tiny_core, path, written) -> None:
    core = tiny_core(num_chunks=32)
    keep(core, path)
    drop(core, action="drop_tenant", tenant="alice")
    assert not path.exists()
    assert write(core)
    core = tiny_core(num_chunks=32)
    keep(core, path)
    assert ask(core, prompt_of("alice"), "alice")[1] == 0
    assert ask(core, prompt_of("bob"), "bob")[1] == 2 * CHUNK
    (chunk_id,) = [node.chunk_id for node in core._scheduler.tree() if node.depth == 0
                   and node.namespace == NAMESPACES["bob"]]  # fmt: skip
    drop(core, action="drop_branch", chunk_id=chunk_id)
    assert not path.exists()


def test_dropping_ends_a_snapshot_that_is_being_written(tiny_core, path) -> None:
    core = tiny_core(num_chunks=32)
    keep(core, path)
    for tenant in NAMESPACES:
        ask(core, prompt_of(tenant), tenant)
    assert core.file_command(WriteSnapshot(command_id=7, seconds=60.0)) == []
    drop(core, action="drop_tenant", tenant="alice")
    (reply,) = finish(core)
    assert not reply.found and os.listdir(path.parent) == []


def test_dropping_ends_a_snapshot_that_is_being_loaded(tiny_core, path, written) -> None:
    core = tiny_core(num_chunks=32)
    core.file_command(
        KeepSnapshot(
            path=str(path), tenants=["", "alice", "bob"], template="", realm="here",
            max_bytes=1 << 30, seconds=0.0,
        )
    )  # fmt: skip
    while core.packs._staged.empty():  # the thread has opened the file
        time.sleep(0.001)
    core.cache_command(CacheCommand(command_id=1, action="drop_tenant", tenant="alice"))
    finish(core)
    assert core.stats().chunks_cached == 0 and core.packs.infos()[0].chunks_left_out == 6


def test_a_file_during_whose_load_a_process_has_ended_is_not_loaded_again(
    tiny_core, path, written, caplog
) -> None:
    command = KeepSnapshot(
        path=str(path), tenants=["", "alice", "bob"], template="", realm="here",
        max_bytes=1 << 30, seconds=0.0,
    )  # fmt: skip
    tiny_core(num_chunks=32).file_command(command)  # and no turn of its loop any more
    for _ in range(2):  # the second one follows another crash before another snapshot was written
        caplog.clear()
        core = tiny_core(num_chunks=32)
        keep(core, path)
        assert core.packs.infos() == [] and core.stats().chunks_cached == 0
        (warning,) = [r.message for r in caplog.records if r.levelname == "WARNING"]
        assert "is not loaded: an engine process has ended while it loaded it" in warning
    ask(core, prompt_of("bob"), "bob")
    assert write(core)
    assert os.listdir(path.parent) == [path.name]
    core = tiny_core(num_chunks=32)
    keep(core, path)
    assert ask(core, prompt_of("bob"), "bob")[1] == 2 * CHUNK
    assert os.listdir(path.parent) == [path.name]


@pytest.mark.parametrize("cut", [0, 1, 7, 200, 5000])
def test_a_file_that_was_half_written_is_ignored(tiny_core, path, written, cut) -> None:
    whole = path.read_bytes()
    path.write_bytes(whole[:cut])
    (path.parent / f".{path.name}.12345678.part").write_bytes(whole)
    core = tiny_core(num_chunks=32)
    keep(core, path)
    assert core.stats().chunks_cached == 0
    assert os.listdir(path.parent) == [path.name]
    ask(core, prompt_of("bob"), "bob")
    assert write(core)
    with Pack(path) as pack:
        assert len(pack.document.chunks) == 2


def test_a_folder_that_cannot_be_written_turns_snapshots_off_with_one_warning(
    tiny_core, tmp_path, caplog
) -> None:
    path = tmp_path / "missing" / "snapshot.ckpack"
    core = tiny_core(num_chunks=32)
    keep(core, path)
    ask(core, prompt_of("bob"), "bob")
    assert not write(core)
    path.parent.mkdir()
    assert not write(core) and not path.exists()
    warnings = [r for r in caplog.records if "snapshots are off until the next start" in r.message]
    assert len(warnings) == 1


def test_a_full_disk_turns_snapshots_off_and_leaves_the_last_one(
    tiny_core, path, written, monkeypatch
) -> None:
    import errno

    from chunkllama.packs.file import PackWriter

    core = tiny_core(num_chunks=32)
    keep(core, path)
    ask(core, tokens(77, 2 * CHUNK))
    before = path.read_bytes()

    def full(self, data: object) -> str:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(PackWriter, "add", full)
    assert not write(core)
    assert path.read_bytes() == before and os.listdir(path.parent) == [path.name]
    assert ask(core, prompt_of("bob"), "bob")[1] == 2 * CHUNK


def test_chunks_of_adapters_are_left_behind(tiny_core, tiny_model, tmp_path, path) -> None:
    """The number of an adapter in their keys is another adapter's in the next process."""
    core = tiny_core(num_chunks=32)
    folder = write_adapter(tmp_path / "adapter", tiny_model[0], seed=1)
    core.load_adapter(LoadAdapter(command_id=1, name="a", folder=str(folder)))
    while not (replies := core.adapter_replies()):
        core.step()
    assert replies[0].adapter is not None
    keep(core, path)
    ask(core, prompt_of("alice"), "alice", adapter="a")
    assert core.stats().chunks_cached > 0 and not write(core)
    ask(core, prompt_of("bob"), "bob")
    assert write(core)
    core = tiny_core(num_chunks=32)
    keep(core, path)
    assert core.stats().chunks_cached == 2
