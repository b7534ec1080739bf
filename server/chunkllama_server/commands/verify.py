"""Implement ``chunkllama verify``: flags, the table and the JSON file."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from chunkllama.config import DEMO_MODEL
from chunkllama.errors import ConfigError
from chunkllama_server.console import make_console

_BACKENDS = ("reference", "cpu", "cuda")
_QUANTIZATIONS = ("auto", "bf16", "int8", "int4")


def verify(
    model: Annotated[
        str, typer.Option(help="Alias, Hugging Face folder, .gguf file, or hub id.")
    ] = DEMO_MODEL,
    reference: Annotated[
        str, typer.Option(help="Model that transformers loads to compare with. Default: the same.")
    ] = "",
    text: Annotated[
        Path | None, typer.Option(help="UTF-8 file to compare on. Default: a built-in text.")
    ] = None,
    max_tokens: Annotated[int, typer.Option(min=2, help="Tokens of the text to compute.")] = 512,
    backends: Annotated[str, typer.Option(help="Backends to run, separated by commas.")] = (
        "reference,cpu"
    ),
    quantizations: Annotated[
        str, typer.Option(help="Storage of linear layers to run, separated by commas.")
    ] = "auto,int8",
    json_path: Annotated[
        Path | None, typer.Option("--json", help="File to write all numbers to.")
    ] = None,
) -> int:
    """Compare a model with transformers.

    Exit code 1 if anything differs or nothing was compared.

    Compares the tokenizer, every stage of every layer, and the log-probabilities of each backend,
    number format and quantization.
    """
    backend_names = _names("backends", backends, _BACKENDS)
    quantization_names = _names("quantizations", quantizations, _QUANTIZATIONS)
    content = "" if text is None else _read(text)
    if json_path is not None and not json_path.parent.is_dir():
        raise ConfigError(f"json: there is no folder {json_path.parent}")

    from chunkllama.engine.size import find_device
    from chunkllama.logger import configure_logging
    from chunkllama.models.loading.hub import resolve_model

    if "cuda" in backend_names:
        try:
            find_device("cuda")
        except ConfigError as error:
            raise ConfigError(f"backends: cuda is not available here: {error}") from None
    resolve_model(model)  # refused before torch is imported
    from chunkllama.verify.report import Report
    from chunkllama.verify.run import Options
    from chunkllama.verify.run import verify as run

    configure_logging("warning")
    options = Options(model, reference, content, max_tokens, backend_names, quantization_names)
    report: Report = run(options, lambda step: print(f"comparing: {step}", file=sys.stderr))
    if json_path is not None:
        _write(json_path, json.dumps(report.to_json(), indent=1) + "\n")
    table = Table("area", "with", "result", "detail")
    for finding in report.findings:
        result = {True: "equal", False: "DIFFERS", None: "not run"}[finding.is_equal]
        table.add_row(finding.area, finding.subject, result, finding.detail)
    make_console().print(table)
    if report.is_equal:
        print(f"{report.model}: equal to {report.reference}")
        return 0
    if not report.areas:
        print(f"{report.model}: no log-probabilities were compared; see the table for the reasons")
        return 1
    print(f"{report.model}: differs from {report.reference} in: {', '.join(report.areas)}")
    return 1


def _names(flag: str, value: str, known: tuple[str, ...]) -> tuple[str, ...]:
    names = tuple(name.strip() for name in value.split(",") if name.strip())
    for name in names:
        if name not in known:
            raise ConfigError(f"{flag}: {name!r} is not one of {', '.join(known)}")
    if not names:
        raise ConfigError(f"{flag}: name at least one of {', '.join(known)}")
    return names


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        raise ConfigError(f"text: cannot read {path}: {reason}") from None


def _write(path: Path, content: str) -> None:
    try:
        path.write_text(content)
    except OSError as error:
        raise ConfigError(f"json: {path} cannot be written: {error.strerror}") from None
