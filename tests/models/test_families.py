"""Every architecture against transformers: random models, the same log-probabilities and tokens."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from chunkllama.backends.cpu.fused_model import FusedModel, can_fuse
from chunkllama.backends.cpu.packed import PackedLinear
from chunkllama.backends.model import RunnableModel
from chunkllama.config import EngineConfig
from chunkllama.engine.build import build_engine
from chunkllama.engine.core import EngineCore
from chunkllama.engine.model_runner import build_attention, build_model
from chunkllama.errors import ConfigError
from chunkllama.messages import EngineRequest
from chunkllama.model_spec import ModelSpec
from chunkllama.models.architectures import ARCHITECTURES
from chunkllama.models.config import read_spec
from chunkllama.models.config_file import ConfigFile
from chunkllama.models.llama import Llama
from chunkllama.models.loading.safetensors import Checkpoint
from chunkllama.models.loading.weights import load_weights
from chunkllama.models.rotary import rotary_tables
from chunkllama.sampling_params import SamplingParams
from chunkllama.scheduler.output import ScheduledSlice, SchedulerOutput

VOCAB = 151
LENGTHS = (1, 5, 64, 65, 150)
TOLERANCE = 4e-5

SMALL: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}

LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0, 1.1, 1.2, 1.4],
    "long_factor": [1.0, 2.0, 4.0, 6.0],
    "partial_rotary_factor": 0.5,
}

# Name of a case -> (transformers class, changes of SMALL). A window of 256 hides nothing here.
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {}),
    "llama gelu": ("Llama", {"hidden_act": "gelu", "mlp_bias": True}),
    "llama dynamic": (
        "Llama",
        {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}},
    ),
    "mistral": ("Mistral", {"sliding_window": 256}),
    "mistral wide": ("Mistral", {"sliding_window": None, "head_dim": 32}),
    "ministral": ("Ministral", {"sliding_window": 256}),
    "qwen2": ("Qwen2", {}),
    "qwen2 tied": ("Qwen2", {"tie_word_embeddings": True, "num_key_value_heads": 4}),
    "qwen2 windows": (
        "Qwen2",
        {"use_sliding_window": True, "sliding_window": 256, "max_window_layers": 2},
    ),
    "qwen3": ("Qwen3", {}),
    "qwen3 bias": ("Qwen3", {"attention_bias": True, "head_dim": 32, "tie_word_embeddings": True}),
    "smollm3": ("SmolLM3", {}),
    "smollm3 list": (
        "SmolLM3",
        {"no_rope_layers": [0, 1, 1, 0], "attention_bias": True, "tie_word_embeddings": False},
    ),
    "phi3": ("Phi3", {}),
    "phi3 partial": (
        "Phi3",
        {
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 1e4,
                "partial_rotary_factor": 0.75,
            }
        },
    ),
    "phi3 short": ("Phi3", {"rope_parameters": LONGROPE, "original_max_position_embeddings": 256}),
    "granite": (
        "Granite",
        {
            "attention_multiplier": 0.1,
            "embedding_multiplier": 6.0,
            "residual_multiplier": 0.22,
            "logits_scaling": 3.0,
            "tie_word_embeddings": True,
        },
    ),
    "granite bias": ("Granite", {"attention_bias": True, "mlp_bias": True, "logits_scaling": 8.0}),
    "seed_oss": ("SeedOss", {}),
    "seed_oss out": ("SeedOss", {"attention_out_bias": True, "attention_bias": False}),
    "arcee": ("Arcee", {}),
    "arcee bias": ("Arcee", {"mlp_bias": True, "attention_bias": True}),
    "ernie": ("Ernie4_5", {}),
    "ernie bias": ("Ernie4_5", {"use_bias": True, "tie_word_embeddings": False}),
    "olmo2": ("Olmo2", {}),
    "olmo2 bias": ("Olmo2", {"attention_bias": True, "num_key_value_heads": 1}),
    "olmo3": ("Olmo3", {"sliding_window": 256}),
    "olmo3 yarn": (
        "Olmo3",
        {
            "sliding_window": 256,
            "rope_parameters": {
                "full_attention": {
                    "rope_type": "yarn",
                    "rope_theta": 1e4,
                    "factor": 4.0,
                    "original_max_position_embeddings": 128,
                },
                "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
            },
        },
    ),
    "exaone4": ("Exaone4", {"sliding_window": 256}),
    "exaone4 global": ("Exaone4", {"sliding_window": None, "layer_types": ["full_attention"] * 4}),
    "gemma": ("Gemma", {}),
    "gemma mqa": ("Gemma", {"num_key_value_heads": 1, "head_dim": 32}),
    "gemma2": ("Gemma2", {"sliding_window": 256, "query_pre_attn_scalar": 32}),
    "gemma2 caps": (
        "Gemma2",
        {
            "sliding_window": 256,
            "attn_logit_softcapping": 2.0,
            "final_logit_softcapping": 3.0,
            "query_pre_attn_scalar": 4,
        },
    ),
    "gemma3": ("Gemma3", {"sliding_window": 256, "query_pre_attn_scalar": 16}),
    "gemma3 linear": (
        "Gemma3",
        {
            "sliding_window": 256,
            "num_hidden_layers": 7,
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "rope_theta": 1e5, "factor": 8.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
            },
        },
    ),
}


def random_model(family: str, changes: dict[str, Any]) -> torch.nn.Module:
    """Random weights whose logits tell tokens apart; norms and biases are random too."""
    config_class = getattr(transformers, {"Gemma3": "Gemma3TextConfig"}.get(family, ""), None)
    config_class = config_class or getattr(transformers, f"{family}Config")
    config = config_class(**{**SMALL, **changes}, attn_implementation="eager")
    torch.manual_seed(7)
    model = getattr(transformers, f"{family}ForCausalLM")(config).float().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() >= 2:
                wide = "embed" in name or "lm_head" in name
                parameter.normal_(0, 0.15 if wide else 0.7 / parameter.shape[-1] ** 0.5)
            elif "norm" in name:
                parameter.add_(0.1 * torch.randn_like(parameter))
            else:
                parameter.normal_(0, 0.2)
    return model


@pytest.fixture(scope="module", params=CASES)
def case(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, torch.nn.Module]:
    family, changes = CASES[request.param]
    model = random_model(family, changes)
    folder = tmp_path_factory.mktemp("model")
    model.save_pretrained(folder)
    return folder, model


@pytest.fixture
def cores() -> Iterator[list[EngineCore]]:
    made: list[EngineCore] = []
    yield made
    for core in made:
        core.close()


def answers(core: EngineCore, prompts: list[list[int]]) -> list[tuple[np.ndarray, list[int]]]:
    """Log-probabilities of prompt and answer, and the greedy ids, of all prompts at once."""
    numbers: list[list[float]] = [[] for _ in prompts]
    ids: list[list[int]] = [[] for _ in prompts]
    for nth, prompt in enumerate(prompts):
        sampling = SamplingParams(
            max_tokens=6, temperature=0.0, ignore_eos=True, seed=1, logprobs=0, prompt_logprobs=0
        )
        core.add(EngineRequest(request_id=str(nth), prompt_token_ids=prompt, sampling=sampling))
    while core.has_work():
        for delta in core.step():
            assert delta.error is None, delta.error
            nth = int(delta.request_id)
            numbers[nth] += [x.logprob for x in delta.prompt_logprobs or [] if x is not None]
            for choice in delta.choices:
                ids[nth] += choice.token_ids
                numbers[nth] += [x.logprob for x in choice.logprobs or []]
    return [(np.array(values), tokens) for values, tokens in zip(numbers, ids, strict=True)]


def assert_equals_transformers(core: EngineCore, model: torch.nn.Module, lengths: tuple[int, ...]):
    rng = np.random.default_rng(3)
    text = rng.integers(3, VOCAB, max(lengths)).tolist()
    prompts = [
        [*text[: max(n - 3, 0)], *rng.integers(3, VOCAB, min(n, 3)).tolist()] for n in lengths
    ]
    for turn in ("cold", "warm"):
        for prompt, (numbers, ids) in zip(prompts, answers(core, prompts), strict=True):
            whole = prompt + ids
            with torch.inference_mode():
                logits = model(torch.tensor([whole[:-1]])).logits[0].float()
            expected = logits.log_softmax(-1).numpy()
            chosen = expected[np.arange(len(whole) - 1), whole[1:]]
            assert np.abs(numbers - chosen).max() <= TOLERANCE, (turn, len(prompt))
            gaps = expected[len(prompt) - 1 :].max(axis=1) - chosen[len(prompt) - 1 :]
            assert gaps.max() <= 2 * TOLERANCE, (turn, len(prompt))


@pytest.mark.parametrize("backend", ["reference", "auto"])
def test_log_probabilities_and_greedy_ids_equal_transformers(
    case: tuple[Path, torch.nn.Module], backend: str, cores: list[EngineCore]
) -> None:
    folder, model = case
    settings = {"dtype": "float32", "device": "cpu", "threads": 1, "num_chunks": 64}
    cores.append(
        build_engine(EngineConfig.from_flat(model=str(folder), backend=backend, **settings))
    )
    assert_equals_transformers(cores[0], model, LENGTHS)


def test_every_architecture_has_a_case() -> None:
    assert {f"{family}ForCausalLM" for family, _ in CASES.values()} == set(ARCHITECTURES)


def test_longrope_beyond_the_original_length_uses_the_long_factors(
    tmp_path: Path, cores: list[EngineCore]
) -> None:
    model = random_model(
        "Phi3", {"rope_parameters": LONGROPE, "original_max_position_embeddings": 64}
    )
    model.save_pretrained(tmp_path)
    settings = {"dtype": "float32", "device": "cpu", "threads": 1, "num_chunks": 64}
    short = build_engine(EngineConfig.from_flat(model=str(tmp_path), **settings))
    cores.append(short)
    assert short.info.max_model_len == 64
    assert_equals_transformers(short, model, (1, 5, 40))
    long = build_engine(EngineConfig.from_flat(model=str(tmp_path), max_model_len=300, **settings))
    cores.append(long)
    assert_equals_transformers(long, model, (65, 150))


@pytest.mark.parametrize("wanted", [None, 400])
def test_a_window_is_the_limit_of_a_sequence_with_a_warning(
    wanted: int | None, tmp_path: Path, cores: list[EngineCore], caplog: pytest.LogCaptureFixture
) -> None:
    model = random_model("Mistral", {"sliding_window": 100})
    model.save_pretrained(tmp_path)
    settings: dict[str, Any] = {"device": "cpu", "num_chunks": 16, "max_model_len": wanted}
    cores.append(build_engine(EngineConfig.from_flat(model=str(tmp_path), **settings)))
    assert cores[0].info.max_model_len == 100
    assert "sliding window" in caplog.text
    assert_equals_transformers(cores[0], model, (1, 90))


@pytest.mark.parametrize("is_equal", [True, False])
def test_a_head_beside_tied_embeddings_is_used_if_it_differs(
    is_equal: bool, tmp_path: Path, cores: list[EngineCore]
) -> None:
    """Fine-tunes and merged adapters leave one; transformers keeps it as well."""
    model = random_model("Llama", {})
    if is_equal:
        model.lm_head.weight.data.copy_(model.model.embed_tokens.weight)
    model.save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "tie_word_embeddings": True}))
    settings = {"dtype": "float32", "device": "cpu", "threads": 1, "num_chunks": 64}
    cores.append(build_engine(EngineConfig.from_flat(model=str(tmp_path), **settings)))
    assert_equals_transformers(cores[0], model, (5, 65))


def test_the_model_of_the_cpu_backend_equals_the_plain_one(
    case: tuple[Path, torch.nn.Module], rng: np.random.Generator
) -> None:
    """Fused where the kernels know the specification, else itself with packed weights."""
    folder, _ = case
    spec = read_spec(folder)
    if spec.attention_softcap is not None:
        pytest.skip("not run: the cpu backend has no soft cap of scores")
    ids = rng.integers(0, VOCAB, 70).astype(np.int32)
    results = []
    for is_plain in (True, False):
        attention = build_attention(
            spec, device="cpu", dtype=torch.float32, num_chunks=2, chunk_size=64, backend="cpu"
        )
        weights = load_weights(Checkpoint(folder, spec), spec, torch.float32, torch.device("cpu"))
        if is_plain:
            model: RunnableModel = Llama(spec, weights, attention, rotary_tables(spec, 128))
        else:
            model = build_model(spec, weights, attention, max_model_len=128)
            plain_layers = all(x.pre_norm and x.qk_norm == "none" for x in spec.layers)
            if isinstance(model, FusedModel):
                assert plain_layers
            else:
                assert isinstance(weights.layers[0].qkv, PackedLinear)
        piece = ScheduledSlice(0, 0, ids, np.arange(2, dtype=np.int32), 0, True)
        plan = attention.plan(SchedulerOutput(step=1, slices=[piece], plan_version=0))
        positions = torch.arange(len(ids), dtype=torch.int32)
        with torch.inference_mode():
            hidden = model.forward(torch.from_numpy(ids).long(), positions, plan)
            results.append(model.logits(hidden).clone())
    torch.testing.assert_close(*results, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("family", ["Llama", "Mistral", "Ministral", "Qwen2", "Phi3", "Ernie4_5"])
def test_families_of_plain_layers_run_fused(family: str) -> None:
    spec = spec_of(family)
    assert can_fuse(spec)


@pytest.mark.parametrize("family", ["Qwen3", "SmolLM3", "Granite", "Olmo2", "Arcee", "Gemma"])
def test_families_with_other_layers_run_plain(family: str) -> None:
    assert not can_fuse(spec_of(family))


def spec_of(family: str) -> ModelSpec:
    entry = ARCHITECTURES[f"{family}ForCausalLM"]
    values = {**SMALL, "attention_multiplier": 0.5, "residual_multiplier": 0.5}
    config = ConfigFile(Path("config.json"), values, entry.defaults)
    return ModelSpec(
        **{"num_layers": 4, "hidden_size": 64, "intermediate_size": 96, "num_qo_heads": 4},
        **{"num_kv_heads": 2, "head_dim": 16, "vocab_size": VOCAB, "max_position": 512},
        layers=entry.layers(config),
        ropes=entry.ropes(config, 16),
        **entry.fields(config),
    )


@pytest.mark.parametrize(
    ("family", "change", "words"),
    [
        ("Qwen3", {"layer_types": ["full_attention"], "use_sliding_window": True}, "layer_types"),
        ("Gemma3", {"layer_types": ["linear_attention"] * 4}, "'linear_attention' is not one of"),
        ("SmolLM3", {"no_rope_layers": [1, 0]}, "no_rope_layers"),
        ("Granite", {"logits_scaling": 0}, "logits_scaling must not be 0"),
        ("Phi3", {"partial_rotary_factor": 0.3}, "needs pairs"),
        ("Phi3", {"partial_rotary_factor": 2}, "above 0 and at most 1"),
        ("Gemma2", {"use_bidirectional_attention": True}, "only causal"),
        ("Mistral", {"sliding_window": 0}, "sliding_window must be a positive integer"),
    ],
)
def test_values_that_do_not_fit_are_named(family: str, change: dict[str, Any], words: str) -> None:
    entry = ARCHITECTURES[f"{family}ForCausalLM"]
    values = {**SMALL, "num_hidden_layers": 4, "sliding_window": 256, "head_dim": 10, **change}
    config = ConfigFile(Path("config.json"), values, entry.defaults)
    with pytest.raises(ConfigError, match=words):
        entry.layers(config), entry.fields(config), entry.ropes(config, 10)
