"""Random models of every supported family, and engines compared with transformers on them.

``tests/conftest.py`` makes this file importable as ``model_families`` anywhere under tests/.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import transformers

from chunkllama.engine.core import EngineCore
from chunkllama.messages import EngineRequest
from chunkllama.sampling_params import SamplingParams

BuildCore = Callable[..., EngineCore]

VOCAB = 151
LENGTHS = (1, 5, 64, 65, 300)
TOLERANCE = 4e-5
LONG_TOLERANCE = 2e-4  # of 3,000 tokens

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
    "phi3 short": ("Phi3", {"rope_parameters": LONGROPE, "original_max_position_embeddings": 384}),
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
    "hunyuan": ("HunYuanDenseV1", {}),
    "hunyuan alpha": (
        "HunYuanDenseV1",
        {
            "attention_bias": True,
            "rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "alpha": 1000.0}
            | {"factor": 1.0},
        },
    ),
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

# Shapes that every family is run with, beside its own cases.
SHAPES: dict[str, dict[str, Any]] = {
    "one kv head": {"hidden_size": 96, "num_attention_heads": 6, "num_key_value_heads": 1},
    "as many kv heads": {"hidden_size": 80, "num_attention_heads": 5, "num_key_value_heads": 5}
    | {"head_dim": 48, "intermediate_size": 72},
    "deep": {"num_hidden_layers": 9, "head_dim": 64, "intermediate_size": 160},
}


def _full_cases() -> dict[str, tuple[str, dict[str, Any]]]:
    """``CASES``, and the first of each family in every shape."""
    cases, seen = dict(CASES), set()
    for name, (family, changes) in CASES.items():
        if family not in seen:
            seen.add(family)
            cases |= {f"{name}, {s}": (family, {**changes, **SHAPES[s]}) for s in SHAPES}
    return cases


FULL_CASES = _full_cases()


def random_model(family: str, changes: dict[str, Any], attention: str = "eager") -> torch.nn.Module:
    """Random weights whose logits tell tokens apart; norms and biases are random too.

    ``attention`` is transformers' own.
    """
    config_class = getattr(transformers, {"Gemma3": "Gemma3TextConfig"}.get(family, ""), None)
    config_class = config_class or getattr(transformers, f"{family}Config")
    config = config_class(**{**SMALL, **changes}, attn_implementation=attention)
    torch.manual_seed(7)
    model = getattr(transformers, f"{family}ForCausalLM")(config).float().eval()
    fill_randomly(model)
    return model


@torch.no_grad()
def fill_randomly(model: torch.nn.Module) -> None:
    """As ``random_model`` does; draws from torch's own generator."""
    for name, parameter in model.named_parameters():
        if parameter.dim() >= 2:
            wide = "embed" in name or "lm_head" in name
            parameter.normal_(0, 0.15 if wide else 0.7 / parameter.shape[-1] ** 0.5)
        elif "norm" in name:
            parameter.add_(0.1 * torch.randn_like(parameter))
        else:
            parameter.normal_(0, 0.2)


@dataclass
class Answer:
    """What an engine returned for a prompt.

    Attributes:
        numbers: log-probabilities of the prompt from its second token on, if asked for, and of the
            answer.
        ids: the greedy answer.
        num_cached: tokens of the prompt that were read from the cache.
    """

    numbers: list[float] = field(default_factory=list)
    ids: list[int] = field(default_factory=list)
    num_cached: int = 0


def answers(
    core: EngineCore, prompts: list[list[int]], *, with_prompts: bool, max_tokens: int = 6
) -> list[Answer]:
    """Greedy answers to all prompts at once; ``with_prompts``: the log-probabilities of the
    prompts too, for which the engine computes all of their rows.
    """
    got = [Answer() for _ in prompts]
    for nth, prompt in enumerate(prompts):
        sampling = SamplingParams(
            **{"temperature": 0.0, "ignore_eos": True, "seed": 1, "logprobs": 0},
            max_tokens=max_tokens,
            prompt_logprobs=0 if with_prompts else None,
        )
        core.add(EngineRequest(request_id=str(nth), prompt_token_ids=prompt, sampling=sampling))
    while core.has_work():
        for delta in core.step():
            assert delta.error is None, delta.error
            answer = got[int(delta.request_id)]
            answer.numbers += [x.logprob for x in delta.prompt_logprobs or [] if x is not None]
            answer.num_cached = max(answer.num_cached, delta.num_cached_tokens)
            for choice in delta.choices:
                answer.ids += choice.token_ids
                answer.numbers += [x.logprob for x in choice.logprobs or []]
    return got


@functools.lru_cache(maxsize=16)
def log_probabilities(model: torch.nn.Module, ids: tuple[int, ...]) -> np.ndarray:
    """Of transformers: [len(ids), vocab_size] float32."""
    with torch.inference_mode():
        logits: torch.Tensor = model(torch.tensor([ids])).logits[0].float()
        values: np.ndarray = logits.log_softmax(-1).numpy()
        return values


def assert_equals_transformers(
    core: EngineCore,
    model: torch.nn.Module,
    lengths: tuple[int, ...],
    tolerance: float = TOLERANCE,
) -> None:
    """Prompts of these lengths that share a prefix, all at once; then again from the cache, with
    others that leave the longest of them at a half and three quarters: the same log-probabilities,
    and greedy tokens that are the best but for rounding.
    """
    rng = np.random.default_rng(3)
    text = rng.integers(3, VOCAB, max(lengths)).tolist()
    prompts = [
        [*text[: max(n - 3, 0)], *rng.integers(3, VOCAB, min(n, 3)).tolist()] for n in lengths
    ]
    longest = max(prompts, key=len)
    parting = [
        [*longest[:n], (longest[n] - 2) % (VOCAB - 3) + 3, 5]
        for n in (len(longest) // 2, 3 * len(longest) // 4)
        if n > 1
    ]
    for turn, asked in (("cold", prompts), ("warm", prompts + parting)):
        got = answers(core, asked, with_prompts=turn == "cold")
        for prompt, answer in zip(asked, got, strict=True):
            if turn == "warm":
                assert answer.num_cached == len(prompt) - (2 if prompt in parting else 1)
            whole = prompt + answer.ids
            expected = log_probabilities(model, tuple(whole[:-1]))
            chosen = expected[np.arange(len(whole) - 1), whole[1:]][-len(answer.numbers) :]
            assert np.abs(answer.numbers - chosen).max() <= tolerance, (turn, len(prompt))
            best = expected[len(prompt) - 1 :].max(axis=1)
            assert (best - chosen[-len(best) :]).max() <= 2 * tolerance, (turn, len(prompt))
