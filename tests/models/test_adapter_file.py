"""Adapter folders: what is refused, in one line that names the file and the field."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from adapter_files import ALL, write_adapter
from safetensors.numpy import load_file, save_file
from tiny_model import write_tiny_model

from chunkllama.errors import ConfigError
from chunkllama.models.config import read_spec
from chunkllama.models.loading.adapter_file import read_adapter
from chunkllama.models.loading.adapter_weights import load_adapter_weights

HUGE = "(((a?){100}){100}){100}"  # compiled it takes gigabytes
Q = "base_model.model.model.layers.0.self_attn.q_proj"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    write_tiny_model(folder)
    return folder


def change_tensors(change: Callable[[dict[str, np.ndarray]], None]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        tensors = load_file(folder / "adapter_model.safetensors")
        change(tensors)
        save_file(tensors, folder / "adapter_model.safetensors")

    return apply


def cut(folder: Path) -> None:
    path = folder / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])


def lengthen(folder: Path) -> None:
    with (folder / "adapter_model.safetensors").open("ab") as file:
        file.write(b"x")


def pickle_only(folder: Path) -> None:
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")


def pipe(name: str) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        (folder / name).unlink()
        os.mkfifo(folder / name)

    return apply


def device(folder: Path) -> None:
    (folder / "adapter_model.safetensors").unlink()
    (folder / "adapter_model.safetensors").symlink_to("/dev/zero")


def grow(name: str, size: int) -> Callable[[Path], None]:
    return lambda folder: os.truncate(folder / name, size)


def set_tensor(name: str, value: np.ndarray) -> Callable[[Path], None]:
    return change_tensors(lambda tensors: tensors.__setitem__(name, value))


BAD_CONFIGS: list[tuple[dict[str, Any], str]] = [
    ({"r": 0}, "r must be a rank from 1 to 128, got 0"),
    ({"r": 129}, "r must be a rank from 1 to 128, got 129"),
    ({"r": True}, "r must be a rank"),
    ({"r": 4}, "q_proj.lora_A.weight has shape [8, 128], rank and base model ask for [4, 128]"),
    ({"rank_pattern": {"q_proj": 200}}, "rank_pattern 'q_proj' must be a rank from 1 to 128"),
    ({"rank_pattern": {"q_proj": 4}}, "has shape [8, 128], rank and base model ask for [4, 128]"),
    ({"rank_pattern": {"(": 8}}, "'(.*\\\\.)?(()' is no pattern"),
    ({"rank_pattern": 8}, "rank_pattern must be an object"),
    ({"lora_alpha": None}, "lora_alpha must be a positive number"),
    ({"lora_alpha": float("inf")}, "lora_alpha must be a positive number"),
    ({"lora_alpha": 10**400}, "lora_alpha must be a positive number up to 1000000, got 1000"),
    ({"lora_alpha": 1e308}, "lora_alpha must be a positive number up to 1000000, got 1e+308"),
    ({"lora_alpha": float("nan")}, "lora_alpha must be a positive number"),
    ({"alpha_pattern": {"q_proj": 10**400}}, "alpha_pattern 'q_proj' must be a positive number"),
    ({"r": 10**400}, "r must be a rank"),
    ({"init_lora_weights": "pissa"}, "init_lora_weights 'pissa' changes the model's own weights"),
    ({"init_lora_weights": "pissa_niter_16"}, "convert the adapter to an ordinary one with PEFT"),
    ({"init_lora_weights": "OLoRA"}, "init_lora_weights 'OLoRA' changes the model's own weights"),
    ({"init_lora_weights": "corda"}, "convert the adapter to an ordinary one with PEFT"),
    ({"init_lora_weights": "loftq"}, "convert the adapter to an ordinary one with PEFT"),
    ({"init_lora_weights": "lora_ga"}, "convert the adapter to an ordinary one with PEFT"),
    ({"kasa_config": {"beta": 1e-4, "gamma": 1e-3}}, "kasa_config is not supported"),
    ({"alpha_pattern": {"q_proj": "x"}}, "alpha_pattern 'q_proj' must be a positive number"),
    ({"peft_type": "IA3"}, "peft_type 'IA3' is not supported; use LORA"),
    ({"use_dora": True}, "use_dora is not supported"),
    ({"use_qalora": True}, "use_qalora is not supported"),
    ({"bias": "all"}, "bias 'all' is not supported; use none"),
    ({"lora_bias": True}, "lora_bias is not supported"),
    ({"modules_to_save": ["lm_head"]}, "modules_to_save is not supported"),
    ({"fan_in_fan_out": True}, "fan_in_fan_out is not supported"),
    ({"layer_replication": [[0, 1]]}, "layer_replication is not supported"),
    ({"target_parameters": ["x"]}, "target_parameters is not supported"),
    ({"trainable_token_indices": [1]}, "trainable_token_indices is not supported"),
    ({"target_modules": ["q_proj"]}, "down_proj.lora_A.weight: target_modules does not name"),
    ({"target_modules": 7}, "target_modules must be a pattern or a list of names"),
    ({"target_modules": "("}, "target_modules: '(' is no pattern"),
    ({"target_modules": HUGE}, "target_modules: '(((a?){100}){100}){100}' repeats too often"),
    ({"exclude_modules": HUGE}, "exclude_modules: '(((a?){100}){100}){100}' repeats too often"),
    ({"rank_pattern": {HUGE: 8}}, "repeats too often; the product of its counts may be 256"),
    ({"alpha_pattern": {HUGE: 8}}, "repeats too often; the product of its counts may be 256"),
    ({"target_modules": "(a{16}){17}"}, "repeats too often"),
    ({"target_modules": "(a{0,300})?"}, "repeats too often"),
    ({"target_modules": "(a{300,})?"}, "repeats too often"),
    ({"target_modules": "(?x)(a?){1 00 0}"}, "braces may hold a count of repetitions only"),
    ({"target_modules": "(a?){10000}"}, "braces may hold a count of repetitions only"),
    ({"target_modules": "(?:q){e<=9}"}, "braces may hold a count of repetitions only"),
    ({"target_modules": "a" * 1025}, "has 1025 characters; a pattern may have 1024"),
    ({"target_modules": "(" * 500 + ")" * 500}, "is nested too deeply"),
    ({"exclude_modules": ["q_proj"]}, "q_proj.lora_A.weight: target_modules does not name"),
    ({"layers_to_transform": [1]}, "target_modules does not name its module"),
    ({"alora_invocation_tokens": []}, "must be a list of 1 to 256 token ids"),
    ({"alora_invocation_tokens": [259]}, "259 is no token id below 259"),
    ({"alora_invocation_tokens": ["a"]}, "'a' is no token id below 259"),
]
BAD_FILES: list[tuple[Callable[[Path], None], str]] = [
    (cut, "its tensors end at byte"),
    (lengthen, "its tensors end at byte"),
    (pipe("adapter_model.safetensors"), "safetensors: a device, pipe or socket, not a file"),
    (pipe("adapter_config.json"), "adapter_config.json: a device, pipe or socket, not a file"),
    (device, "a device, pipe or socket, not a file"),
    (grow("adapter_model.safetensors", 1 << 40), "bytes, an adapter of this model at most"),
    (grow("adapter_config.json", 1 << 40), "bytes, an adapter of this model at most 1048576"),
    (pickle_only, "pickled weights can run code when loaded and are refused"),
    (
        lambda folder: (folder / "adapter_config.json").unlink(),
        "adapter_config.json: missing; an adapter is",
    ),
    (lambda folder: (folder / "adapter_model.safetensors").unlink(), "safetensors: cannot be read"),
    (lambda folder: (folder / "adapter_config.json").write_text("["), "not valid JSON"),
    (set_tensor(f"{Q}.lora_B.weight", np.zeros((64, 8), np.float32)), "ask for [128, 8]"),
    (set_tensor(f"{Q}.lora_A.weight", np.zeros((8, 128), np.int32)), "is I32; supported: F32"),
    (set_tensor(f"{Q}.lora_magnitude_vector", np.zeros(128, np.float32)), "DoRA is not supported"),
    (
        set_tensor("base_model.model.lm_head.lora_A.weight", np.zeros((8, 128), np.float32)),
        "adapters of the head and of embeddings are not supported",
    ),
    (
        set_tensor(Q.replace("0", "2") + ".lora_A.weight", np.zeros((8, 128), np.float32)),
        "the model has no such linear layer",
    ),
    (change_tensors(lambda tensors: tensors.pop(f"{Q}.lora_A.weight")), "has no tensor base_model"),
]


@pytest.mark.parametrize(("config", "message"), BAD_CONFIGS, ids=lambda value: str(value)[:40])
def test_a_configuration_that_cannot_be_served_is_refused_by_name(
    model: Path, tmp_path: Path, config: dict[str, Any], message: str
) -> None:
    folder = write_adapter(tmp_path / "a", model, **config)
    with pytest.raises(ConfigError) as refused:
        read_adapter(folder, read_spec(model))
    assert message in str(refused.value) and str(folder) in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(("damage", "message"), BAD_FILES, ids=range(len(BAD_FILES)))
def test_files_that_are_damaged_or_of_another_model_are_refused(
    model: Path, tmp_path: Path, damage: Callable[[Path], None], message: str
) -> None:
    folder = write_adapter(tmp_path / "a", model)
    damage(folder)
    with pytest.raises(ConfigError) as refused:
        read_adapter(folder, read_spec(model))
    assert message in str(refused.value) and "\n" not in str(refused.value)


def test_an_adapter_of_another_shape_or_kind_of_model_is_refused(
    model: Path, tmp_path: Path
) -> None:
    other = tmp_path / "other"
    other.mkdir()
    write_tiny_model(other)
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**config, "intermediate_size": 64}))
    folder = write_adapter(tmp_path / "a", model)
    with pytest.raises(ConfigError, match=r"was it trained for this model\?"):
        read_adapter(folder, read_spec(other))
    config |= {"architectures": ["MixtralForCausalLM"], "model_type": "mixtral"}
    (other / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match="need an architecture of this server, not Mixtral"):
        read_adapter(folder, read_spec(other))
    with pytest.raises(ConfigError, match="no such folder"):
        read_adapter(tmp_path / "nothing", read_spec(model))


def test_what_peft_accepts_is_read(model: Path, tmp_path: Path) -> None:
    spec = read_spec(model)
    for number, config in enumerate(
        (
            {"target_modules": "all-linear"},
            {"target_modules": "ALL-LINEAR", "exclude_modules": None},
            {"target_modules": [f"model.layers.{i}.self_attn.q_proj" for i in range(2)], "t": 1},
            {"target_modules": r".*\d\.mlp\..*", "t": 2},
            {"target_modules": r"model\.layers\.\d{1,2}\.[a-z_]{9}\.q_proj", "t": 1},
        )
    ):
        which = config.pop("t", 0)  # type: ignore[call-overload]
        targets = (ALL, ("q_proj",), ("gate_proj", "up_proj", "down_proj"))[which]
        folder = write_adapter(tmp_path / str(number), model, targets=targets, **config)
        assert len(read_adapter(folder, spec).modules) == 2 * len(targets)
    for name in (True, False, "gaussian", "eva", "orthogonal", "mica"):
        folder = write_adapter(tmp_path / str(name), model, init_lora_weights=name)
        assert read_adapter(folder, spec).modules
    one_layer = write_adapter(tmp_path / "l", model, layers_to_transform=[1])
    change_tensors(
        lambda tensors: (
            [tensors.pop(name) for name in list(tensors) if ".layers.0." in name] and None
        )
    )(one_layer)
    assert len(read_adapter(one_layer, spec).modules) == 7


def test_files_that_change_after_they_were_checked_are_refused(model: Path, tmp_path: Path) -> None:
    folder, spec = write_adapter(tmp_path / "a", model), read_spec(model)
    file = read_adapter(folder, spec)
    cpu = torch.device("cpu")
    load_adapter_weights(file, spec, torch.float32, cpu)
    path = folder / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-4] + b"\0\0\0\0")
    with pytest.raises(ConfigError, match="has changed since it was loaded"):
        load_adapter_weights(file, spec, torch.float32, cpu)
    for size in (1 << 40, 100, 0):
        os.truncate(path, size)
        with pytest.raises(ConfigError, match="has changed since it was loaded"):
            load_adapter_weights(file, spec, torch.float32, cpu)
    pipe(path.name)(folder)
    with pytest.raises(ConfigError, match="a device, pipe or socket"):
        load_adapter_weights(file, spec, torch.float32, cpu)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e5])
@pytest.mark.parametrize("which", ["lora_A", "lora_B"])
def test_weights_that_are_not_finite_are_refused(
    model: Path, tmp_path: Path, which: str, value: float
) -> None:
    folder, spec = write_adapter(tmp_path / "a", model), read_spec(model)
    name = f"{Q}.{which}.weight"
    change_tensors(lambda tensors: tensors[name].__setitem__((0, 0), value))(folder)
    file, cpu = read_adapter(folder, spec), torch.device("cpu")
    with pytest.raises(ConfigError, match=rf"q_proj\.{which} holds .* not finite in float16"):
        load_adapter_weights(file, spec, torch.float16, cpu)
    if np.isfinite(value):
        load_adapter_weights(file, spec, torch.bfloat16, cpu)


@pytest.mark.parametrize("name", ["x" * 5000, "a\0b", "\U0001f600" * 100])
def test_names_that_no_file_system_holds_are_refused(model: Path, name: str) -> None:
    with pytest.raises(ConfigError, match="no such folder"):
        read_adapter(Path("/", name), read_spec(model))
