"""Implement ``chunkllama pack``: build, inspect and verify files of prefixes."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.table import Table

from chunkllama.errors import ConfigError
from chunkllama_server.config.files import load_yaml
from chunkllama_server.config.flags import GroupedCommand, load_from_flags, with_setting_flags
from chunkllama_server.console import make_console

if TYPE_CHECKING:
    from collections.abc import Callable

    from chunkllama.engine.core import EngineCore
    from chunkllama.packs.document import PackDocument
    from chunkllama.packs.file import Pack
    from chunkllama.text.chat_template import ChatTemplate
    from chunkllama.text.tokenizer import Tokenizer
    from chunkllama_server.config.settings import Settings

    Signer = Callable[[bytes], str]

pack_app = typer.Typer(
    no_args_is_help=True, help="Files of prefixes that were computed before a server starts."
)

Recompute = Literal["none", "one", "all"]
PackFile = Annotated[Path, typer.Argument(help="The pack.", metavar="FILE")]


@pack_app.callback()
def pack() -> None:
    pass


@pack_app.command(cls=GroupedCommand)
@with_setting_flags
def build(
    out: Annotated[Path, typer.Option(help="Pack to write.", metavar="FILE")],
    prefixes: Annotated[
        Path | None,
        typer.Option(
            help="YAML list of prompts, see docs/packs.md. Default: what a server has cached, as "
            "the last snapshot in its snapshot_dir has it.",
            metavar="FILE",
        ),
    ] = None,
    tenant: Annotated[
        list[str] | None,
        typer.Option(
            help="Without --prefixes: pack this tenant's chunks, too; repeatable.", metavar="NAME"
        ),
    ] = None,
    sign_key: Annotated[
        Path | None,
        typer.Option(help="PEM file with an Ed25519 private key to sign with.", metavar="FILE"),
    ] = None,
    **flags: object,
) -> int:
    """Write a pack: of prompts, or of a server's cache.

    Prompts are computed with the model of the settings.
    """
    settings = load_from_flags(flags).settings
    if tenant and prefixes is not None:
        raise ConfigError("tenant: prefixes name their tenants in the file; leave it out")
    # Refused before a model is fetched or loaded.
    document = None if prefixes is None else load_yaml(prefixes, "prefixes")

    from chunkllama.packs.signature import load_signer

    sign = None if sign_key is None else load_signer(sign_key, "sign_key")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        if prefixes is None:
            return _build_hot(settings, tenant or [], out, sign)
        return _build_prompts(settings, document, prefixes, out, sign)
    except OSError as error:
        raise ConfigError(f"out: {out} cannot be written: {error.strerror}") from None


def _build_prompts(
    settings: Settings, document: Any, prefixes: Path, out: Path, sign: Signer | None
) -> int:
    from chunkllama.engine.pack_builder import compute_chunks, plan_pack
    from chunkllama.packs.file import write_pack
    from chunkllama_server.config.prefix_file import encode_prefixes

    tokenizer, template = _load_text(settings)
    prompts = encode_prefixes(document, prefixes, tokenizer, template)
    core = _load_engine(settings)
    try:
        assert core.packs is not None
        model = core.packs.io.identify()
        planned, ordered = plan_pack(prompts, model, template.digest if template else "")
        chunks = compute_chunks(
            core,
            planned,
            ordered,
            lambda prefix: print(f"computing {prefix.name}", file=sys.stderr),
        )
        written = write_pack(out, planned, chunks, sign)
    finally:
        core.close()
    _print_size(out, written)
    return 0


def _build_hot(settings: Settings, tenants: list[str], out: Path, sign: Signer | None) -> int:
    from chunkllama.packs.file import write_pack
    from chunkllama.packs.hot import plan_hot_pack
    from chunkllama_server.process.snapshots import open_hot_snapshot

    snapshot, namespaces = open_hot_snapshot(settings, tenants)
    with snapshot:
        planned, indexes = plan_hot_pack(snapshot.document, namespaces)
        left_out = len(snapshot.document.chunks) - len(indexes)
        if not indexes:
            raise ConfigError(
                f"snapshot_dir: the snapshot has no chunks of these tenants, and {left_out} of "
                "others; --tenant adds a tenant's"
            )

        def read(index: int) -> memoryview:
            if (data := snapshot.read_chunk(index)) is None:
                raise ConfigError(f"{snapshot.path}: chunk {index} is damaged; take the next one")
            return memoryview(data)

        written = write_pack(out, planned, map(read, indexes), sign)
    _print_size(out, written)
    if left_out:
        print(f"{left_out} chunks of other tenants, or of a cache_salt, are left out")
    return 0


def _print_size(out: Path, document: PackDocument) -> None:
    size = len(document.chunks) * document.model.chunk_bytes
    prompts = len(document.prefixes)
    print(f"{out}: {len(document.chunks)} chunks of {prompts} prompts, {size >> 20:,} MiB")


@pack_app.command()
def inspect(file: PackFile) -> int:
    """Print the header of a pack; its chunks are not read."""
    from chunkllama.packs.file import Pack

    with Pack(file) as opened:
        document = opened.document
        model = document.model
        size = opened.num_bytes
        signed = "yes" if opened.signature else "no"
    table = Table("prefix", "tenant", "tokens", "packed tokens", "pinned")
    for prefix in document.prefixes:
        packed = len(document.path(prefix.last)) * model.chunk_size
        tenant = document.scopes[prefix.scope].tenant or "everyone"
        pinned = "yes" if prefix.pin else "no"
        table.add_row(prefix.name, tenant, str(prefix.num_tokens), str(packed), pinned)
    print(f"model     {model.name}, weights {model.weights[:16]}")
    print(f"K/V       {model.dtype}, chunks of {model.chunk_size} tokens")
    print(f"size      {len(document.chunks)} chunks, {size >> 20:,} MiB")
    print(f"template  {document.template[:16] or 'none'}")
    print(f"signed    {signed}")
    make_console().print(table)
    return 0


@pack_app.command(cls=GroupedCommand)
@with_setting_flags
def verify(
    file: PackFile,
    recompute: Annotated[
        Recompute, typer.Option(help="Chunks to compute again with the model: none, one, all.")
    ] = "one",
    **flags: object,
) -> int:
    """Check all of a pack against the model of the settings.

    Exit code 1 if a server would not use all of it.
    """
    settings = load_from_flags(flags).settings
    from chunkllama.packs.file import Pack

    public_key = settings.check_packs()
    try:
        opened = Pack(file)
    except ConfigError as error:
        print(f"not usable: {error}")
        return 1
    with opened:
        problem = _find_problem(opened, settings, public_key, recompute)
        chunks = len(opened.document.chunks)
    if problem:
        print(f"{file}: not usable: {problem}")
        return 1
    print(f"{file}: {chunks} chunks are as they were written")
    return 0


def _find_problem(pack: Pack, settings: Settings, public_key: bytes, recompute: Recompute) -> str:
    """The first problem of a pack whose header is sound; "" without one."""
    import random

    from chunkllama.engine.chunk_io import TOLERANCE
    from chunkllama.engine.pack_builder import recompute_chunks

    document = pack.document
    damaged = [i for i in range(len(document.chunks)) if pack.read_chunk(i) is None]
    if damaged:
        return f"{len(damaged)} chunks are damaged, the first is {damaged[0]}"
    _, template = _load_text(settings)
    core = _load_engine(settings)
    try:
        assert core.packs is not None
        digest = template.digest if template else ""
        if problem := core.packs.io.refusal(pack, digest, public_key):
            return problem
        longest, most = max(document.depths(), default=-1) + 1, core.packs.io.max_path_chunks
        if longest > most:
            return f"a prompt has {longest} chunks, and max_model_len leaves room for {most}"
        indexes = list(range(len(document.chunks)))
        if recompute != "all":
            indexes = random.SystemRandom().sample(indexes, k=int(recompute == "one"))
        tolerance, largest = TOLERANCE[document.model.dtype], 0.0
        for index, difference in recompute_chunks(core, pack, indexes):
            if not difference <= tolerance:
                return f"chunk {index} differs from the model's by {difference:.2g}"
            largest = max(largest, difference)
        if indexes:
            print(
                f"{len(indexes)} chunks computed again: they differ by at most {largest:.2g} "
                f"(tolerance {tolerance:g})"
            )
    finally:
        core.close()
    return ""


def _load_text(settings: Settings) -> tuple[Tokenizer, ChatTemplate | None]:
    from chunkllama.models.loading.hub import resolve_model
    from chunkllama.text.chat_template import load_chat_template
    from chunkllama.text.tokenizer import load_tokenizer

    folder = resolve_model(settings.model)
    tokenizer = load_tokenizer(folder)
    return tokenizer, load_chat_template(folder, tokenizer, settings.chat_template)


def _load_engine(settings: Settings) -> EngineCore:
    from chunkllama.engine.build import build_engine
    from chunkllama.logger import configure_logging

    configure_logging("warning")
    return build_engine(settings.engine())
