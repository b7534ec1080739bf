"""Check what a server needs on this machine, without starting one (``chunkllama doctor``)."""

from __future__ import annotations

import importlib.util
import platform
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from chunkllama import __version__
from chunkllama.backends.cpu.build import available_levels, find_compiler, is_built
from chunkllama.config import EngineConfig
from chunkllama.engine.size import find_device, plan_size
from chunkllama.errors import ConfigError
from chunkllama.models.loading.hub import aliases, is_hub_id, resolve_model
from chunkllama.resources import cache_folder, cpu_name, memory_left, usable_threads

_MIB = 1 << 20
Verdict = Literal["ok", "note", "problem"]


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of the report.

    Attributes:
        verdict: "problem" keeps a server from starting; "note" names what could be better.
    """

    verdict: Verdict
    topic: str
    text: str


def examine(config: EngineConfig) -> list[Finding]:
    """Examine processors, kernels, GPU, memory, model and pool; downloads and starts nothing."""
    findings = [
        Finding(
            "ok",
            "versions",
            f"chunkllama {__version__}, Python {platform.python_version()}, "
            f"torch {torch.__version__}",
        ),
        _processors(),
    ]
    for topic, check in _CHECKS.items():
        try:
            findings += check(config)
        except ConfigError as error:
            findings.append(Finding("problem", topic, str(error)))
    return findings


def _processors() -> Finding:
    levels = available_levels()
    names = ", ".join(level.name for level in levels)
    text = f"{usable_threads()} usable, {cpu_name()}; instruction sets: {names}"
    return Finding("ok", "processors", text)


def _kernels(config: EngineConfig) -> Iterator[Finding]:
    levels = {level.name: level for level in available_levels()}
    wanted = config.model.isa_level
    if wanted != "auto" and wanted not in levels:
        raise ConfigError(f"isa_level: this CPU lacks {wanted}; use auto or {', '.join(levels)}")
    level = next(iter(levels.values())) if wanted == "auto" else levels[wanted]
    if is_built(level):
        yield Finding("ok", "kernels", f"C++ kernels for {level.name} are compiled")
        return
    compiler = find_compiler()[0]
    if shutil.which(compiler):
        text = f"the first start compiles C++ kernels for {level.name} with {compiler}"
        yield Finding("ok", "kernels", text)
    else:
        yield Finding(
            "note",
            "kernels",
            f"no C++ compiler ({compiler}) found; install g++ or set CXX, else the server computes "
            "in torch, which is much slower",
        )


def _gpu(config: EngineConfig) -> Iterator[Finding]:
    if torch.cuda.is_available():
        device = find_device(config.model.device)
        if device == "cpu":
            yield Finding("ok", "GPU", "one is there; device is cpu")
            return
        name = torch.cuda.get_device_name(device)
        free, total = (size // _MIB for size in torch.cuda.mem_get_info(device))
        yield Finding("ok", "GPU", f"{name}, {free:,} of {total:,} MiB free")
        if importlib.util.find_spec("cupy") is None:
            extra = f"cu{(torch.version.cuda or '12').split('.')[0]}"
            yield Finding(
                "note",
                "GPU",
                f"CuPy is missing: pip install 'chunkllama[{extra}]', else the server computes in "
                "torch, which is slower",
            )
    elif config.model.device not in ("auto", "cpu"):
        find_device(config.model.device)  # says that there is none
    elif Path("/dev/nvidiactl").exists():
        yield Finding("note", "GPU", "there is one, but this torch build cannot use it")
    else:
        yield Finding("ok", "GPU", "none; models run on the CPU")


def _memory(_: EngineConfig) -> Iterator[Finding]:
    yield Finding("ok", "memory", f"{memory_left() // _MIB:,} MiB free for this process")


def _model(config: EngineConfig) -> Iterator[Finding]:
    model = config.model.model
    if model in aliases() and not any((cache_folder() / "models").glob(f"{model}-*")):
        fetch = f"chunkllama models fetch {model}"
        yield Finding("note", "model", f"{model} is downloaded at the first start; now: {fetch}")
        return
    if is_hub_id(model) and not Path(model).exists():
        yield Finding(
            "note", "model", f"{model} is not on this machine; a start asks the hub for it"
        )
        return
    size = plan_size(config, resolve_model(model))
    name = Path(model).name or model
    yield Finding(
        "ok",
        "model",
        f"{name}: {size.spec.num_layers} layers, {size.weight_bytes // _MIB:,} MiB of weights, "
        f"{size.dtype} on {size.device}, context {size.max_model_len:,} tokens",
    )
    stored = "" if size.kv_dtype == size.dtype else f" in {size.kv_dtype}"
    yield Finding(
        "ok",
        "chunk pool",
        f"{size.num_chunks:,} chunks of {config.cache.chunk_size} tokens, "
        f"{size.pool_bytes // _MIB:,} MiB{stored}: "
        f"requests of up to {size.max_request_tokens:,} tokens, "
        f"{size.longest_requests} of that length at once",
    )
    if size.device == "cpu" and size.weight_bytes + size.pool_bytes > memory_left():
        yield Finding(
            "problem",
            "memory",
            f"weights and pool need {(size.weight_bytes + size.pool_bytes) // _MIB:,} MiB; set a "
            "smaller num_chunks or kv_cache_memory, or a quantization",
        )
    elif size.max_request_tokens < size.max_model_len:
        yield Finding(
            "note",
            "chunk pool",
            f"it holds less than the model's context of {size.max_model_len:,} tokens; raise "
            "kv_cache_memory or num_chunks for longer requests",
        )


_CHECKS: dict[str, Callable[[EngineConfig], Iterator[Finding]]] = {
    "kernels": _kernels,
    "GPU": _gpu,
    "memory": _memory,
    "model": _model,
}
