"""The model runner driven by hand-made steps on a tiny random Llama, transformers as the oracle."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from chunkllama.engine.load import load_step_model
from chunkllama.engine.model_runner import ModelRunner
from chunkllama.errors import ConfigError
from chunkllama.models.config import read_spec
from chunkllama.sampling_params import GrammarSpec, SamplingParams
from chunkllama.scheduler.output import NewSequence, SampledTokens, ScheduledSlice, SchedulerOutput

CHUNK, VOCAB = 16, 97
PROMPT = np.random.default_rng(1).integers(0, VOCAB, 45).tolist()
POISONED = 13  # a token whose embedding is NaN


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(3)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        initializer_range=0.3,
    )
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        model.model.embed_tokens.weight[POISONED] = float("nan")
    path = tmp_path_factory.mktemp("tiny")
    model.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def oracle(folder: Path) -> LlamaForCausalLM:
    return LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@pytest.fixture
def runner(folder: Path) -> ModelRunner:
    model = load_step_model(
        model_path=folder,
        spec=read_spec(folder),
        device="cpu",
        dtype="float32",
        num_chunks=16,
        chunk_size=CHUNK,
        max_model_len=128,
        backend="reference",
    )
    return ModelRunner(model, folder)


def without_poison(ids: Sequence[int]) -> list[int]:
    return [token if token != POISONED else 1 for token in ids]


CLEAN = without_poison(PROMPT)


def new(slot: int, prompt: list[int], output: Sequence[int] = (), **params: Any) -> NewSequence:
    pooling = params.pop("pooling", "")
    return NewSequence(
        slot=slot,
        request_id=f"r{slot}",
        index=0,
        sampling=SamplingParams(**{"seed": 1, "temperature": 0.0, **params}),
        prompt_token_ids=np.array(prompt, np.int32),
        output_token_ids=np.array(output, np.int32),
        pooling=pooling,
    )


def piece(slot: int, first: int, ids: list[int], **changes: Any) -> ScheduledSlice:
    """Slot s owns chunks 4s..4s+3."""
    chunks = np.arange(4 * slot, 4 * slot + 4, dtype=np.int32)
    options = {"shared": 0, "samples": True, **changes}
    return ScheduledSlice(slot, first, np.array(ids, np.int32), chunks, **options)


def step(runner: ModelRunner, slices: list[ScheduledSlice], **changes: Any) -> SampledTokens:
    return runner.execute(SchedulerOutput(step=1, slices=slices, plan_version=0, **changes))


def greedy(oracle: LlamaForCausalLM, prompt: list[int], count: int) -> list[int]:
    ids = list(prompt)
    for _ in range(count):
        with torch.inference_mode():
            ids.append(int(oracle(torch.tensor([ids])).logits[0, -1].argmax()))
    return ids[len(prompt) :]


def generate(runner: ModelRunner, slot: int, start: int, first: int, count: int) -> list[int]:
    tokens = [first]
    for position in range(start, start + count - 1):
        result = step(runner, [piece(slot, position, tokens[-1:])])
        tokens.append(result.token_ids[slot])
    return tokens


def test_slices_of_a_prompt_add_up(runner: ModelRunner, oracle: LlamaForCausalLM) -> None:
    first = step(runner, [piece(0, 0, CLEAN[:7], samples=False)], new_sequences=[new(0, CLEAN)])
    assert first.token_ids == {}
    step(runner, [piece(0, 7, CLEAN[7:33], samples=False)])
    last = step(runner, [piece(0, 33, CLEAN[33:])])
    assert generate(runner, 0, len(CLEAN), last.token_ids[0], 5) == greedy(oracle, CLEAN, 5)


def test_prefill_and_decode_share_a_step(runner: ModelRunner, oracle: LlamaForCausalLM) -> None:
    short = CLEAN[20:30]
    step(runner, [piece(1, 0, CLEAN)], new_sequences=[new(1, CLEAN)])
    token = greedy(oracle, CLEAN, 1)
    mixed = step(
        runner,
        [piece(0, 0, short), piece(1, len(CLEAN), token)],
        new_sequences=[new(0, short)],
    )
    assert mixed.token_ids == {0: greedy(oracle, short, 1)[0], 1: greedy(oracle, CLEAN, 2)[1]}


def test_copied_chunks_serve_the_copy(runner: ModelRunner, oracle: LlamaForCausalLM) -> None:
    """Ten tokens of slot 0's first chunk, copied to slot 1's, are not computed again."""
    step(runner, [piece(0, 0, CLEAN)], new_sequences=[new(0, CLEAN)])
    other = CLEAN[:10] + CLEAN[20:24]
    result = step(
        runner,
        [piece(1, 10, other[10:])],
        new_sequences=[new(1, other)],
        copies=[(0, 4, 10)],
        freed_slots=[0],
    )
    assert result.token_ids == {1: greedy(oracle, other, 1)[0]}


def test_prompt_logprobs_are_transformers(runner: ModelRunner, oracle: LlamaForCausalLM) -> None:
    options = {"wants_prompt_logits": True, "samples": False}
    sequence = new(0, CLEAN, prompt_logprobs=3)
    first = step(runner, [piece(0, 0, CLEAN[:20], **options)], new_sequences=[sequence])
    second = step(runner, [piece(0, 20, CLEAN[20:], **{**options, "samples": True})])
    entries = first.prompt_logprobs[0] + second.prompt_logprobs[0]
    with torch.inference_mode():
        expected = oracle(torch.tensor([CLEAN])).logits[0].log_softmax(dim=-1)
    assert len(entries) == len(CLEAN) - 1
    for row, entry in enumerate(entries):
        assert entry.token_id == CLEAN[row + 1]
        assert entry.logprob == pytest.approx(float(expected[row, entry.token_id]), abs=1e-4)
        assert entry.rank == int((expected[row] > expected[row, entry.token_id]).sum()) + 1
        assert [token for token, _ in entry.top] == expected[row].topk(3).indices.tolist()


@pytest.mark.parametrize("pooling", ["mean", "last"])
def test_embeddings_pool_over_slices(
    pooling: str, runner: ModelRunner, oracle: LlamaForCausalLM
) -> None:
    sequence = new(0, CLEAN, pooling=pooling, max_tokens=0)
    first = step(runner, [piece(0, 0, CLEAN[:20], samples=False)], new_sequences=[sequence])
    assert first.embeddings == {}
    second = step(runner, [piece(0, 20, CLEAN[20:], samples=False)])
    with torch.inference_mode():
        hidden = oracle.model(torch.tensor([CLEAN])).last_hidden_state[0]
    pooled = hidden.mean(dim=0) if pooling == "mean" else hidden[-1]
    expected = torch.nn.functional.normalize(pooled, dim=0)
    np.testing.assert_allclose(second.embeddings[0], expected.numpy(), atol=1e-5)
    assert np.linalg.norm(second.embeddings[0]) == pytest.approx(1.0, abs=1e-5)


def test_nan_fails_its_own_sequences_only(runner: ModelRunner, oracle: LlamaForCausalLM) -> None:
    bad = [*CLEAN[:8], POISONED, *CLEAN[8:12]]
    pooled = {"pooling": "mean", "max_tokens": 0}
    result = step(
        runner,
        [
            piece(0, 0, CLEAN),
            piece(1, 0, bad),
            piece(2, 0, bad, samples=False),
            piece(3, 0, bad, samples=False, wants_prompt_logits=True),
        ],
        new_sequences=[
            new(0, CLEAN),
            new(1, bad),
            new(2, bad, **pooled),
            new(3, bad, prompt_logprobs=0),
        ],
    )
    assert result.failed == dict.fromkeys((1, 2, 3), "model_nan")
    assert result.token_ids == {0: greedy(oracle, CLEAN, 1)[0]}
    assert result.embeddings == {}
    again = step(runner, [piece(0, len(CLEAN), [result.token_ids[0]])])
    assert again.token_ids == {0: greedy(oracle, CLEAN, 2)[1]}


def test_a_resent_sequence_draws_on_where_it_was(runner: ModelRunner) -> None:
    """After a preemption the random numbers, penalties and tokens go on as if nothing happened."""
    params = {"temperature": 1.3, "presence_penalty": 0.7, "seed": 9}
    first = step(runner, [piece(0, 0, CLEAN)], new_sequences=[new(0, CLEAN, **params)])
    tokens = generate(runner, 0, len(CLEAN), first.token_ids[0], 8)
    resumed = step(
        runner,
        [piece(1, 0, CLEAN + tokens[:4])],
        new_sequences=[new(1, CLEAN, tokens[:4], **params)],
        freed_slots=[0],
    )
    assert generate(runner, 1, len(CLEAN) + 4, resumed.token_ids[1], 4) == tokens[4:]


def test_a_slot_freed_and_taken_in_one_step_is_the_new_sequence(runner: ModelRunner) -> None:
    step(runner, [piece(0, 0, CLEAN)], new_sequences=[new(0, CLEAN, logit_bias={5: 100.0})])
    again = step(
        runner,
        [piece(0, 0, CLEAN)],
        freed_slots=[0],
        new_sequences=[new(0, CLEAN, logit_bias={6: 100.0})],
    )
    assert again.token_ids == {0: 6}


def test_choices_share_the_mask_of_allowed_tokens(runner: ModelRunner) -> None:
    states = [
        runner._new_state(new(slot, [5, 6], allowed_token_ids=ids))
        for slot, ids in enumerate(((3, 40), (3, 40), (3, 41), ()))
    ]
    masks = [state.allowed_mask(4) for state in states]
    assert masks[0] is masks[1] and masks[0] is not masks[2] and masks[3] is None


def test_a_grammar_without_a_tokenizer_fails_its_request_only(runner: ModelRunner) -> None:
    grammar = GrammarSpec(kind="choice", text='["a"]')
    result = step(
        runner,
        [piece(0, 0, CLEAN), piece(1, 0, CLEAN)],
        new_sequences=[new(0, CLEAN, grammar=grammar), new(1, CLEAN)],
    )
    assert set(result.token_ids) == {1}
    while result.deferred:
        result = step(runner, [], awaited=[0])
    assert result.failed == {0: "grammar_error"}


class Panic(BaseException):
    """As the grammar library reports a failed assertion."""


@pytest.mark.parametrize("error", [RuntimeError, MemoryError, Panic])
@pytest.mark.parametrize("is_compiled", [False, True])
def test_any_error_of_a_grammar_fails_its_request_only(runner, monkeypatch, error, is_compiled):
    class Compiler:
        def has(self, _grammar: GrammarSpec) -> bool:
            return is_compiled

        def prepare(self, _grammar: GrammarSpec) -> None:
            raise error

        def maker(self, *_: Any) -> Any:
            return self.matcher if is_compiled else None

        def matcher(self, *_: Any) -> None:
            raise error

    monkeypatch.setattr(runner, "_grammars", Compiler())
    grammar = GrammarSpec(kind="json_object", text="")
    preparation = runner.prepare(SamplingParams(seed=1, grammar=grammar))
    assert (preparation is None) == is_compiled
    assert is_compiled or isinstance(preparation.exception(), error)
    result = step(
        runner,
        [piece(0, 0, CLEAN), piece(1, 0, CLEAN)],
        new_sequences=[new(0, CLEAN, grammar=grammar), new(1, CLEAN)],
    )
    assert 1 in result.token_ids
    while result.deferred:
        result = step(runner, [], awaited=[0])
    assert result.failed == {0: "grammar_error"}
    runner.close()


class Faulty:
    """A grammar of any text, one of whose methods raises an error."""

    is_finished = is_closing = False
    error = ""

    def __init__(self, method: str, error: type[BaseException]) -> None:
        def fail(*_: Any, **__: Any) -> None:
            raise error

        members = property(fail) if method.startswith("is_") else fail
        self.__class__ = type("Faulty", (Faulty,), {method: members})

    def fill_mask(self, mask: Any, *, whole: bool = False) -> None:
        mask.fill(-1)

    def accept(self, token_id: int) -> bool:
        return True

    def forced(self) -> list[int]:
        return []


@pytest.mark.parametrize("error", [RuntimeError, Panic])
@pytest.mark.parametrize("method", ["fill_mask", "accept", "is_finished", "forced"])
def test_an_error_in_a_step_of_a_grammar_fails_its_request_only(runner, monkeypatch, error, method):
    class Compiler:
        def maker(self, *_: Any) -> Any:
            return lambda: Faulty(method, error)

    monkeypatch.setattr(runner, "_grammars", Compiler())
    grammar = GrammarSpec(kind="json_object", text="")
    sequences = [new(0, CLEAN, grammar=grammar), new(1, CLEAN)]
    slices = [piece(0, 0, CLEAN), piece(1, 0, CLEAN)]
    result = step(runner, slices, new_sequences=sequences, wants_forced=True)
    positions = [len(CLEAN), len(CLEAN)]
    # An error of the last method shows later.
    while 0 not in result.failed and positions[0] < len(CLEAN) + 2:
        assert 1 in result.token_ids
        ids = {**{0: 1}, **result.token_ids}
        slices = [piece(1, positions[1], [ids[1]])]
        positions[1] += 1
        if result.deferred:  # its mask is not there yet
            time.sleep(0.05)
        else:
            slices.insert(0, piece(0, positions[0], [ids[0]]))
            positions[0] += 1
        result = step(runner, slices, awaited=[*result.deferred], wants_forced=True)
    assert result.failed == {0: "grammar_error"}
    runner.close()


def test_a_weight_storage_the_backend_lacks_is_refused(folder: Path) -> None:
    with pytest.raises(ConfigError, match="quantization: int8"):
        load_step_model(
            model_path=folder,
            spec=read_spec(folder),
            device="cpu",
            dtype="float32",
            num_chunks=4,
            chunk_size=CHUNK,
            max_model_len=128,
            backend="reference",
            weights="int8",
        )


def test_grammar_output_of_the_demo_model(demo_path: Path) -> None:
    """Masks reach the logits: a choice is answered with one of its strings, then reported done."""
    model = load_step_model(
        model_path=demo_path,
        spec=read_spec(demo_path),
        device="cpu",
        dtype="float32",
        num_chunks=8,
        chunk_size=64,
        max_model_len=256,
        backend="reference",
    )
    runner = ModelRunner(model, demo_path)
    grammar = GrammarSpec(kind="regex", text="(yes|no)!")
    sequence = new(0, [1, 2, 3], grammar=grammar, temperature=1.0)
    preparation = runner.prepare(sequence.sampling)
    assert preparation is not None
    preparation.result()
    result = step(runner, [piece(0, 0, [1, 2, 3])], new_sequences=[sequence])
    tokens = [result.token_ids[0]]
    while 0 not in result.finished_grammar:
        result = step(runner, [piece(0, 2 + len(tokens), tokens[-1:])])
        tokens.append(result.token_ids[0])
        assert len(tokens) < 8
    from chunkllama.text.tokenizer import load_tokenizer

    assert load_tokenizer(demo_path).decode(tokens) in ("yes!", "no!")
    runner.close()
