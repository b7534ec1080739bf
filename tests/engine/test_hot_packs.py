"""Packs of what a server has cached: chosen from its snapshot, and loaded by another engine."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from moved_chunks import run_alone, settle

from chunkllama.cache_messages import KeepSnapshot, LoadPack, WriteSnapshot
from chunkllama.engine.core import EngineCore
from chunkllama.messages import EngineRequest
from chunkllama.packs.file import Pack, write_pack
from chunkllama.packs.hot import plan_hot_pack
from chunkllama.sampling_params import SamplingParams

CHUNK = 64
ALICE, BOB, SALTED = "a" * 32, "b" * 32, "c" * 32


def tokens(seed: int, count: int) -> list[int]:
    return np.random.default_rng(seed).integers(3, 300, count).tolist()


PUBLIC = tokens(1, 2 * CHUNK)
PROMPTS = {
    ("", ""): [*PUBLIC, 5],
    ("alice", ALICE): [*PUBLIC, *tokens(2, CHUNK), 5],
    ("alice", SALTED): [*PUBLIC, *tokens(3, 2 * CHUNK), 5],
    ("bob", BOB): tokens(4, 3 * CHUNK + 1),
}


def ask(core: EngineCore, prompt: list[int], tenant: str, namespace: str) -> tuple[list[int], int]:
    """The greedy answer, and how many tokens of the prompt were cached."""
    sampling = SamplingParams(max_tokens=4, temperature=0.0, ignore_eos=True, seed=1)
    request = EngineRequest(
        request_id="r",
        prompt_token_ids=prompt,
        sampling=sampling,
        tenant=tenant,
        namespace=namespace,
    )
    return run_alone(core, request)


@pytest.fixture
def answers(tiny_core, tmp_path: Path) -> dict[tuple[str, str], list[int]]:
    """Write a snapshot of all prompts; returns their answers."""
    core = tiny_core(num_chunks=32)
    core.file_command(
        KeepSnapshot(
            path=str(tmp_path / "snapshot.ckpack"),
            tenants=["", "alice", "bob"],
            template="",
            realm="here",
            seconds=0.0,
            max_bytes=1 << 30,
        )
    )
    found = {who: ask(core, prompt, *who)[0] for who, prompt in PROMPTS.items()}
    core.file_command(WriteSnapshot(command_id=1, seconds=60.0))
    settle(core)
    return found


@pytest.mark.parametrize("tenants", [{}, {ALICE: "alice"}, {ALICE: "alice", BOB: "bob"}])
def test_a_hot_pack_is_for_everyone_and_the_tenants_that_were_asked_for(
    tiny_core, tmp_path: Path, answers, tenants: dict[str, str]
) -> None:
    path = tmp_path / "hot.ckpack"
    with Pack(tmp_path / "snapshot.ckpack") as snapshot:
        planned, indexes = plan_hot_pack(snapshot.document, {"": "", **tenants})
        write_pack(path, planned, map(snapshot.read_chunk, indexes))
    with Pack(path) as pack:
        document = pack.document
        sizes = {
            (document.scopes[prefix.scope].tenant, prefix.num_tokens)
            for prefix in document.prefixes
        }
    expected = {"alice": 3 * CHUNK, "bob": 3 * CHUNK}
    kept = {("", 2 * CHUNK)} if "alice" not in tenants.values() else set()
    assert sizes == kept | {(name, expected[name]) for name in tenants.values()}
    core = tiny_core(num_chunks=32)
    elsewhere = {"": "", "alice": "d" * 32, "bob": "e" * 32}
    core.file_command(LoadPack(path=str(path), namespaces=elsewhere, template=""))
    settle(core)
    (info,) = core.packs.infos()
    assert (info.state, info.chunks_loaded) == ("loaded", info.chunks), info
    for (tenant, namespace), prompt in PROMPTS.items():
        mine = elsewhere[tenant] if namespace != SALTED else "f" * 32
        output, cached = ask(core, prompt, tenant, mine)
        assert output == answers[tenant, namespace]
        public = 2 * CHUNK if tenant != "bob" else 0
        assert cached == (expected[tenant] if namespace in tenants else public)


def test_chunks_below_one_that_is_left_out_are_left_out(answers, tmp_path: Path) -> None:
    with Pack(tmp_path / "snapshot.ckpack") as snapshot:
        planned, indexes = plan_hot_pack(snapshot.document, {BOB: "bob"})
        assert len(indexes) == 3 and not plan_hot_pack(snapshot.document, {SALTED: "alice"})[1]
    assert [chunk.parent for chunk in planned.chunks] == [-1, 0, 1]
