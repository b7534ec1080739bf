"""Keys of prefixes: a front end and a replica compute the same ones."""

from __future__ import annotations

import random

from chunkllama.cache.adapter_tags import AdapterUse
from chunkllama.cluster.prefix_keys import HEAD_LEVELS, prefix_keys, tree_heads
from chunkllama.simulation.engine import SimulatedEngine

SIZE = 4


def served(*requests: tuple[list[int], dict[str, object]]) -> SimulatedEngine:
    engine = SimulatedEngine(400, SIZE, vocab_size=50)
    for prompt, options in requests:
        engine.add(prompt, 1, **options)
        engine.run()
    return engine


def heads_of(engine: SimulatedEngine, max_keys: int = 1000) -> list[list[int]]:
    return tree_heads(engine.cache.tree.nodes(), SIZE, max_keys)


def test_keys_depend_on_all_tokens_before_and_on_the_namespace() -> None:
    rng = random.Random(1)
    prompt = [rng.randrange(1 << 20) for _ in range(11)]
    keys = prefix_keys("a", prompt, SIZE)
    assert len({*keys}) == len(keys) == 2
    assert prefix_keys("a", prompt[:8], SIZE) == keys
    assert prefix_keys("a", prompt[:7], SIZE) == keys[:1]
    assert not {*prefix_keys("a", [prompt[0] + 1, *prompt[1:]], SIZE)} & {*keys}
    assert not {*prefix_keys("b", prompt, SIZE)} & {*keys}
    assert all(0 <= key < 1 << 64 for key in keys)
    assert prefix_keys("a", prompt[:3], SIZE) == []


def test_a_replica_and_a_front_end_agree_on_the_keys() -> None:
    first, second = list(range(12)), [*range(8), 40, 41, 42, 43]
    engine = served((first, {"namespace": "a"}), (second, {"namespace": "a"}))
    levels = heads_of(engine)
    keys = [prefix_keys("a", prompt, SIZE) for prompt in (first, second)]
    assert [{*level} for level in levels[:3]] == [{*level} for level in zip(*keys, strict=True)]
    assert levels[3:] == [[]]  # what ends inside a chunk has no key


def test_chunks_below_public_ones_are_found_by_their_tenants_keys() -> None:
    public = list(range(8))
    engine = served((public, {}), ([*public, 1, 2, 3, 4, 5], {"namespace": "a"}))
    levels = [{*level} for level in heads_of(engine)]
    own = prefix_keys("a", [*public, 1, 2, 3, 4], SIZE)
    everyones = prefix_keys("", public, SIZE)
    assert levels[:3] == [{own[0], everyones[0]}, {own[1], everyones[1]}, {own[2]}]


def test_an_adapters_chunks_have_the_base_models_keys() -> None:
    engine = SimulatedEngine(40, SIZE, vocab_size=50)
    prompt = list(range(9))
    engine.add(prompt, 1, adapter=AdapterUse(1, 0))
    plain = served((prompt, {}))
    assert engine.scheduler.has_unfinished()
    engine.run()
    assert heads_of(engine) == heads_of(plain)


def test_a_digest_has_whole_levels_only() -> None:
    prompts = [([i] * 12, {}) for i in range(5)]
    engine = served(*prompts)
    assert [len(level) for level in heads_of(engine)] == [5, 5, 5, 0]
    assert [len(level) for level in heads_of(engine, 14)] == [5, 5]
    assert heads_of(engine, 4) == []
    assert heads_of(served()) == [[]]


def test_a_digest_ends_at_its_last_level() -> None:
    prompt = [i % 50 for i in range(SIZE * (HEAD_LEVELS + 3))]
    assert len(heads_of(served((prompt, {})))) == HEAD_LEVELS
