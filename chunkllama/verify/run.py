"""Compare a user's model with transformers: tokenizer, every stage of every layer, and the
log-probabilities of each backend, number format and quantization.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import torch

from chunkllama.errors import ConfigError
from chunkllama.models.config import read_spec
from chunkllama.models.loading.gguf import convert_gguf
from chunkllama.models.loading.hub import resolve_model
from chunkllama.models.loading.safetensors import Checkpoint
from chunkllama.text.tokenizer import load_tokenizer
from chunkllama.verify.numbers import Distance, Ours, Reference, judge, keeps_codes, variants
from chunkllama.verify.report import LOG_PROBABILITIES, Finding, Report
from chunkllama.verify.texts import PROSE, SAMPLES
from chunkllama.verify.tokenizer_check import check_tokenizer
from chunkllama.verify.trace import first_difference, window_to_pass

_SEQUENCE: Final = 512
_SAMPLE_LINES: Final = 2000


@dataclass(frozen=True, slots=True)
class Options:
    """What to compare.

    Attributes:
        model: as ``resolve_model`` takes it.
        reference: the same, read by transformers; "": the model itself.
        text: to compare on, besides the built-in samples for the tokenizer; "": the built-in prose.
        max_tokens: of the text, for the numbers.
        backends: of ``chunkllama.backends.select``, that run here.
        quantizations: "auto" and those that a backend offers.
    """

    model: str
    reference: str = ""
    text: str = ""
    max_tokens: int = 512
    backends: tuple[str, ...] = ("reference", "cpu")
    quantizations: tuple[str, ...] = ("auto", "int8")


def verify(options: Options, on_progress: Callable[[str], None] = lambda step: None) -> Report:
    """Make all comparisons.

    Raises:
        ConfigError: the model or the reference cannot be loaded at all.
    """
    with tempfile.TemporaryDirectory() as scratch:
        folder = resolve_model(options.model)
        reference = _readable(options.reference or options.model, Path(scratch))
        return _verify(options, folder, reference, on_progress)


def _readable(model: str, scratch: Path) -> Path:
    """A folder that transformers reads: a GGUF file is dequantized."""
    path = Path(model).expanduser()
    if not path.is_file() or path.suffix.lower() != ".gguf":
        return resolve_model(model)
    convert_gguf(path, scratch, lambda done, total: None)
    return scratch


def _verify(
    options: Options, folder: Path, reference: Path, on_progress: Callable[[str], None]
) -> Report:
    spec = read_spec(folder)
    Checkpoint(folder, spec)  # says what is missing before anything is compared
    report = Report(options.model, f"transformers on {options.reference or options.model}")
    report.architecture = spec.architecture
    text = options.text or PROSE
    on_progress("tokenizer")
    lines = options.text.splitlines()[:_SAMPLE_LINES]
    report.findings += check_tokenizer(folder, reference, [*SAMPLES, *lines])

    ids = load_tokenizer(reference).encode(text, add_special_tokens=True)[: options.max_tokens]
    passing = window_to_pass(spec)
    length = max(_SEQUENCE, passing) if passing <= len(ids) else _SEQUENCE
    length = min(length, spec.max_position)
    sequences = [ids[begin : begin + length] for begin in range(0, len(ids), length)]
    if max(ids, default=0) >= spec.vocab_size or len(ids) < 2:
        raise ConfigError(
            f"{options.model}: the text gives {len(ids)} tokens, the highest is "
            f"{max(ids, default=0)}; at least 2 below vocab_size {spec.vocab_size} are needed"
        )
    on_progress("transformers in float32")
    theirs = Reference(reference)
    expected = [theirs.log_probabilities(sequence) for sequence in sequences]
    if spec.is_native:
        on_progress("stages of the layers")
        report.findings.append(first_difference(folder, theirs.model, sequences[0]))
    else:
        report.findings.append(Finding("stages", "", None, "transformers computes the layers"))
    del theirs
    wanted = list(variants(options.backends, options.quantizations))
    bf16_kl = 0.0
    if any(variant.dtype == "bfloat16" for variant in wanted):
        on_progress("transformers in bfloat16")
        narrow = Reference(reference, torch.bfloat16)
        narrowed = [narrow.log_probabilities(sequence) for sequence in sequences]
        bf16_kl = Distance.of(sequences, narrowed, expected).kl
    has_codes = keeps_codes(folder, spec)
    for variant in wanted:
        on_progress(str(variant))
        try:
            model = Ours(folder, variant, max(map(len, sequences)))
        except ConfigError as error:
            report.findings.append(Finding(LOG_PROBABILITIES, str(variant), None, str(error)))
            continue
        got = [model.log_probabilities(sequence) for sequence in sequences]
        model.close()
        distance = Distance.of(sequences, got, expected)
        report.findings.append(judge(variant, distance, bf16_kl, has_codes=has_codes))
    return report
