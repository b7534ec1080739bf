"""Generate command-line flags from the fields of the configuration."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any, Final, TypeVar, get_type_hints

import typer
from pydantic.fields import FieldInfo
from rich.console import Console
from rich.table import Column, Table
from rich.text import Text
from typer.core import TyperCommand

from chunkllama.config_errors import RENAMED_KEYS
from chunkllama.errors import ConfigError
from chunkllama_server.config.kinds import Kind, choices, kind_of, show_value
from chunkllama_server.config.settings import Loaded, Settings, load_settings

F = TypeVar("F", bound=Callable[..., Any])
_MAX_WIDTH = 100_000  # columns of a table that no terminal shows
MODEL_WORD = "model_word"  # the parameter of the model that a command takes without a flag
_TRUTHS = ("true", "false", "yes", "no", "on", "off", "1", "0")
_METAVARS: Final[dict[Kind, str]] = {
    "file": "FILE",
    "folder": "FOLDER",
    "size": "SIZE",
    "seconds": "SECONDS",
    "number": "N",
}


class GroupedCommand(TyperCommand):
    """A command whose ``--help`` lists the flags by group, complete at any terminal width."""

    def format_options(self, ctx: typer.Context, formatter: Any) -> None:  # type: ignore[override]
        """Write one section per ``rich_help_panel``."""
        groups: dict[str, list[tuple[str, str]]] = {}
        for parameter in self.get_params(ctx):
            record = parameter.get_help_record(ctx)
            if record is not None:
                title = getattr(parameter, "rich_help_panel", None) or "General"
                groups.setdefault(title, []).append(record)
        for title, records in groups.items():
            with formatter.section(title):
                formatter.write_dl(records)


def with_setting_flags(command: F) -> F:
    """Give a ``**flags`` command one option per setting, and ``--config``.

    Values stay strings: the configuration parses values of all sources alike. Parameters that the
    command has of its own come first; one that has none takes the model as its first word, too.
    """
    hints = get_type_hints(command, include_extras=True)
    parameters = [
        own.replace(annotation=hints[own.name])
        for own in inspect.signature(command).parameters.values()
        if own.kind is not inspect.Parameter.VAR_KEYWORD
    ]
    if not parameters:
        word = typer.Argument(metavar="MODEL", help="The same as --model.", show_default=False)
        parameters.append(
            inspect.Parameter(
                MODEL_WORD,
                inspect.Parameter.POSITIONAL_OR_KEYWORD,
                default=None,
                annotation=Annotated[str | None, word],
            )
        )
    parameters.append(
        _parameter("config", str | None, "YAML file with settings.", "General", "FILE")
    )
    for group in Settings.groups:
        title = group.__name__.removesuffix("Config")
        for key, field in group.model_fields.items():
            parameters.append(_setting(key, field, title))
    parameters += [_former(key) for key in RENAMED_KEYS]
    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    command.__annotations__ = {p.name: p.annotation for p in parameters}
    return command


def load_from_flags(flags: Mapping[str, Any]) -> Loaded:
    """Load settings from a command's flags and all other sources.

    Raises:
        ConfigError: an unknown key or a bad value.
    """
    given = {key: value for key, value in flags.items() if value is not None and value != []}
    config_file = given.pop("config", None)
    if config_file == "":
        raise ConfigError("config: empty (from command line); leave it out, or name a YAML file")
    if (word := given.pop(MODEL_WORD, None)) is not None:
        given["model"] = _model_of(str(word), given.get("model"))
    return load_settings(given, config_file=None if config_file is None else Path(config_file))


def _model_of(word: str, flag: str | None) -> str:
    """The model that the first word of a command names.

    Raises:
        ConfigError: the flag names one, too, or the word is meant for a switch before it.
    """
    if flag is not None:
        raise ConfigError(f"model: given twice, as {word} and as --model {flag}; give one of them")
    if word.lower() in _TRUTHS and not Path(word).exists():
        raise ConfigError(
            f"model: {word} is none; a switch takes no value: write --strict or --no-strict"
        )
    return word


def show_settings(loaded: Loaded, effective: Mapping[str, str], note: str) -> None:
    """Print a table of keys, values and origins, secrets masked.

    Args:
        effective: what automatic values are on this machine, by key.
        note: what is not known; printed below the table.
    """
    table = Table(
        "key", *(Column(name, overflow="fold") for name in ("value", "from", "in effect"))
    )
    for key, field in sorted(Settings.model_fields.items()):
        value = show_value(getattr(loaded.settings, key), kind_of(key, field))
        cells = (value, loaded.origins[key], effective.get(key, ""))
        table.add_row(key, *map(Text, cells))
    console = Console(soft_wrap=True)
    if not console.is_terminal:  # programs read one whole row a line
        whole = console.measure(table, options=console.options.update(max_width=_MAX_WIDTH))
        console.width = max(console.width, whole.maximum)
    console.print(table)
    if note:
        print(note)


def _setting(key: str, field: FieldInfo, title: str) -> inspect.Parameter:
    text, kind = field.description or "", kind_of(key, field)
    default = show_value(field.default, kind)
    if default != "-":
        text += f" [default: {default}]"
    if kind == "boolean":
        return _parameter(key, bool | None, text, title, None)
    if options := choices(field.annotation):
        text += f" [{'|'.join(map(str, options))}]"
    metavar = "NAME" if options else _METAVARS.get(kind, "TEXT")
    parsed: Any = list[str] | None if kind == "list" else str | None
    extra = field.json_schema_extra
    short = extra.get("flag") if isinstance(extra, dict) else None
    names = (f"--{key.replace('_', '-')}", str(short)) if short else ()
    return _parameter(key, parsed, text, title, metavar, names)


def _former(key: str) -> inspect.Parameter:
    """Make the flag of a former name, which ``--help`` does not list."""
    return inspect.Parameter(
        key,
        inspect.Parameter.KEYWORD_ONLY,
        default=None,
        annotation=Annotated[str | None, typer.Option(hidden=True)],
    )


def _parameter(
    key: str,
    kind: Any,
    text: str,
    title: str,
    metavar: str | None,
    names: tuple[str, ...] = (),
) -> inspect.Parameter:
    option = typer.Option(
        *names, help=text, rich_help_panel=title, metavar=metavar, show_default=False
    )
    return inspect.Parameter(
        key, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[kind, option]
    )
