"""Speculation changes how many steps an output takes, and nothing of the output, in fp32."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file
from tiny_model import write_tiny_model

from chunkllama.config import EngineConfig
from chunkllama.engine import draft_model, mask_threads, step_sampler
from chunkllama.engine.build import build_engine
from chunkllama.engine.core import EngineCore
from chunkllama.engine.size import plan_size
from chunkllama.errors import ConfigError
from chunkllama.messages import ChoiceDelta, EngineRequest, TokenLogprob
from chunkllama.sampling_params import GrammarSpec, SamplingParams, ThinkingSpec
from chunkllama.scheduler.memory_pressure import preemption_victim
from chunkllama.scheduler.model_drafts import DraftContext, ModelDrafts
from chunkllama.scheduler.step_cost import StepCost

TIE = 1e-4  # between log-probabilities of two orders of summation
EDGES = [1, 60, 62, 63, 64, 65, 126, 128]


@pytest.fixture
def free_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of guesses cost nothing, so that no measured time decides what a step checks."""
    monkeypatch.setattr(StepCost, "most_drafts", lambda self, num_sequences: 48)
    monkeypatch.setattr(
        StepCost, "curve", lambda self, num_sequences, num_drafts: np.ones(num_drafts)
    )


class Choice:
    """What one choice of a request got."""

    def __init__(self) -> None:
        self.token_ids: list[int] = []
        self.logprobs: list[TokenLogprob] = []
        self.reason: str | None = None

    def add(self, delta: ChoiceDelta) -> None:
        self.token_ids += delta.token_ids
        self.logprobs += delta.logprobs or []
        self.reason = delta.finish_reason


Outputs = dict[tuple[str, int], Choice]


def submit(core: EngineCore, requests: Iterable[dict[str, Any]]) -> None:
    fields = EngineRequest.__struct_fields__
    for number, request in enumerate(requests):
        params = {k: v for k, v in request.items() if k not in fields}
        own = {k: v for k, v in request.items() if k in fields}
        sampling = SamplingParams(**{"temperature": 0.0, "seed": number, **params})
        core.add(EngineRequest(request_id=f"r{number}", sampling=sampling, **own))


def finish(core: EngineCore, *, preempt: bool = False) -> tuple[Outputs, int]:
    """Run until nothing is left; returns the outputs and the number of steps.

    Args:
        preempt: requeue the newest sequence before every ninth step, as if the pool were full.
    """
    outputs: Outputs = {}
    steps = core.stats().steps_total
    scheduler = core._scheduler
    while core.has_work():
        victim = preemption_victim(scheduler._running)
        if preempt and victim is not None and core.stats().steps_total % 9 == 8:
            scheduler._lifecycle.preempt(victim)
        for delta in core.step():
            assert delta.error is None, delta.error
            for choice in delta.choices:
                outputs.setdefault((delta.request_id, choice.index), Choice()).add(choice)
    core.check_idle()
    stats = core.stats()
    assert stats.invariant_violations == stats.chunks_private == stats.chunks_referenced == 0
    return outputs, stats.steps_total - steps


def check_equal(plain: Outputs, drafted: Outputs) -> None:
    """Tokens, ends and log-probabilities agree; the last as far as two orders of summation do."""
    assert plain.keys() == drafted.keys()
    for key, one in plain.items():
        other = drafted[key]
        assert other.token_ids == one.token_ids, key
        assert other.reason == one.reason, key
        for a, b in zip(one.logprobs, other.logprobs, strict=True):
            assert (a.token_id, a.rank) == (b.token_id, b.rank), key
            assert a.logprob == pytest.approx(b.logprob, abs=TIE), key


def with_predictions(requests: list[dict[str, Any]], outputs: Outputs) -> list[dict[str, Any]]:
    """Requests that predict their first choice's output, with every seventh token wrong."""
    predicting = []
    for number, request in enumerate(requests):
        right = outputs[f"r{number}", 0].token_ids
        wrong = [(t + 1) % 250 + 3 if i % 7 == 5 else t for i, t in enumerate(right)]
        predicting.append({**request, "prediction_token_ids": wrong})
    return predicting


def mixed_requests() -> list[dict[str, Any]]:
    """Prompts with a common beginning, around the edges of chunks, with every kind of sampling."""
    rng = np.random.default_rng(3)
    text = rng.integers(3, 250, 128).tolist()
    kinds: list[dict[str, Any]] = [
        {"ignore_eos": True},
        {"temperature": 0.9, "top_p": 0.9, "ignore_eos": True},
        {"frequency_penalty": 0.4, "repetition_penalty": 1.2, "logprobs": 2},
        {"temperature": 0.7, "top_k": 20, "n": 2, "logprobs": 0},
        {"min_tokens": 20, "logit_bias": {2: 40.0}, "temperature": 1.0},
        {"stop_token_ids": (7, 8, 9, 10), "min_tokens": 9, "bad_words_token_ids": ((5, 6), (11,))},
        {"temperature": 1.0, "min_p": 0.05, "allowed_token_ids": tuple(range(40, 60))},
        {"n": 2, "beam_width": 3},
    ]
    return [
        {"prompt_token_ids": text[:length], "max_tokens": 70, **kinds[(i + shift) % len(kinds)]}
        for shift in (0, 3)
        for i, length in enumerate(EDGES)
    ]


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.usefixtures("free_rows")
def test_outputs_are_those_of_a_plain_run(tiny_core: Callable[..., EngineCore], backend) -> None:
    requests = mixed_requests()
    core = tiny_core(num_chunks=256, backend=backend)
    submit(core, requests)
    plain, _ = finish(core)
    for preempt in (False, True):
        core = tiny_core(num_chunks=256, backend=backend, speculation="auto")
        submit(core, with_predictions(requests, plain))
        drafted, _ = finish(core, preempt=preempt)
        check_equal(plain, drafted)
        stats = core.stats()
        assert 0 < stats.accepted_draft_tokens_total < stats.draft_tokens_total
        assert (stats.preemptions_total > 0) == preempt


@pytest.mark.usefixtures("free_rows")
def test_a_request_alone_takes_fewer_steps_by_its_own_text(tiny_core) -> None:
    """A small random model repeats itself sooner or later; so does the guess."""
    prompt = {"prompt_token_ids": [5, 6, 7] * 20, "max_tokens": 300, "ignore_eos": True}
    core = tiny_core()
    submit(core, [prompt])
    plain, steps = finish(core)
    core = tiny_core(speculation="auto")
    submit(core, [prompt])
    drafted, fewer = finish(core)
    check_equal(plain, drafted)
    stats = core.stats()
    assert steps == 300 and fewer == 300 - stats.accepted_draft_tokens_total
    assert stats.accepted_draft_tokens_total > 0


@pytest.mark.usefixtures("free_rows")
def test_a_tenant_is_helped_by_its_own_answers_alone(tiny_core) -> None:
    prompt = np.random.default_rng(5).integers(3, 250, 70).tolist()
    core = tiny_core(speculation="auto")

    def accepted(namespace: str, tenant: str, **params: object) -> int:
        before = core.stats().accepted_draft_tokens_total
        request = {"prompt_token_ids": prompt, "max_tokens": 12, "seed": 4, "ignore_eos": True}
        options = {"namespace": namespace, "tenant": tenant, "temperature": 1.5, **params}
        submit(core, [{**request, **options}])
        finish(core)
        return core.stats().accepted_draft_tokens_total - before

    first = accepted("a", "a")
    assert accepted("a", "a") > first, "the same answer again"
    assert accepted("b", "b") == first
    assert accepted("b", "a") == first
    hidden = accepted("c", "c", cache_until=10)
    assert accepted("c", "c") == hidden == first, "what is not to be shown is not kept"


@pytest.mark.usefixtures("free_rows")
def test_predictions_are_counted(tiny_core) -> None:
    core = tiny_core(speculation="auto")
    prompt = {"prompt_token_ids": [9, 8, 7], "max_tokens": 10, "ignore_eos": True}
    submit(core, [prompt])
    outputs, _ = finish(core)
    right = outputs["r0", 0].token_ids
    wrong = [(right[6] + 1) % 250, (right[7] + 1) % 250]
    submit(core, [{**prompt, "prediction_token_ids": [*right[:6], *wrong]}])
    accepted = rejected = 0
    while core.has_work():
        for delta in core.step():
            accepted += delta.num_accepted_predicted
            rejected += delta.num_rejected_predicted
    assert accepted >= 5 and rejected >= 2


@pytest.mark.parametrize("unknown", [-1, 300, 2**31])
def test_a_prediction_ends_before_a_token_that_the_model_does_not_have(tiny_core, unknown) -> None:
    core = tiny_core(speculation="auto")
    prompt = {"prompt_token_ids": [9, 8, 7], "max_tokens": 10, "ignore_eos": True}
    submit(core, [prompt])
    plain, _ = finish(core)
    right = plain["r0", 0].token_ids
    predicted = [*right[:4], unknown, *right[5:]]
    submit(core, [{**prompt, "prediction_token_ids": predicted}])
    (group,) = core._scheduler._groups.values()
    assert group.prediction.tolist() == right[:4]
    drafted, _ = finish(core)
    assert drafted["r0", 0].token_ids == right


SCHEMA = {
    "type": "object",
    "properties": {
        "first_name": {"type": "string", "maxLength": 6},
        "occupation": {"enum": ["gardener", "engineer"]},
        "identification_number": {"type": "integer", "minimum": 0, "maximum": 9},
    },
    "required": ["first_name", "occupation", "identification_number"],
    "additionalProperties": False,
}


@pytest.mark.usefixtures("free_rows")
def test_grammars_force_whole_runs_of_tokens(tiny_core, tmp_path, monkeypatch) -> None:
    for module in (mask_threads, step_sampler):  # no measured time makes a grammar a slow one
        monkeypatch.setattr(module, "SLOW_SECONDS", math.inf)
    write_tiny_model(tmp_path)
    grammar = GrammarSpec(kind="json_schema", text=json.dumps(SCHEMA))
    thoughts = ThinkingSpec(
        is_open=True, start_token_id=None, end="</think>", end_token_ids=(1, 2, 3, 4), budget=6
    )
    requests = [
        {"prompt_token_ids": [1, 100 + i, 200], "max_tokens": 120, "grammar": spec, **sampling}
        for i, spec in enumerate(
            [grammar, GrammarSpec(**{**to_dict(grammar), "thinking": thoughts})]
        )
        for sampling in ({}, {"temperature": 1.0, "logprobs": 1})
    ]
    options = {"model": str(tmp_path), "num_chunks": 64, "row_work_share": 100}
    core = tiny_core(**options)
    submit(core, requests)
    plain, _ = finish(core)
    core = tiny_core(**options, speculation="auto")
    submit(core, requests)
    drafted, _ = finish(core)
    check_equal(plain, drafted)
    assert all(choice.reason == "stop" for choice in plain.values())
    # how many steps that saves depends on when the masks of guesses are ready
    assert core.stats().accepted_draft_tokens_total > 0


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A model, one whose weights differ a little, and one with another tokenizer."""
    made = {name: tmp_path_factory.mktemp(name) for name in ("model", "near", "other")}
    for folder in made.values():
        write_tiny_model(folder)
    weights = load_file(made["near"] / "model.safetensors")
    noise = np.random.default_rng(1)
    for name, values in weights.items():
        weights[name] = values + noise.normal(0, 0.02, values.shape).astype(np.float32)
    save_file(weights, made["near"] / "model.safetensors")
    path = made["other"] / "tokenizer.json"
    content = json.loads(path.read_text())
    vocab = content["model"]["vocab"]
    vocab["a"], vocab["b"] = vocab["b"], vocab["a"]
    path.write_text(json.dumps(content))
    return made


@pytest.fixture
def core_of(models: dict[str, Path]) -> Iterator[Callable[..., EngineCore]]:
    """Build an engine of the model; ``draft`` names its draft model."""
    cores: list[EngineCore] = []

    def make(draft: str = "", **flat: Any) -> EngineCore:
        given = {"model": str(models["model"]), "dtype": "float32", "device": "cpu", "threads": 1}
        if draft:
            given |= {"speculation": "auto", "draft_model": str(models[draft])}
        cores.append(build_engine(EngineConfig.from_flat(**{**given, "num_chunks": 96, **flat})))
        return cores[-1]

    yield make
    for core in cores:
        core.close()


@pytest.fixture
def free_passes(free_rows: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Four guesses of the draft model in each step, and all the tokens that they need, cost
    nothing."""
    monkeypatch.setattr(ModelDrafts, "choose", lambda *_: (4, 1.0))
    monkeypatch.setattr(StepCost, "plain_seconds", lambda *_: 1e9)


@pytest.mark.parametrize(("draft", "backend"), [("model", "cpu"), ("near", "reference")])
@pytest.mark.usefixtures("free_passes")
def test_outputs_with_a_draft_model_are_those_of_a_plain_run(core_of, draft, backend) -> None:
    requests = [{**each, "max_tokens": 40} for each in mixed_requests()]
    core = core_of(backend=backend)
    submit(core, requests)
    plain, _ = finish(core)
    core = core_of(draft, backend=backend)
    submit(core, requests)
    drafted, _ = finish(core, preempt=draft == "near")
    check_equal(plain, drafted)
    stats = core.stats()
    assert 0 < stats.accepted_draft_tokens_total <= stats.draft_tokens_total


@pytest.mark.usefixtures("free_passes")
def test_a_draft_model_with_the_weights_of_the_model_is_right(core_of) -> None:
    """Greedy and drawn: it draws with the random numbers that the model's sampler has."""
    prompt = np.random.default_rng(2).integers(3, 250, 90).tolist()
    for params in ({}, {"temperature": 1.0}):
        core = core_of("model")
        submit(core, [{"prompt_token_ids": prompt, "max_tokens": 60, "ignore_eos": True, **params}])
        _, steps = finish(core)
        stats = core.stats()
        # Not those of texts, which may have a better chance and be wrong.
        assert stats.accepted_draft_tokens_total >= 0.7 * stats.draft_tokens_total
        assert steps < 30


@pytest.mark.usefixtures("free_passes")
def test_more_sequences_than_the_draft_models_pool_holds_are_right(core_of) -> None:
    """They share chunks of the model's pool, and each needs its own of the draft model's."""
    prompt = np.random.default_rng(2).integers(3, 250, 120).tolist()
    requests = [
        {"prompt_token_ids": [*prompt, number], "max_tokens": 50, "ignore_eos": True}
        for number in range(3, 15)
    ]
    core = core_of(num_chunks=30)
    submit(core, requests)
    plain, _ = finish(core)
    core = core_of("near", num_chunks=30)
    submit(core, requests)
    drafted, _ = finish(core)
    check_equal(plain, drafted)
    assert core.stats().accepted_draft_tokens_total > 0


def context_of(tokens: list[int]) -> DraftContext:
    greedy = SamplingParams(temperature=0.0, seed=0)
    return DraftContext(("r", 0), np.array(tokens, np.int32), len(tokens), greedy, 0)


def test_a_draft_model_without_memory_returns_what_it_has_and_pauses(
    core_of, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(draft_model, "PATIENCE", 3)
    draft = core_of("model")._executor.draft_model
    contexts = [context_of([5] * 70)]
    draft.begin_step(contexts)
    expected = draft.guess(contexts, 4)
    run, passes = draft._run, iter([True, True, False])

    def run_or_fail(pieces: list[Any]) -> Any:
        if not next(passes, False):
            raise torch.OutOfMemoryError("CUDA out of memory.\nAnd so on.")
        return run(pieces)

    monkeypatch.setattr(draft, "_run", run_or_fail)
    assert draft.begin_step(contexts) == [1]
    assert draft.guess(contexts, 4) == [expected[0][:2]]
    assert [draft.begin_step(contexts) for _ in range(4)] == [[None], [None], [None], [1]]
    longer = [context_of([5] * 100)]
    assert draft.begin_step(longer) == [31]
    assert draft.compute(longer, 16) == 0
    monkeypatch.undo()
    draft.warm_up()
    assert draft.begin_step(longer) == [31] and draft.compute(longer, 16) == 16
    assert draft.begin_step(longer) == [15]


@pytest.mark.usefixtures("free_passes")
def test_outputs_of_an_engine_whose_draft_model_runs_out_of_memory(
    core_of, monkeypatch: pytest.MonkeyPatch
) -> None:
    requests = [{**each, "max_tokens": 20} for each in mixed_requests()]
    core = core_of()
    submit(core, requests)
    plain, _ = finish(core)
    monkeypatch.setattr(draft_model, "PATIENCE", 2)
    core = core_of("model")
    draft = core._executor.draft_model
    run, passes = draft._run, itertools.count()

    def run_or_fail(pieces: list[Any]) -> Any:
        if next(passes) % 5 == 4:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return run(pieces)

    monkeypatch.setattr(draft, "_run", run_or_fail)
    submit(core, requests)
    drafted, _ = finish(core)
    check_equal(plain, drafted)
    assert next(passes) > 10 and core.stats().accepted_draft_tokens_total > 0


def test_a_computed_piece_is_waited_for_on_a_gpu(core_of, monkeypatch: pytest.MonkeyPatch) -> None:
    draft = core_of("model")._executor.draft_model
    contexts = [context_of([5] * 70)]
    waited: list[str] = []
    monkeypatch.setattr(draft, "_run", lambda pieces: SimpleNamespace(is_cuda=True, device="gpu"))
    monkeypatch.setattr(torch.cuda, "synchronize", waited.append)
    draft.begin_step(contexts)
    assert draft.compute(contexts, 16) == 16 and waited == ["gpu"]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"draft": "other"}, "draft_model: .* has another tokenizer"),
        ({"draft": "model", "speculation": "off"}, "draft_model: needs speculation auto"),
        ({"draft": "model", "tensor_parallel_size": 2}, "draft_model: needs tensor_parallel_size"),
        ({"draft_model": "/none", "speculation": "auto"}, "draft_model: /none: no such folder"),
    ],
)
def test_a_draft_model_that_cannot_be_used_is_refused_in_one_line(core_of, changes, words) -> None:
    with pytest.raises(ConfigError, match=words) as caught:
        core_of(**changes)
    assert "\n" not in str(caught.value)


def test_memory_of_a_draft_model_is_counted(models: dict[str, Path]) -> None:
    given = {"model": str(models["model"]), "kv_cache_memory": "8MiB"}
    draft = {"draft_model": given["model"], "speculation": "auto"}
    sizes = [
        plan_size(EngineConfig.from_flat(**settings), models["model"])
        for settings in (given, given | draft)
    ]
    plain, drafting = sizes
    assert drafting.weight_bytes == 2 * plain.weight_bytes
    assert drafting.num_chunks == plain.num_chunks // 2
    assert drafting.pool_bytes == plain.pool_bytes


def to_dict(spec: GrammarSpec) -> dict[str, Any]:
    return {name: getattr(spec, name) for name in spec.__struct_fields__}
