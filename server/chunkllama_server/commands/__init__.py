"""Commands of ``chunkllama``: one function for each, see ``_COMMANDS``.

Only the requested command is imported, so that ``version`` and ``health`` are fast.
"""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import Annotated, Any

import typer
from rich.table import Table

from chunkllama import __version__
from chunkllama.errors import ChunkLlamaError
from chunkllama_server.console import make_console

USAGE_ERROR = 2
_INTERRUPTED = 130
_BROKEN_PIPE = 1  # as click ends, where the pipe breaks inside of it
_OUTPUT_ERRORS = frozenset((errno.ENOSPC, errno.EDQUOT, errno.EIO))


def make_app(names: Iterable[str]) -> typer.Typer:
    """Build the command line with some of its commands."""
    app = typer.Typer(
        name="chunkllama",
        no_args_is_help=True,
        add_completion=False,
        pretty_exceptions_enable=False,
        rich_markup_mode=None,  # plain help: rich's columns cut long flags at 80 characters
        context_settings={"help_option_names": ["-h", "--help"]},
        help="LLM serving for many tenants that share prompts.",
    )
    app.callback()(_options)
    for name in names:
        _COMMANDS[name](app)
    return app


def run(arguments: list[str]) -> int:
    """Run one command line and return its exit code."""
    first = arguments[:1]
    asked = ["version"] if first == ["--version"] else [x for x in first if x in _COMMANDS]
    try:
        app = make_app(asked or _COMMANDS)
        result = app(args=arguments, prog_name="chunkllama", standalone_mode=False)
        sys.stdout.flush()
    except ChunkLlamaError as error:
        return _fail(str(error))
    except BrokenPipeError:  # the reader of the output, such as head, has ended
        if asked == ["serve"]:  # its output is the log; a socket is broken
            raise
        _drop_output()
        return _BROKEN_PIPE
    except OSError as error:  # of a file that a command could not check beforehand
        if error.filename is not None:
            return _fail(f"{error.filename}: {error.strerror}")
        if error.errno not in _OUTPUT_ERRORS:
            raise
        try:  # the file may be another one
            sys.stdout.flush()
        except OSError:
            _drop_output()
        return _fail(f"the output cannot be written: {error.strerror}")
    except (KeyboardInterrupt, typer.Abort):
        return _INTERRUPTED
    except Exception as error:
        if not hasattr(error, "format_message"):  # click's usage errors have it
            raise
        if type(error).__name__ == "NoArgsIsHelpError":  # its message is the help
            print(error.format_message())
            return 0
        from chunkllama_server.commands.other_servers import explain

        return _fail(explain(error, arguments))
    return result if isinstance(result, int) else 0


def command_names() -> list[tuple[str, ...]]:
    """Return every command as the words after ``chunkllama``, groups before their commands."""

    def walk(command: Any, path: tuple[str, ...]) -> Iterator[tuple[str, ...]]:
        for name, below in getattr(command, "commands", {}).items():
            yield (*path, name)
            yield from walk(below, (*path, name))

    return list(walk(typer.main.get_command(make_app(_COMMANDS)), ()))


def _print_version(requested: bool) -> None:
    if requested:
        print(__version__)
        raise typer.Exit


def _options(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Print the version."
        ),
    ] = False,
) -> None:
    pass


def _drop_output() -> None:
    """Lose what was not written to stdout, which would fail again when the process ends."""
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, sys.stdout.fileno())
    os.close(null)


def _fail(message: str) -> int:
    line = " ".join(message.split())
    print(f"chunkllama: error: {line}", file=sys.stderr)
    return USAGE_ERROR


def _add_version(app: typer.Typer) -> None:
    @app.command()
    def version() -> None:
        """Print the version."""
        print(__version__)


def _add_health(app: typer.Typer) -> None:
    @app.command()
    def health(
        url: Annotated[
            str,
            typer.Option(
                help="Server to ask. Default: the one that the flags of a container's first "
                "process, the environment or the YAML file configure; else port 8000 of this "
                "machine."
            ),
        ] = "",
        config: Annotated[str, typer.Option(help="YAML file of the server.", metavar="FILE")] = "",
        timeout: Annotated[float, typer.Option(help="Seconds to wait for the answer.")] = 2.0,
    ) -> int:
        """Ask a server whether it is ready: exit code 0 if so, else 1."""
        from chunkllama_server.process.health_check import (
            check_health,
            container_arguments,
            server_url,
        )

        arguments = [*container_arguments(), *(["--config", config] if config else [])]
        try:
            problem = check_health(url or server_url(arguments, os.environ), timeout)
        except ChunkLlamaError as error:
            problem = str(error)
        if problem:
            print(problem, file=sys.stderr)
        return 1 if problem else 0


def _add_serve(app: typer.Typer) -> None:
    from chunkllama_server.config.flags import (
        GroupedCommand,
        load_from_flags,
        with_setting_flags,
    )
    from chunkllama_server.config.settings import Settings

    @app.command(cls=GroupedCommand)
    @with_setting_flags
    def serve(**flags: object) -> int:
        """Serve a model over an OpenAI-compatible HTTP API."""

        def read_settings() -> Settings:
            return load_from_flags(flags).settings

        settings = read_settings()
        from chunkllama_server.process.launch import (
            serve_forever,  # after the settings, whose errors must be fast
        )

        return serve_forever(settings, read_settings)


def _add_config(app: typer.Typer) -> None:
    from chunkllama_server.config.flags import (
        GroupedCommand,
        load_from_flags,
        show_settings,
        with_setting_flags,
    )

    group = typer.Typer(no_args_is_help=True, help="Show the configuration.")

    @group.callback()
    def config() -> None:
        pass

    @group.command(cls=GroupedCommand)
    @with_setting_flags
    def show(**flags: object) -> None:
        """Print the value and origin of every setting.

        Also what automatic ones become on this machine.
        """
        loaded = load_from_flags(flags)
        from chunkllama_server.config.effective import effective_values

        show_settings(loaded, *effective_values(loaded.settings))

    app.add_typer(group, name="config")


def _add_models(app: typer.Typer) -> None:
    group = typer.Typer(
        invoke_without_command=True,
        help="List the models that can be downloaded.",
    )

    @group.callback()
    def models(context: typer.Context) -> None:
        if context.invoked_subcommand is None:
            show()

    def show() -> None:
        from chunkllama.models.loading.hub import aliases
        from chunkllama.resources import cache_folder

        folder = cache_folder() / "models"
        cached = [path.name for path in folder.iterdir()] if folder.is_dir() else []
        table = Table("model", "in the cache")
        for alias in aliases():
            present = any(name.startswith(f"{alias}-") for name in cached)
            table.add_row(alias, "yes" if present else "no")
        make_console().print(table)

    @group.command("list")
    def list_architectures() -> None:
        """Print how each supported architecture runs, and its limits."""
        from chunkllama.models.listing import NOTES, entries

        table = Table()
        for column in ("architecture", "cpu", "cuda", "quantizations", "gguf", "limits"):
            table.add_column(column, overflow="fold")
        for entry in entries():
            table.add_row(
                *(entry.architecture, entry.cpu, entry.cuda, entry.quantizations),
                *(entry.gguf, entry.limits),
            )
        make_console().print(table, *NOTES, sep="\n")

    @group.command()
    def fetch(
        model: Annotated[str, typer.Argument(help="Alias or hub id; a folder is checked alone.")],
    ) -> None:
        """Download and convert a model now.

        Serving it later needs no network.
        """
        from chunkllama.logger import configure_logging
        from chunkllama.models.loading.hub import resolve_model

        configure_logging()
        print(resolve_model(model))

    app.add_typer(group, name="models")


def _add_bench(app: typer.Typer) -> None:
    from chunkllama_server.bench.command import bench_app

    app.add_typer(bench_app, name="bench")


def _add_capacity(app: typer.Typer) -> None:
    from chunkllama_server.capacity.command import capacity

    app.command()(capacity)


def _add_doctor(app: typer.Typer) -> None:
    from chunkllama_server.config.flags import (
        GroupedCommand,
        load_from_flags,
        with_setting_flags,
    )

    @app.command(cls=GroupedCommand)
    @with_setting_flags
    def doctor(**flags: object) -> int:
        """Check what serving needs on this machine.

        Exit code 1 if a server could not start.
        """
        settings = load_from_flags(flags).settings
        from chunkllama_server.process.doctor import examine

        findings = examine(settings.engine())
        for finding in findings:
            print(f"{finding.verdict:8} {finding.topic:11} {finding.text}")
        return 1 if any(finding.verdict == "problem" for finding in findings) else 0


def _add_demo(app: typer.Typer) -> None:
    from chunkllama_server.bench.demo import demo_app

    app.add_typer(demo_app, name="demo")


def _add_tune(app: typer.Typer) -> None:
    from chunkllama_server.commands.tune import tune

    app.command()(tune)


def _add_verify(app: typer.Typer) -> None:
    from chunkllama_server.commands.verify import verify

    app.command()(verify)


def _add_batch(app: typer.Typer) -> None:
    from chunkllama_server.commands.batch import batch

    app.command()(batch)


def _add_finetune(app: typer.Typer) -> None:
    from chunkllama_server.commands.finetune import finetune

    app.command()(finetune)


def _add_pack(app: typer.Typer) -> None:
    from chunkllama_server.commands.pack import pack_app

    app.add_typer(pack_app, name="pack")


_COMMANDS: dict[str, Callable[[typer.Typer], None]] = {
    "serve": _add_serve,
    "batch": _add_batch,
    "bench": _add_bench,
    "capacity": _add_capacity,
    "demo": _add_demo,
    "doctor": _add_doctor,
    "finetune": _add_finetune,
    "health": _add_health,
    "config": _add_config,
    "version": _add_version,
    "models": _add_models,
    "pack": _add_pack,
    "tune": _add_tune,
    "verify": _add_verify,
}
