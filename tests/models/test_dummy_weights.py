"""Models of sizes alone: their folder, their random weights, and an engine that serves them."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path

import pytest
import torch
import yaml

from chunkllama.backends.cpu.build import library_directory
from chunkllama.backends.model import Linear, ModelWeights
from chunkllama.config import EngineConfig
from chunkllama.engine.build import build_engine
from chunkllama.engine.size import plan_size
from chunkllama.errors import ConfigError
from chunkllama.llm import LLM
from chunkllama.models.config import read_spec
from chunkllama.models.loading.hub import resolve_model
from chunkllama.models.loading.shapes import Shapes
from chunkllama.models.loading.weights import dummy_weights
from chunkllama.models.shard import Shard
from chunkllama.sampling_params import SamplingParams
from chunkllama.text.tokenizer import load_tokenizer

ROOT = Path(__file__).parents[2]
SIZES = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "torch_dtype": "float32",
}
GREEDY = SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True)


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """Write a file of sizes; folders made of it are the test's own."""
    monkeypatch.setenv("CHUNKLLAMA_NATIVE_DIR", str(library_directory()))  # not compiled again
    monkeypatch.setenv("CHUNKLLAMA_CACHE", str(tmp_path / "cache"))

    def make(name: str = "small.yaml", **changes: object) -> Path:
        path = tmp_path / name
        path.write_text(yaml.safe_dump({**SIZES, **changes}))
        return path

    return make


def tensors(weights: ModelWeights) -> dict[str, torch.Tensor]:
    parts = {"embedding": weights.embedding, "norm": weights.norm, "head": weights.lm_head}
    for index, layer in enumerate(weights.layers):
        parts |= {f"{index}.{item.name}": getattr(layer, item.name) for item in fields(layer)}
    return {
        name: part.weight if isinstance(part, Linear) else part
        for name, part in parts.items()
        if part is not None
    }


@pytest.mark.parametrize(
    ("name", "parameters"), [("llama-2-7b", 6_738_415_616), ("llama-3.1-8b", 8_030_261_248)]
)
def test_the_shapes_that_come_with_the_server(
    name: str, parameters: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The numbers of parameters are the published ones; of weights only sizes are known."""
    monkeypatch.setenv("CHUNKLLAMA_CACHE", str(tmp_path))
    model = str(ROOT / "configs" / "models" / f"{name}.yaml")
    folder = resolve_model(model)
    spec = read_spec(folder)
    assert sum(math.prod(info.shape) for info in Shapes(spec)) == parameters
    config = EngineConfig.from_flat(model=model, load_format="dummy", num_chunks=2, device="cpu")
    size = plan_size(config, folder)
    assert (size.weight_bytes, size.dtype) == (2 * parameters, "bfloat16")


def test_every_id_of_a_shape_has_a_text(write: Callable[..., Path]) -> None:
    folder = resolve_model(str(write()))
    tokenizer = load_tokenizer(folder)
    assert tokenizer.vocab_size == SIZES["vocab_size"]
    assert tokenizer.eos_token_ids == (258,) and set(read_spec(folder).eos_token_ids) == {258}
    text = "Grüße, 42 \n"
    assert tokenizer.encode(text) == [*tokenizer.encode("Gr"), *tokenizer.encode(text)[2:]]
    assert len(tokenizer.encode(text)) == len(text.encode())
    assert tokenizer.decode(tokenizer.encode(text)) == text
    plain = [i for i in range(256, 320) if i not in tokenizer.special_ids]
    assert len({tokenizer.decode([i]) for i in plain}) == len(plain) == 61


def test_another_content_is_another_folder(write: Callable[..., Path]) -> None:
    first = resolve_model(str(write()))
    assert resolve_model(str(write())) == first
    second = resolve_model(str(write(num_hidden_layers=3)))
    assert second != first and read_spec(second).num_layers == 3


def test_dummy_weights_are_a_function_of_the_seed(write: Callable[..., Path]) -> None:
    spec, cpu = read_spec(resolve_model(str(write()))), torch.device("cpu")
    first, again, other = (
        tensors(dummy_weights(spec, seed, torch.bfloat16, cpu)) for seed in (1, 1, 2)
    )
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not any(torch.equal(first[name], other[name]) for name in first)
    assert {tensor.dtype for tensor in first.values()} == {torch.bfloat16}
    deviation = first["0.qkv"].float().std().item()
    assert abs(deviation * spec.hidden_size**0.5 - 1) < 0.05
    assert abs(first["norm"].float().mean().item() - 1) < 0.1


def test_ranks_draw_parts_of_one_model(write: Callable[..., Path]) -> None:
    spec, cpu = read_spec(resolve_model(str(write()))), torch.device("cpu")
    whole = tensors(dummy_weights(spec, 3, torch.float32, cpu))
    parts = [
        tensors(dummy_weights(spec, 3, torch.float32, cpu, Shard(rank, 2, lambda x: x)))
        for rank in range(2)
    ]
    assert all(torch.equal(part["head"], whole["head"]) for part in parts)
    down = torch.cat([part["1.down"] for part in parts], dim=1)
    assert torch.equal(down, whole["1.down"])


@pytest.mark.parametrize("settings", [{}, {"quantization": "int4", "dtype": "bfloat16"}])
def test_a_shape_is_served(write: Callable[..., Path], settings: dict[str, str]) -> None:
    def answer(seed: int) -> list[int]:
        llm = LLM(
            str(write()), load_format="dummy", seed=seed, num_chunks=8, device="cpu", **settings
        )
        (output,) = llm.generate("Hello", GREEDY, use_progress_bar=False)
        return output.outputs[0].token_ids

    first = answer(1)
    assert len(first) == 8 and answer(1) == first != answer(2)


def test_a_shape_may_have_a_draft_model_of_sizes(write: Callable[..., Path]) -> None:
    model = str(write(num_hidden_layers=3))
    draft = str(write("draft.yaml"))
    given = {"model": model, "load_format": "dummy", "num_chunks": 8, "device": "cpu"}
    config = EngineConfig.from_flat(**given, draft_model=draft, speculation="auto")
    size = plan_size(config, resolve_model(model))
    assert size.draft is not None and 0 < 2 * size.draft.weight_bytes < size.weight_bytes
    build_engine(config).close()


def test_a_folder_without_weights_is_served(tiny_folder: Path) -> None:
    (tiny_folder / "model.safetensors").unlink()
    config = {"model": str(tiny_folder), "num_chunks": 4, "device": "cpu"}
    build_engine(EngineConfig.from_flat(**config, load_format="dummy")).close()
    with pytest.raises(ConfigError, match=r"no model.safetensors"):
        build_engine(EngineConfig.from_flat(**config))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("vocab_size: 100\n", "unsupported architecture"),
        ("- 1\n", "maps the keys of config.json to values"),
        ("a: [\n", "not valid YAML"),
        ("#" * 70_000, "larger than 64 KiB"),
        (yaml.safe_dump({**SIZES, "vocab_size": 200}), "vocab_size must be at least 259"),
        (yaml.safe_dump({**SIZES, "hidden_size": "x"}), "hidden_size must be a positive integer"),
    ],
    ids=["no architecture", "a list", "no YAML", "too large", "too few tokens", "a text"],
)
def test_files_that_describe_no_model(write: Callable[..., Path], text: str, message: str) -> None:
    path = write()
    path.write_text(text)
    with pytest.raises(ConfigError, match=message) as raised:
        resolve_model(str(path))
    assert str(path) in str(raised.value) and "\n" not in str(raised.value)


def test_sizes_need_dummy_weights(write: Callable[..., Path]) -> None:
    with pytest.raises(ConfigError, match="load_format: the model is sizes without weights"):
        build_engine(EngineConfig.from_flat(model=str(write()), num_chunks=4, device="cpu"))


def test_dummy_weights_need_an_architecture_of_the_server(write: Callable[..., Path]) -> None:
    path = write(architectures=["MixtralForCausalLM"])
    with pytest.raises(ConfigError, match="dummy needs an architecture of this server"):
        build_engine(
            EngineConfig.from_flat(model=str(path), load_format="dummy", num_chunks=4, device="cpu")
        )
