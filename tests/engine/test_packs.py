"""Packs: built on one backend and loaded on another, damaged, foreign, and under pool pressure."""

from __future__ import annotations

import os
import random
import stat
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from chunkllama.backends.cpu.build import available_levels
from chunkllama.cache.node import encode_tokens
from chunkllama.cache_messages import CacheCommand, LoadPack, PackInfo
from chunkllama.engine.core import EngineCore
from chunkllama.engine.pack_builder import (
    PrefixPrompt,
    compute_chunks,
    plan_pack,
    recompute_chunks,
)
from chunkllama.errors import ConfigError
from chunkllama.messages import EngineRequest
from chunkllama.packs.document import PackDocument
from chunkllama.packs.file import Pack, write_pack
from chunkllama.sampling_params import SamplingParams

CHUNK = 64
LEVELS = [level.name for level in available_levels()]
BACKENDS = [{"backend": "reference"}, *({"isa_level": level} for level in LEVELS)]


def tokens(seed: int, count: int) -> list[int]:
    return np.random.default_rng(seed).integers(3, 300, count).tolist()


SYSTEM = tokens(1, 3 * CHUNK + 10)
PROMPTS = [
    PrefixPrompt("system", "", SYSTEM),
    PrefixPrompt("of alice", "alice", SYSTEM[:CHUNK] + tokens(2, CHUNK + 5)),
    PrefixPrompt("of bob", "bob", tokens(3, 2 * CHUNK)),
]
NAMESPACES = {"": "", "alice": "a" * 32, "bob": "b" * 32}


def build(core: EngineCore, path: Path, prompts=PROMPTS) -> PackDocument:
    planned, ordered = plan_pack(prompts, core.packs.io.identify(), "template")
    return write_pack(path, planned, compute_chunks(core, planned, ordered))


def load(core: EngineCore, path: Path, **fields: object) -> PackInfo:
    """Load a pack with nothing else to do; returns what became of it."""
    given = {"namespaces": NAMESPACES, "template": "template", **fields}
    core.packs.load(LoadPack(path=str(path), **given))
    while core.is_moving_chunks():
        core.move_chunks()
        core.check_idle()
    (info,) = [info for info in core.packs.infos() if info.name == path.name]
    assert core.stats().invariant_violations == 0
    return info


def ask(core: EngineCore, prompt: list[int], tenant: str = "") -> tuple[list[int], int]:
    """The greedy answer, and how many tokens of the prompt were cached."""
    request = EngineRequest(
        request_id="r",
        prompt_token_ids=prompt,
        sampling=SamplingParams(max_tokens=6, temperature=0.0, ignore_eos=True, seed=1),
        namespace=NAMESPACES[tenant],
        tenant=tenant,
    )
    core.add(request)
    output, cached = [], -1
    while core.has_work():
        for delta in core.step():
            assert delta.error is None, delta.error
            cached = delta.num_cached_tokens
            output += [token for choice in delta.choices for token in choice.token_ids]
    return output, cached


QUESTIONS = [
    ([*SYSTEM, 5, 6, 7], "", 3 * CHUNK),
    ([*SYSTEM, 5, 6, 7], "alice", 3 * CHUNK),
    ([*PROMPTS[1].token_ids, 8], "alice", 2 * CHUNK),
    ([*PROMPTS[1].token_ids, 8], "bob", CHUNK),
    ([*PROMPTS[2].token_ids, 9], "bob", 2 * CHUNK),
    ([*PROMPTS[2].token_ids, 9], "alice", 0),
]


@pytest.fixture(scope="module")
def answers(tiny_model) -> list[list[int]]:
    """What transformers answers to ``QUESTIONS``."""
    found = []
    for prompt, _, _ in QUESTIONS:
        ids = list(prompt)
        with torch.inference_mode():
            for _ in range(6):
                ids.append(int(tiny_model[1](torch.tensor([ids])).logits[0, -1].argmax()))
        found.append(ids[len(prompt) :])
    return found


def check_answers(core: EngineCore, answers: list[list[int]], *, are_cached: bool) -> None:
    for (prompt, tenant, cached), expected in zip(QUESTIONS, answers, strict=True):
        output, read = ask(core, prompt, tenant)
        assert output == expected
        if are_cached:
            assert read >= cached  # at token granularity, earlier questions add a few
            assert read < cached + CHUNK


@pytest.mark.parametrize("target", BACKENDS, ids=lambda b: "-".join(b.values()))
@pytest.mark.parametrize("source", BACKENDS[:2], ids=lambda b: "-".join(b.values()))
def test_a_pack_of_any_backend_gives_the_answers_of_a_cold_cache(
    tiny_core, tmp_path, answers, source, target
) -> None:
    path = tmp_path / "a.ckpack"
    document = build(tiny_core(num_chunks=32, **source), path)
    assert len(document.chunks) == 3 + 1 + 2
    core = tiny_core(num_chunks=32, **target)
    info = load(core, path)
    assert (info.state, info.chunks_loaded) == ("loaded", 6), info
    assert core.stats().chunks_cached == 6 and core.stats().chunks_peak == 0
    check_answers(core, answers, are_cached=True)
    again = load(core, path)
    assert (again.chunks_loaded, again.chunks_present) == (0, 6)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("level", LEVELS)
def test_every_level_computes_the_canonical_chunks_of_the_reference(
    tiny_core, level, dtype
) -> None:
    chunks = {}
    for name, settings in (
        ("reference", {"backend": "reference"}),
        ("level", {"isa_level": level}),
    ):
        core = tiny_core(num_chunks=8, dtype=dtype, **settings)
        ask(core, SYSTEM)
        io, cache = core.packs.io, core.packs.cache
        nodes = cache.match(encode_tokens(np.array(SYSTEM, np.int32)), len(SYSTEM), "").nodes
        kind = torch.bfloat16 if dtype == "bfloat16" else torch.float32
        shape = io.identify().shape
        read = [bytearray(io.read(node.chunk_id)) for node in nodes]
        chunks[name] = torch.stack([torch.frombuffer(d, dtype=kind).view(shape) for d in read])
        for node, data in zip(nodes, read, strict=True):  # and back
            io.write(node.chunk_id, io.arrange(data, io.identify()))
            assert bytearray(io.read(node.chunk_id)) == data
    size = chunks["reference"].float().norm()
    difference = (chunks["reference"].float() - chunks["level"].float()).norm()
    assert difference < (0.03 if dtype == "bfloat16" else 1e-4) * size


def test_a_foreign_pack_is_refused_by_name(tiny_core, tmp_path, tiny_model) -> None:
    path = tmp_path / "a.ckpack"
    build(tiny_core(num_chunks=16), path)
    core = tiny_core(num_chunks=16, dtype="bfloat16")
    assert load(core, path).reason == "it has dtype float32, this server has bfloat16"
    core = tiny_core(num_chunks=16, chunk_size=32, backend="reference")
    assert load(core, path).reason == "it has chunks of 64 tokens, this server has 32"
    core = tiny_core(num_chunks=16)
    refused = load(core, path, template="another")
    assert refused.reason == "it was made with another chat template than this server has"
    assert refused.state == "refused" and core.stats().chunks_cached == 0


@pytest.fixture
def changed_model(tiny_model, tmp_path) -> Callable[..., Path]:
    """Copy the tiny model with other values in config.json, or other weights."""
    import json
    import shutil

    from safetensors.torch import load_file, save_file

    def change(weights: bool = False, **values: object) -> Path:
        folder = tmp_path / f"model{len(list(tmp_path.iterdir()))}"
        shutil.copytree(tiny_model[0], folder)
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, **values}))
        if weights:
            tensors = load_file(folder / "model.safetensors")
            tensors["model.norm.weight"] += 1e-3
            save_file(tensors, folder / "model.safetensors", {"format": "pt"})
        return folder

    return change


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"weights": True}, "it has other weights: it was made with"),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}, "it has another rotary"),
        ({"rms_norm_eps": 1e-4}, "it has other numbers in config.json"),
    ],
)
def test_another_model_is_refused_by_name(
    tiny_core, tmp_path, changed_model, change, reason
) -> None:
    path = tmp_path / "a.ckpack"
    build(tiny_core(num_chunks=16), path)
    core = tiny_core(num_chunks=16, model=str(changed_model(**change)))
    assert load(core, path).reason.startswith(reason)


def test_a_damaged_chunk_is_left_out_with_those_below_it(tiny_core, tmp_path, answers) -> None:
    path = tmp_path / "a.ckpack"
    document = build(tiny_core(num_chunks=16), path)
    data = bytearray(path.read_bytes())
    size = document.model.chunk_bytes
    data[len(data) - 6 * size + size + 100] ^= 1  # the second of the three public chunks
    path.write_bytes(data)
    core = tiny_core(num_chunks=32)
    info = load(core, path)
    assert (info.chunks_damaged, info.chunks_left_out, info.chunks_loaded) == (1, 1, 4)
    check_answers(core, answers, are_cached=False)


def test_chunks_of_the_wrong_tokens_are_found_by_computing_one(tiny_core, tmp_path) -> None:
    """A pack whose checksums are right, made from other tokens than it says."""
    core = tiny_core(num_chunks=16)
    planned, _ = plan_pack(PROMPTS[:1], core.packs.io.identify(), "template")
    other = [PrefixPrompt("system", "", tokens(9, len(SYSTEM)))]
    path = tmp_path / "a.ckpack"
    write_pack(path, planned, compute_chunks(core, planned, other))
    core = tiny_core(num_chunks=16)
    info = load(core, path)
    assert info.state == "refused" and "differs from what this model computes" in info.reason
    assert core.stats().chunks_free == 16 and core.stats().chunks_peak == 0
    with Pack(path) as pack:
        assert all(difference > 0.1 for _, difference in recompute_chunks(core, pack, [0, 2, 1]))
    core.check_idle()


def test_a_pack_is_for_its_owner_and_what_a_killed_build_has_left_is_removed(
    tiny_core, tmp_path
) -> None:
    core = tiny_core(num_chunks=16)
    path = tmp_path / "a[1].ckpack"
    mine, others = tmp_path / f".{path.name}.0123abcd.part", tmp_path / ".a1.ckpack.0123abcd.part"
    mine.write_bytes(b"half of one")
    others.write_bytes(b"half of another")
    before = os.umask(0)
    try:
        build(core, path)
    finally:
        os.umask(before)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert set(tmp_path.iterdir()) == {path, others}


def test_recomputed_chunks_agree_in_any_order(tiny_core, tmp_path) -> None:
    core = tiny_core(num_chunks=16)
    path = tmp_path / "a.ckpack"
    build(core, path)
    core = tiny_core(num_chunks=4, backend="reference")
    with Pack(path) as pack:
        found = list(recompute_chunks(core, pack, [5, 2, 0, 3, 1, 4, 2]))
    assert [index for index, _ in found] == [5, 2, 0, 3, 1, 4, 2]
    assert max(difference for _, difference in found) < 1e-4
    assert core.stats().chunks_free == 4


def test_loading_takes_what_the_pool_has_and_evicts_what_is_older(
    tiny_core, tmp_path, answers
) -> None:
    path = tmp_path / "a.ckpack"
    build(tiny_core(num_chunks=16), path)
    core = tiny_core(num_chunks=8)
    ask(core, tokens(30, 4 * CHUNK))  # 4 whole chunks and the answer's, all evictable
    info = load(core, path)
    assert info.chunks_loaded == 6 and core.stats().chunks_cached <= 8
    small = tiny_core(num_chunks=4)
    info = load(small, path)
    assert info.chunks_loaded + info.chunks_left_out == 6 and small.stats().chunks_cached == 4
    big = tiny_core(num_chunks=8, max_num_seqs=2)
    check_answers(big, answers, are_cached=False)


@pytest.mark.parametrize(("max_model_len", "most"), [(256, 4), (300, 4), (63, 0)])
@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_chunks_beyond_the_context_are_left_out(
    tiny_core, tmp_path, backend, max_model_len, most
) -> None:
    """The rotary table has no rows for them, so that not one of them can be computed."""
    path = tmp_path / "long.ckpack"
    prompt = tokens(7, 20 * CHUNK)
    build(tiny_core(num_chunks=24), path, [PrefixPrompt("long", "", prompt, pin=True)])
    core = tiny_core(num_chunks=40, backend=backend, max_model_len=max_model_len)
    info = load(core, path)
    assert (info.state, info.chunks_loaded, info.chunks_left_out) == ("loaded", most, 20 - most)
    assert core.stats().chunks_cached + core.stats().chunks_referenced == most
    assert core.stats().pinned_chunks == most
    empty = tiny_core(num_chunks=40, backend=backend, max_model_len=max_model_len)
    with Pack(path) as pack:
        found = list(recompute_chunks(empty, pack, list(range(most))))
        assert [index for index, _ in found] == list(range(most))
        with pytest.raises(ConfigError, match=f"chunk {most} is beyond the context"):
            list(recompute_chunks(empty, pack, [most]))
    if most:
        question = prompt[: 4 * CHUNK - 8]
        assert ask(core, question) == (ask(empty, question)[0], len(question) - 1)


def test_requests_run_while_a_pack_is_loaded(tiny_core, tmp_path, run, tiny_truth) -> None:
    """Chunks are inserted between steps; the requests' own chunks are then adopted or present."""
    path = tmp_path / "a.ckpack"
    build(tiny_core(num_chunks=16), path)
    core = tiny_core(num_chunks=24, max_num_batched_tokens=48, max_num_seqs=4)
    engine = run(core)
    prompts = [[*SYSTEM, 5], [*PROMPTS[2].token_ids, 9], SYSTEM[: 2 * CHUNK] + tokens(6, 70)]
    names = [engine.add(prompt, max_tokens=20) for prompt in prompts]
    engine.step()
    core.packs.load(LoadPack(path=str(path), namespaces=NAMESPACES, template="template"))
    while core.is_moving_chunks() or core.has_work():
        if core.has_work():
            engine.step()
        core.move_chunks()
        core._scheduler.check_invariants()
    engine.finish()
    for name, prompt in zip(names, prompts, strict=True):
        tiny_truth.check(prompt, engine.outputs[name])


def test_chunks_of_a_tenant_that_is_not_here_are_left_out(tiny_core, tmp_path) -> None:
    path = tmp_path / "a.ckpack"
    build(tiny_core(num_chunks=16), path)
    core = tiny_core(num_chunks=16)
    info = load(core, path, namespaces={"": "", "alice": NAMESPACES["alice"]})
    assert (info.chunks_loaded, info.chunks_left_out) == (4, 2)
    assert ask(core, [*PROMPTS[2].token_ids, 9], "bob")[1] == 0


@pytest.mark.parametrize("tenant", ["alice", ""])
def test_a_tenant_that_is_dropped_while_a_pack_is_loaded_stays_out(
    tiny_core, tmp_path, tenant: str
) -> None:
    path = tmp_path / "a.ckpack"
    build(tiny_core(num_chunks=16), path)
    core = tiny_core(num_chunks=16)
    command = LoadPack(path=str(path), namespaces=NAMESPACES, template="template")
    core.file_command(command)
    core.cache_command(CacheCommand(command_id=1, action="drop_tenant", tenant=tenant))
    while core.is_moving_chunks():
        core.move_chunks()
    owners = core.stats(include_tenants=True).tenants
    kept = {name: stats.chunks_cached for name, stats in owners.items() if stats.chunks_cached}
    assert kept == ({"bob": 2} if tenant == "" else {"": 3, "bob": 2})
    core.file_command(command)  # an operator asks for it again
    while core.is_moving_chunks():
        core.move_chunks()
    assert core.stats().chunks_cached == 6


def test_a_prefix_may_ask_to_be_pinned(tiny_core, tmp_path) -> None:
    core = tiny_core(num_chunks=16)
    path = tmp_path / "a.ckpack"
    build(core, path, [PrefixPrompt("pinned", "", SYSTEM, pin=True), *PROMPTS[1:]])
    core = tiny_core(num_chunks=16)
    load(core, path)
    assert core.stats().pinned_chunks == 3
    for seed in range(6):
        ask(core, tokens(100 + seed, 8 * CHUNK))
    assert ask(core, [*SYSTEM, 4])[1] == 3 * CHUNK


def mutate(data: bytes, rng: random.Random) -> bytes:
    """Damage a file: bits, bytes, lengths, stretches cut out, doubled or exchanged."""
    header = int.from_bytes(data[:8], "little") + 8
    kind = rng.randrange(8)
    at = rng.randrange(header if rng.random() < 0.6 else len(data))
    size = rng.choice([1, 8, 64, 4096])
    out = bytearray(data)
    if kind == 0:
        out[at] ^= 1 << rng.randrange(8)
    elif kind == 1:
        out[at : at + size] = rng.randbytes(min(size, len(data) - at))
    elif kind == 2:
        del out[at:]
    elif kind == 3:
        del out[at : at + size]
    elif kind == 4:
        out[at:at] = out[at : at + size]
    elif kind == 5:
        out += rng.randbytes(size)
    elif kind == 6:  # another digit in the header: a token, a parent, an offset
        digits = [i for i in range(8, header) if data[i : i + 1].isdigit()]
        out[rng.choice(digits)] = ord(str(rng.randrange(10)))
    else:  # two chunks exchanged
        half = (len(data) - header) // 6
        first, second = rng.sample(range(6), 2)
        a, b = header + first * half, header + second * half
        out[a : a + half], out[b : b + half] = data[b : b + half], data[a : a + half]
    return bytes(out)


def check_mutations(tiny_core, tmp_path, answers, seeds: range) -> None:
    path = tmp_path / "good.ckpack"
    build(tiny_core(num_chunks=16), path)
    good = path.read_bytes()
    core, refused = tiny_core(num_chunks=64), 0
    for seed in seeds:
        bad = tmp_path / f"{seed}.ckpack"
        bad.write_bytes(mutate(good, random.Random(seed)))
        info = load(core, bad)
        refused += info.state == "refused"
        if info.state == "loaded":
            loaded = info.chunks_loaded
            assert loaded + info.chunks_damaged + info.chunks_left_out == 6
            check_answers(core, answers, are_cached=False)
        core.packs.cache.tree.evict(64)
        bad.unlink()
    assert refused >= len(seeds) // 3


def test_mutated_packs_are_refused_or_recomputed(tiny_core, tmp_path, answers) -> None:
    check_mutations(tiny_core, tmp_path, answers, range(40))


@pytest.mark.nightly
def test_200_mutated_packs_are_refused_or_recomputed(tiny_core, tmp_path, answers) -> None:
    seed = time.time_ns()
    print(f"first seed {seed}")
    check_mutations(tiny_core, tmp_path, answers, range(seed, seed + 200))


def test_prompts_shorter_than_a_chunk_are_no_pack(tiny_core) -> None:
    core = tiny_core(num_chunks=4)
    with pytest.raises(ConfigError, match="none is as long as a chunk of 64 tokens"):
        plan_pack([PrefixPrompt("short", "", [4] * 63)], core.packs.io.identify(), "")
