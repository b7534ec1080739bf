"""The state of a training after an optimizer step, and the adapter as PEFT has it."""

from __future__ import annotations

import json
import math
import os
import shutil
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Final

import msgspec
import torch

from chunkllama.errors import ConfigError
from chunkllama.models.loading.adapter_file import CONFIG, WEIGHTS
from chunkllama.models.loading.safetensors import read_header
from chunkllama.tuning.folder import STATE, replace_file
from chunkllama.tuning_messages import TuningOptions

_PREFIX: Final = "base_model.model."


class StepResult(msgspec.Struct, frozen=True):
    """What one optimizer step gave.

    Attributes:
        step: counted from 1.
        loss: mean over the trained tokens, before the step.
        accuracy: share of them that the model found most probable.
    """

    step: int
    loss: float
    accuracy: float
    num_tokens: int


class Progress(msgspec.Struct, frozen=True):
    """How far a training is.

    Attributes:
        options: that it runs with.
        source: digest of the weights and the examples that it is made from.
        steps: that are done.
    """

    options: TuningOptions
    source: str
    steps: list[StepResult]


def write_state(folder: Path, tensors: Mapping[str, torch.Tensor], progress: Progress) -> None:
    """Store the state after a step.

    Args:
        tensors: float32, contiguous, on the host.

    Raises:
        OSError: it cannot be written; the former state stays.
    """
    metadata = {"progress": msgspec.json.encode(progress).decode()}
    replace_file(folder / STATE, _safetensors(tensors, metadata))


def read_state(folder: Path) -> tuple[dict[str, torch.Tensor], Progress] | None:
    """Read the last state; None: there is none.

    Raises:
        ConfigError: it is damaged.
    """
    path = folder / STATE
    if not path.exists():
        return None
    infos = read_header(path)
    data = bytearray(path.read_bytes())
    (length,) = struct.unpack_from("<Q", data)
    header = json.loads(data[8 : 8 + length])
    try:
        progress = msgspec.json.decode(header["__metadata__"]["progress"], type=Progress)
    except (KeyError, TypeError, msgspec.MsgspecError) as error:
        raise ConfigError(f"{STATE}: is no state of a training: {error}") from None
    tensors = {
        name: torch.frombuffer(
            data, dtype=torch.float32, count=math.prod(info.shape), offset=info.begin
        ).view(info.shape)
        for name, info in infos.items()
    }
    return tensors, progress


def write_adapter(
    folder: Path, tensors: Mapping[str, torch.Tensor], options: TuningOptions, model: str
) -> None:
    """Write a folder as PEFT saves an adapter of all linear layers.

    Args:
        folder: replaced if it is there.
        tensors: "<module>.lora_A.weight" and "<module>.lora_B.weight", float32, on the host.
        model: name of the model, for people to read.

    Raises:
        OSError: it cannot be written.
    """
    modules = {name.rpartition(".lora_")[0].rpartition(".")[2] for name in tensors}
    config = {
        "base_model_name_or_path": model,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_alpha": options.alpha,
        "lora_dropout": 0.0,
        "modules_to_save": None,
        "peft_type": "LORA",
        "r": options.rank,
        "target_modules": sorted(modules),
        "task_type": "CAUSAL_LM",
        "use_dora": False,
        "use_rslora": False,
    }
    partial = folder.with_name(f"{folder.name}.new")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(mode=0o700)
    named = {f"{_PREFIX}{name}": tensor for name, tensor in tensors.items()}
    replace_file(partial / WEIGHTS, _safetensors(named, {"format": "pt"}))
    replace_file(partial / CONFIG, iter([json.dumps(config, indent=2).encode()]))
    if folder.exists():
        shutil.rmtree(folder)
    os.replace(partial, folder)


def _safetensors(
    tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]
) -> Iterator[bytes | memoryview]:
    header: dict[str, object] = {"__metadata__": metadata}
    end = 0
    for name, tensor in tensors.items():
        begin, end = end, end + 4 * tensor.numel()
        header[name] = {"dtype": "F32", "shape": list(tensor.shape), "data_offsets": [begin, end]}
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)
    yield struct.pack("<Q", len(encoded)) + encoded
    for tensor in tensors.values():
        yield tensor.detach().numpy().data.cast("B")
