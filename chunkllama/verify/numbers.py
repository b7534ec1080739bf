"""Logits of a model as this project computes them, against transformers' in float32."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Protocol

import numpy as np
import torch

from chunkllama.backends.base import Quantization
from chunkllama.backends.select import BackendName
from chunkllama.engine.load import load_step_model
from chunkllama.errors import ConfigError
from chunkllama.model_spec import ModelSpec
from chunkllama.models.config import read_spec
from chunkllama.models.config_file import read_json
from chunkllama.models.loading.safetensors import Checkpoint, is_quantized
from chunkllama.models.text_part import text_part
from chunkllama.scheduler.output import ScheduledSlice, SchedulerOutput
from chunkllama.verify.report import LOG_PROBABILITIES, Finding

CHUNK: Final = 64
# float32 sums differ by their order alone; bfloat16 may be as far from float32 as transformers' own
# bfloat16, twice over, as single values scatter; int8 and int4 are a choice of the user, with a
# loss that shows no fault. Products with the codes of a quantized file round their scales, as
# bfloat16 would.
_FP32_TOLERANCE: Final = 2e-4
_BF16_FLOOR: Final = 2e-3
_LIMITS: Final[dict[str, float]] = {"int8": 0.1, "int4": 0.5}


@dataclass(frozen=True, slots=True)
class Variant:
    """One way to run the model."""

    backend: BackendName
    dtype: str
    quantization: Quantization

    def __str__(self) -> str:
        quantization = "" if self.quantization == "auto" else f", {self.quantization}"
        return f"{self.backend}, {self.dtype}{quantization}"


def variants(backends: Sequence[str], quantizations: Sequence[str]) -> Iterator[Variant]:
    """Float32 and bfloat16 on each backend that has them; other quantizations likewise."""
    for name in backends:
        backend: BackendName = name  # type: ignore[assignment]
        for dtype in ("bfloat16",) if backend == "cuda" else ("float32", "bfloat16"):
            yield Variant(backend, dtype, "auto")
        for quantization in quantizations:
            if quantization != "auto" and backend == "cpu":
                yield Variant(backend, "bfloat16", quantization)  # type: ignore[arg-type]


class TheirModel(Protocol):
    """What is used of a model of transformers."""

    config: Any

    def __call__(self, ids: torch.Tensor, **options: Any) -> Any:
        """Return the output for ids [1, T]; ``logits`` [1, T, vocab] and more by its options."""

    def get_submodule(self, target: str) -> torch.nn.Module:
        """Return a module by its path."""

    def set_attn_implementation(self, name: str) -> None:
        """Choose a registered function of attention."""


class Reference:
    """transformers' model of a folder in float32: log-probabilities of token sequences.

    Raises:
        ConfigError: transformers cannot read the folder.
    """

    def __init__(self, folder: Path, dtype: torch.dtype = torch.float32) -> None:
        import transformers

        library: Any = transformers
        library.logging.set_verbosity_error()
        config = folder / "config.json"
        is_multimodal = text_part(read_json(config), config) is not None
        loader = library.AutoModelForCausalLM
        loader = library.AutoModelForImageTextToText if is_multimodal else loader
        try:
            model, loading = loader.from_pretrained(
                folder,
                dtype=dtype,
                attn_implementation="eager",
                use_safetensors=True,
                local_files_only=True,
                trust_remote_code=False,
                output_loading_info=True,
            )
        except (ImportError, OSError, ValueError, KeyError, RuntimeError) as error:
            reason = " ".join(str(error).split())[:200]
            raise ConfigError(
                f"{folder}: transformers cannot load it: {reason}; --reference MODEL compares with "
                "another, such as the one that it was quantized from"
            ) from None
        if missing := sorted(loading["missing_keys"]):  # transformers would make them up
            raise ConfigError(f"{folder}: transformers finds no tensor {missing[0]}")
        self.model: TheirModel = model.eval()

    @torch.inference_mode()
    def log_probabilities(self, ids: Sequence[int]) -> torch.Tensor:
        """[T, vocab] float32 of one sequence."""
        output = self.model(torch.tensor([list(ids)]), use_cache=False)
        logits: torch.Tensor = output.logits[0]
        return logits.float().log_softmax(-1)


def keeps_codes(folder: Path, spec: ModelSpec) -> bool:
    """Whether a model's matrices are stored quantized, and the cpu backend computes with that."""
    return bool(spec.quantization_method) or any(map(is_quantized, Checkpoint(folder, spec)))


class Ours:
    """The model of a folder, loaded and run as the engine does it: in two slices, the second over
    the chunks of the first.

    Raises:
        ConfigError: the folder or the variant is not supported.
    """

    def __init__(self, folder: Path, variant: Variant, max_tokens: int) -> None:
        self._num_chunks = -(-max_tokens // CHUNK)
        self._model = load_step_model(
            model_path=folder,
            spec=read_spec(folder),
            device="cuda" if variant.backend == "cuda" else "cpu",
            dtype=variant.dtype,
            num_chunks=self._num_chunks,
            chunk_size=CHUNK,
            max_model_len=max_tokens,
            backend=variant.backend,
            weights=variant.quantization,
        )

    def close(self) -> None:
        """Free the memory of weights and chunks."""
        self._model.close()

    @torch.inference_mode()
    def log_probabilities(self, ids: Sequence[int]) -> torch.Tensor:
        """[T, vocab] float32 of one sequence."""
        cut = max(1, len(ids) * 2 // 3)
        parts = [(0, cut)] if cut == len(ids) else [(0, cut), (cut, len(ids))]
        rows = []
        for begin, end in parts:
            token_ids = np.array(ids[begin:end], np.int32)
            chunks = np.arange(self._num_chunks, dtype=np.int32)
            piece = ScheduledSlice(0, begin, token_ids, chunks, 0, True)
            step = SchedulerOutput(step=1, slices=[piece], plan_version=0)
            logits = self._model.model.logits(self._model.run(step))
            rows.append(logits.log_softmax(-1).to("cpu", copy=True))
        return torch.cat(rows)


@dataclass(frozen=True, slots=True)
class Distance:
    """How far log-probabilities [T, vocab] are from others, over sequences of tokens."""

    top1: float
    kl: float
    nll: float
    nll_reference: float
    largest: float
    wrong: int

    @classmethod
    def of(
        cls,
        sequences: Sequence[Sequence[int]],
        ours: Sequence[torch.Tensor],
        theirs: Sequence[torch.Tensor],
    ) -> Distance:
        """``largest``: of the tokens that follow; ``wrong``: best tokens that are not the
        reference's although its margin exceeds the tolerance.
        """
        total = np.zeros(4)
        largest, wrong, positions, successors = 0.0, 0, 0, 0
        for ids, got, expected in zip(sequences, ours, theirs, strict=True):
            target = torch.tensor(ids[1:])[:, None]
            mine, other = (x[:-1].gather(1, target) for x in (got, expected))
            best = got.argmax(1)
            gap = expected.amax(1) - expected.gather(1, best[:, None])[:, 0]
            wrong += int((gap > 2 * _FP32_TOLERANCE).sum())
            if len(target):
                largest = max(largest, float((mine - other).abs().max()))
            kl = (expected.exp() * (expected - got)).sum()
            total += [
                float((best == expected.argmax(1)).sum()),
                float(kl),
                *(float(-x.sum()) for x in (mine, other)),
            ]
            positions, successors = positions + len(ids), successors + len(target)
        followed = max(successors, 1)
        return cls(
            top1=total[0] / positions,
            kl=total[1] / positions,
            nll=total[2] / followed,
            nll_reference=total[3] / followed,
            largest=largest,
            wrong=wrong,
        )

    def numbers(self) -> dict[str, float]:
        return {
            "top1": self.top1,
            "kl": self.kl,
            "nll": self.nll,
            "nll_reference": self.nll_reference,
            "largest_difference": self.largest,
        }


def judge(
    variant: Variant, distance: Distance, bf16_kl: float, *, has_codes: bool = False
) -> Finding:
    """Whether a variant is as near to transformers' float32 as its number format allows.

    Args:
        bf16_kl: mean KL of transformers' own bfloat16.
        has_codes: see ``keeps_codes``.
    """
    summary = (
        f"top-1 {distance.top1:.2%}, KL {distance.kl:.2g}, NLL {distance.nll:.4f} "
        f"(reference {distance.nll_reference:.4f})"
    )
    is_exact = variant.dtype == "float32" and not (has_codes and variant.backend == "cpu")
    if is_exact:
        limit, value, name = _FP32_TOLERANCE, distance.largest, "largest difference"
    elif variant.quantization in _LIMITS:
        limit, value, name = _LIMITS[variant.quantization], distance.kl, "KL"
    else:
        limit, value, name = max(2 * bf16_kl, _BF16_FLOOR), distance.kl, "KL"
    is_equal = value <= limit and not (is_exact and distance.wrong)
    return Finding(
        LOG_PROBABILITIES,
        str(variant),
        is_equal,
        f"{summary}; {name} {value:.2g}, limit {limit:.2g}",
        {**distance.numbers(), "limit": limit},
    )
