"""Configuration of an engine: frozen groups; flat keys equal the flags of the command line."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, field_validator

from chunkllama.config_errors import check_keys, first_error, rename_keys
from chunkllama.digits import whole_number
from chunkllama.errors import ConfigError
from chunkllama.logger import init_logger
from chunkllama.tenant_limits import parse_weights

logger = init_logger(__name__)

DEMO_MODEL = "smollm2-135m-instruct"
_UNITS = {
    **{"": 1, "k": 1000, "m": 1000**2, "g": 1000**3, "t": 1000**4},
    **{"ki": 1 << 10, "mi": 1 << 20, "gi": 1 << 30, "ti": 1 << 40},
}
_OF_CHECKPOINTS = ("awq", "gptq", "fp8", "compressed-tensors", "gguf")
_SIZE = re.compile(r"([0-9]{1,18}(?:\.[0-9]+)?)\s*((?:[kmgt]i?)?)b?", re.IGNORECASE)


def parse_bytes(value: object) -> object:
    """Parse bytes from "512MiB", "2g" or a number; the type refuses anything else."""
    if isinstance(value, str) and (match := _SIZE.fullmatch(value.strip())):
        return int(float(match[1]) * _UNITS[match[2].lower()])
    return value


def _number(value: object) -> object:
    """Parse a number: flags and variables are strings, and a Literal only compares."""
    number = whole_number(value) if isinstance(value, str) else None
    return value if number is None else number


def _renamed_backend(value: object) -> object:
    if value != "native":
        return value
    logger.warning("backend: native is now called cpu; the old name will be removed")
    return "cpu"


def _not_a_checkpoints(value: object) -> object:
    """Refuse the name of a checkpoint's quantization, which other servers want to be given."""
    if isinstance(value, str) and value.lower().removesuffix("_marlin") in _OF_CHECKPOINTS:
        raise ValueError("leave it out: how a checkpoint is quantized is read from its config.json")
    return value


Device = Literal[
    "auto", "cpu", "cuda",
    "cuda:0", "cuda:1", "cuda:2", "cuda:3", "cuda:4", "cuda:5", "cuda:6", "cuda:7",
]  # fmt: skip
ChunkSize = Annotated[Literal[16, 32, 64, 128], BeforeValidator(_number)]
Bytes = Annotated[int, BeforeValidator(parse_bytes), Field(gt=0)]


class ConfigGroup(BaseModel):
    """One part of the configuration; every field has a default and a description."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", protected_namespaces=(), allow_inf_nan=False
    )


def limit(
    default: Any,
    unit: str,
    reach: Literal["anyone", "tenant", "operator"],
    answer: str,
    description: str,
    text: str = "",
    **bounds: Any,
) -> Any:
    """Declare a setting that bounds what a client can cause.

    Args:
        unit: of the value.
        reach: who can reach the limit: anyone who can connect, a tenant (a client that may send
            requests), or the operator alone.
        answer: the status and code that the client gets, or "closed", "waits" or "left out".
        text: the error's message, with {limit} and {value}.
        bounds: as ``pydantic.Field`` takes them.
    """
    extra: dict[str, Any] = {"unit": unit, "reach": reach, "answer": answer, "text": text}
    return Field(default=default, description=description, json_schema_extra=extra, **bounds)


class ModelConfig(ConfigGroup):
    """The model, its number formats, and its device."""

    model: str = Field(
        default=DEMO_MODEL,
        min_length=1,
        description="Alias, Hugging Face folder, .gguf file, hub id where a hub is reachable, or "
        ".yaml file with the sizes of a config.json.",
    )
    load_format: Literal["auto", "dummy"] = Field(
        default="auto",
        description="auto reads the model's weights; dummy draws random ones on the device, of the "
        "model's sizes and from seed, to measure speed and memory.",
    )
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = Field(
        default="auto",
        description="Type of weights and K/V. auto is the checkpoint's, except that a CPU takes "
        "bfloat16 for float16, and float32 where backend is reference and the CPU has no "
        "bfloat16 instructions; a GPU takes bfloat16 for float32.",
    )
    device: Device = Field(
        default="auto",
        description="Where to compute. auto is a CUDA device if there is one; cuda is the first of "
        "them, cuda:1 the second.",
    )
    tensor_parallel_size: int = Field(
        default=1,
        gt=0,
        le=64,
        json_schema_extra={"flag": "--tp"},
        description="Processes that share a model's heads, layer by layer, and its pool; --tp for "
        "short. On GPUs each has one, on a CPU its part of the threads. The heads and the MLP's "
        "columns must divide by it.",
    )
    isa_level: Literal[
        "auto", "amx", "avx512_bf16", "avx512", "avx2", "neon_bf16", "neon_dot", "neon", "baseline"
    ] = Field(
        default="auto",
        description="Instructions that the cpu backend uses. auto is the fastest level of this "
        "CPU; one that it lacks is an error. neon levels are those of 64-bit ARM.",
    )
    backend: Annotated[
        Literal["auto", "reference", "cpu", "cuda"], BeforeValidator(_renamed_backend)
    ] = Field(
        default="auto",
        description="Kernels: reference (torch), cpu (C++), cuda; auto is the fastest that works.",
    )
    quantization: Annotated[
        Literal["auto", "bf16", "int8", "int4"], BeforeValidator(_not_a_checkpoints)
    ] = Field(
        default="auto",
        description="Storage of linear layers. auto is the checkpoint's: quantized ones stay as "
        "they are. int8 and int4 quantize any checkpoint while it is loaded (8.5 and 4.5 bits a "
        "weight; the head of int4 is int8) and need backend cpu.",
    )
    int4_activations: Literal["int8", "float"] = Field(
        default="int8",
        description="What up to 8 rows of a step are multiplied by 4-bit weights in, on backend "
        "cpu: int8 rounds them to 8 bits with a scale for each 32 and is faster; float keeps them, "
        "and so does dtype float32.",
    )
    max_model_len: int | None = Field(
        default=None,
        gt=0,
        description="Longest prompt plus answer in tokens. Default: the model's own.",
    )
    threads: int | None = Field(
        default=None,
        gt=0,
        description="Compute threads, at most this process's processors, or those of cpu_bind. "
        "Default: all of them, cut to its CPU quota.",
    )
    cpu_bind: Annotated[str, BeforeValidator(str)] = Field(  # 0 in YAML is a number
        default="none",
        pattern=r"^(none|auto|[0-9]{1,5}(-[0-9]{1,5})?(,[0-9]{1,5}(-[0-9]{1,5})?)*)$",
        examples=["0-3,8", "auto", "none"],
        description="Processors that compute on a CPU, whose NUMA nodes hold the memory: a list "
        "such as 0-3,8; auto is one for each core of the NUMA node that has most of them; none is "
        "all that this process may use.",
    )
    deterministic: bool = Field(
        default=False,
        description="Compute each row alike in every batch: log-probabilities are equal bit for "
        "bit, cold or from the cache, alone or beside others, before and after a restart, with one "
        "build, CPU, isa_level and number of threads. Slower; needs backend cpu and --tp 1.",
    )
    seed: int | None = Field(
        default=None, ge=0, description="Makes the seeds of requests without one reproducible."
    )
    generation_config: Literal["auto", "none"] = Field(
        default="auto",
        description="auto takes default sampling values from the model's generation_config.json, "
        "none ignores them.",
    )


class CacheConfig(ConfigGroup):
    """The pool of K/V chunks, which the prefix tree shares between prompts."""

    num_chunks: int | None = Field(
        default=None,
        gt=0,
        description="Chunks in the pool. Default: as many as kv_cache_memory holds.",
    )
    chunk_size: ChunkSize = Field(
        default=64,
        description="Tokens a chunk holds. Sizes other than 64 need the reference backend.",
    )
    kv_dtype: Literal["auto", "int8"] = Field(
        default="auto",
        description="Storage of K/V. auto is dtype. int8 has a scale for each token and head and "
        "takes about half the memory of bfloat16; it needs device cpu.",
    )
    enable_prefix_caching: bool = Field(
        default=True,
        description="Share equal prompt prefixes and keep them. Off is for comparisons only.",
    )
    explain_chunks: int = Field(
        default=1024,
        ge=0,
        le=1_000_000,
        description="Chunks of each tenant's own prompts that are remembered to explain cache "
        "misses; 0 remembers none.",
    )
    cache_tier_dir: Path | None = Field(
        default=None,
        description="Folder for chunks that the pool evicts: a later prompt with them reads them "
        "again. Each engine process has a folder of its own in it, which does not outlive it.",
    )
    cache_tier_bytes: Bytes = Field(
        default=10 << 30, description="K/V in cache_tier_dir; the least recently used go first."
    )
    cache_tier_memory: Bytes | None = Field(
        default=None,
        description="Memory for chunks that the pool evicts; those used least recently move on to "
        "cache_tier_dir, if there is one. On a CPU it needs cache_tier_bits.",
    )
    cache_tier_bits: Annotated[Literal[2, 4] | None, BeforeValidator(_number)] = Field(
        default=None,
        description="Bits of each value of K/V in the tier (KIVI); they stay rounded when they are "
        "read again. Default: as in the pool.",
    )
    adapter_memory: Bytes = Field(
        default=1 << 30,
        description="Memory of the weights of adapters; those used least recently are dropped and "
        "read again when they are needed.",
    )
    kv_cache_memory: Bytes | None = Field(
        default=None,
        description="Memory of the pool, like 512MiB. Default on a CPU: a quarter of what is left "
        "after loading the weights, at most what max_num_seqs requests of max_model_len need; on a "
        "GPU what the weights and the largest step leave of gpu_memory_utilization.",
    )
    gpu_memory_utilization: float = Field(
        default=0.9,
        gt=0,
        le=1,
        description="Part of a GPU's memory that may be in use, by other programs too: the weights "
        "are loaded, a largest step is computed, and the pool takes the rest.",
    )


class SchedulerConfig(ConfigGroup):
    """What runs in a step, and which requests wait."""

    max_num_seqs: int = limit(
        64, "sequences", "tenant", "waits", "Sequences that run at once.", gt=0, le=1024
    )
    max_num_batched_tokens: int | None = Field(
        default=None, gt=0,
        description="Tokens of one step: decodes first, then slices of prompts. Default: 512, on "
        "a CPU those that it computes in about 0.07 s, since a first token waits for the step in "
        "progress, but at least 128; and at least twice max_num_seqs.",
    )  # fmt: skip
    scheduling_policy: Literal["fair", "prefix", "fcfs"] = Field(
        default="fair",
        description="Order of waiting requests: grouped by prefix within fair shares of tenants, "
        "grouped by prefix alone, or first come first served.",
    )
    fair_quantum: int = Field(
        default=8192,
        gt=0,
        description="Tokens that a group of requests with one prefix, or a tenant, may run ahead "
        "of others that wait.",
    )
    tenant_weights: str = Field(
        default="",
        description="Shares of tenants with policy fair, like alice=4,bob=0.5; others have 1.",
    )
    max_waiting: int = limit(
        1024, "requests", "tenant", "429 engine_overloaded",
        "Requests that may wait; one more is refused with 429.", ge=0,
    )  # fmt: skip
    row_work_share: float = limit(
        0.2, "of the model's time", "tenant", "waits",
        "Time that one request's grammar masks and sampling may take in a step with other "
        "requests, as a share of the model's; its rows beyond that are sampled in a later step.",
        gt=0, le=100,
    )  # fmt: skip
    max_tenant_slowdown: float = limit(
        1.5, "times", "tenant", "waits",
        "How many times as long the work of one tenant may make the steps of the others on "
        "average, with policy fair: one that wants over twice what the others want (their lower "
        "median) computes some tokens in a part of the steps. At least 1; 0 is no bound, nor is "
        "there one for the steps that a first token beside a tenant's flood waits for.",
        ge=0, le=1000,
    )  # fmt: skip
    max_step_seconds: float = limit(
        0.15, "seconds", "operator", "waits",
        "Prompts of a step are cut where it would take longer, since a first token waits for the "
        "step in progress; two thirds of it where several tenants have work. Eight steps of one "
        "token are allowed in any case, and a size is tried until it has shown that it takes "
        "longer. 0 is no bound.",
        ge=0, le=60,
    )  # fmt: skip
    max_scored_tokens: int = limit(
        64, "tokens", "tenant", "waits",
        "Prompt tokens of one request in a step whose log-probabilities it wants: each takes a "
        "pass over the vocabulary, which the whole step waits for.", gt=0,
    )  # fmt: skip
    min_wait_tokens: int = Field(
        default=32, ge=0, description="A request waits for another one to compute a shared prefix "
        "only if that saves at least this many tokens.",
    )  # fmt: skip
    speculation: Literal["off", "auto"] = Field(
        default="off", description="Check guesses at the next tokens where that saves time; in "
        "fp32, and with deterministic, the output stays the same.")  # fmt: skip
    draft_model: str | None = Field(
        default=None,
        min_length=1,
        description="A small model with the same tokenizer (alias, folder, .gguf file or hub id) "
        "that guesses next tokens, with speculation auto; it has a pool of num_chunks of its own.",
    )

    @field_validator("max_tenant_slowdown")
    @classmethod
    def _check_slowdown(cls, value: float) -> float:
        if 0 < value < 1:
            raise ValueError("must be at least 1, or 0 for no bound")
        return value

    @field_validator("tenant_weights")
    @classmethod
    def _check_weights(cls, value: str) -> str:
        parse_weights(value)
        return value


class LogConfig(ConfigGroup):
    """Logging of the API process and of the engine process."""

    log_format: Literal["text", "json"] = Field(
        default="text", description="Plain log lines, or one JSON object per line."
    )
    log_level: Literal["debug", "info", "warning", "error"] = Field(
        default="info", description="Lowest level that is logged."
    )


class EngineConfig(BaseModel):
    """The configuration of an engine."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: ModelConfig = ModelConfig()
    cache: CacheConfig = CacheConfig()
    scheduler: SchedulerConfig = SchedulerConfig()
    log: LogConfig = LogConfig()

    @classmethod
    def from_flat(cls, **settings: Any) -> EngineConfig:
        """Build one from flat keys, e.g. ``from_flat(num_chunks=64, dtype="float32")``.

        Raises:
            ConfigError: a key is unknown (the nearest is named) or a value is out of range.
        """
        groups: dict[str, type[ConfigGroup]] = {
            "model": ModelConfig,
            "cache": CacheConfig,
            "scheduler": SchedulerConfig,
            "log": LogConfig,
        }
        settings = rename_keys(settings)
        known = [key for group in groups.values() for key in group.model_fields]
        check_keys(settings, known)
        try:
            return cls(
                **{  # type: ignore[arg-type]
                    name: group(**{k: settings[k] for k in group.model_fields if k in settings})
                    for name, group in groups.items()
                }
            )
        except ValidationError as error:
            fields = {k: v for g in groups.values() for k, v in g.model_fields.items()}
            raise ConfigError(first_error(error, fields)) from None
