"""``chunkllama finetune``: train an adapter from a file of conversations, without a server."""

from __future__ import annotations

import time
from concurrent.futures import wait
from pathlib import Path
from typing import Annotated, Any

import typer

from chunkllama.config import DEMO_MODEL, parse_bytes
from chunkllama.errors import ConfigError, InvalidRequestError
from chunkllama.tuning.folder import ADAPTER, STATE
from chunkllama.tuning_messages import BASE_LEARNING_RATE, TuningOptions

_MAX_LINES, _MAX_ANSWERS, _MAX_RENDERED = 1_000_000, 1024, 10**10
_SLICE_TOKENS = 256  # no request waits for them


def finetune(  # noqa: PLR0913
    data: Annotated[Path, typer.Option(help="JSONL file of conversations.", metavar="FILE")],
    out: Annotated[Path, typer.Option(help="Folder for the adapter.", metavar="FOLDER")],
    model: Annotated[str, typer.Option(help="Alias, Hugging Face folder, or hub id.")] = DEMO_MODEL,
    epochs: Annotated[int, typer.Option(min=1, max=1000, help="Passes over the file.")] = 3,
    batch_size: Annotated[
        int, typer.Option(min=1, max=1_000_000, help="Lines of an optimizer step.")
    ] = 4,
    learning_rate_multiplier: Annotated[
        float, typer.Option(help=f"Times {BASE_LEARNING_RATE:g}, the rate of AdamW.")
    ] = 1.0,
    seed: Annotated[
        int, typer.Option(min=0, max=2**31 - 1, help="Of the adapter and the order of lines.")
    ] = 0,
    rank: Annotated[int, typer.Option(min=1, max=128, help="Rank of the adapter.")] = 8,
    alpha: Annotated[
        float, typer.Option(help="What the adapter adds is multiplied by alpha / rank.")
    ] = 16.0,
    finetune_memory: Annotated[
        str, typer.Option(help="Memory that training may take, like 4GiB.")
    ] = "2GiB",
    threads: Annotated[
        int | None, typer.Option(min=1, help="Compute threads. Default: all processors.")
    ] = None,
) -> int:
    """Train a LoRA adapter from conversations.

    A command that was interrupted continues.

    FOLDER/adapter is what PEFT saves: `chunkllama serve --lora NAME=FOLDER/adapter` serves it.
    """
    for name, value in (("learning-rate-multiplier", learning_rate_multiplier), ("alpha", alpha)):
        if not 0 < value <= 1e6:
            raise ConfigError(f"{name}: must be above 0 and at most 1e6, got {value:g}")
    options = TuningOptions(
        n_epochs=epochs,
        batch_size=batch_size,
        learning_rate=BASE_LEARNING_RATE * learning_rate_multiplier,
        seed=seed,
        rank=rank,
        alpha=alpha,
    )
    if not data.is_file():
        raise ConfigError(f"data: no file {data}")
    max_bytes = parse_bytes(finetune_memory)
    if not isinstance(max_bytes, int):
        raise ConfigError(
            f"finetune_memory: write a size such as 4GiB, not {finetune_memory!r:.40}"
        )
    return _run(data, out, model, options, max_bytes, threads)


def _run(
    data: Path, out: Path, model: str, options: TuningOptions, max_bytes: int, threads: int | None
) -> int:
    from chunkllama.config import EngineConfig
    from chunkllama.engine.size import plan_size
    from chunkllama.logger import configure_logging
    from chunkllama.models.loading.hub import resolve_model
    from chunkllama.resources import usable_threads
    from chunkllama.text.chat_template import load_chat_template
    from chunkllama.text.tokenizer import load_tokenizer
    from chunkllama_server.api.tuning.examples import ExampleReader, FileLimits
    from chunkllama_server.config.limits import LimitsConfig

    configure_logging("warning")
    folder = resolve_model(model)
    _make(out)
    size = plan_size(EngineConfig.from_flat(model=model), folder)
    tokenizer = load_tokenizer(folder)
    reader = ExampleReader(
        load_chat_template(folder, tokenizer),
        frozenset(size.spec.eos_token_ids),
        size.max_model_len,
        FileLimits(_MAX_LINES, _MAX_ANSWERS, _MAX_RENDERED),
        LimitsConfig(),
    )
    try:
        examples = reader.read(data)
    except InvalidRequestError as error:
        raise ConfigError(f"data: {data}: {error.message}") from None
    except OSError as error:
        raise ConfigError(f"data: {data}: cannot be read: {error.strerror}") from None
    num_targets = sum(len(example.targets) for example in examples)
    print(f"{len(examples)} conversations, {num_targets:,} trained tokens in an epoch", flush=True)

    import torch

    from chunkllama.tuning.load import load_trainer

    torch.set_num_threads(threads or usable_threads())
    try:
        trainer = load_trainer(
            model_path=folder,
            spec=size.spec,
            name=model,
            max_model_len=size.max_model_len,
            device=torch.device(size.device),
            examples=examples,
            options=options,
            folder=out,
            max_bytes=max_bytes,
            slice_tokens=_SLICE_TOKENS,
            on_step=_Printer(),
        )
    except OSError as error:
        path = error.filename or out / STATE
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from None
    if trainer.steps:
        print(f"continues after step {len(trainer.steps)} of {trainer.total_steps}", flush=True)
    else:
        print(f"{trainer.total_steps} steps", flush=True)
    try:
        for piece in trainer.work():
            if piece == "wait" and trainer.writing is not None:
                wait([trainer.writing])
    except OSError as error:
        raise ConfigError(f"out: {out}: cannot be written: {error.strerror}") from None
    finally:
        trainer.close()
    (out / STATE).unlink(missing_ok=True)
    print(f"adapter in {out / ADAPTER}; serve it with --lora NAME={out / ADAPTER}")
    return 0


def _make(out: Path) -> None:
    """Make the folder, or take one that has no adapter or a training to continue.

    Raises:
        ConfigError: it cannot be made, or has the result of another training.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
        has_result = (out / ADAPTER).exists() and not (out / STATE).exists()
    except OSError as error:
        raise ConfigError(f"out: {out}: cannot be made: {error.strerror}") from None
    if has_result:
        raise ConfigError(f"out: {out / ADAPTER} exists; choose another folder, or remove it")


class _Printer:
    """Prints a line for each step."""

    def __init__(self) -> None:
        self._began = time.monotonic()

    def __call__(self, step: Any) -> None:
        print(
            f"step {step.step}: loss {step.loss:.4f}, accuracy {step.accuracy:.3f}, "
            f"{step.num_tokens} tokens, {time.monotonic() - self._began:.1f} s",
            flush=True,
        )
