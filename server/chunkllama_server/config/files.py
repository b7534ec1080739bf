"""Read the files that settings name, with errors of one line; lock the folders."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path
from typing import Any, Final

import yaml

from chunkllama.errors import ConfigError

MIN_SECRET_BYTES: Final = 32
_MAX_BYTES: Final = 16 << 20  # of a file of settings, keys, tenants or prompts


def read_text(path: Path, key: str) -> str:
    """Read a file's text.

    Raises:
        ConfigError: it cannot be read, or is no text of a sensible size; ``key`` is the setting
            that names it.
    """
    try:
        with path.open("rb") as file:
            content = file.read(_MAX_BYTES + 1)
        _check_size(content, path, key)
        return content.decode("utf-8-sig")  # editors of Windows begin a file with a mark
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        raise ConfigError(f"{key}: cannot read {path}: {reason}") from None


def _check_size(content: bytes, path: Path, key: str) -> None:
    if len(content) > _MAX_BYTES:
        raise ConfigError(f"{key}: {path} is larger than {_MAX_BYTES >> 20} MiB; another file?")


def read_secret(path: Path, key: str) -> bytes:
    """Read a secret of at least ``MIN_SECRET_BYTES``, without the white space around it.

    Its group may read it, because Kubernetes gives a pod's files to a group.

    Raises:
        ConfigError: it cannot be read, others may read or write it, it is short, or too
            large.
    """
    try:
        with path.open("rb") as file:
            mode = os.fstat(file.fileno()).st_mode & 0o777
            content = file.read(_MAX_BYTES + 1)
    except OSError as error:
        raise ConfigError(f"{key}: cannot read {path}: {error.strerror}") from None
    if mode & 0o027:
        raise ConfigError(f"{key}: other users have access to {path} ({mode:04o}): chmod 600 it")
    _check_size(content, path, key)
    secret = content.strip()
    if len(secret) < MIN_SECRET_BYTES:
        raise ConfigError(
            f"{key}: {path} holds {len(secret)} bytes, fewer than {MIN_SECRET_BYTES}: fill it with "
            "openssl rand -hex 32"
        )
    return secret


_MAX_DIGITS = 100  # of a number; what computes with longer ones, or prints them, fails


# What PyYAML raises at values such as `2000-99-99` and `!!bool x`.
_OF_VALUES = (ValueError, ArithmeticError, LookupError, AttributeError)


class _RefusedError(yaml.MarkedYAMLError):
    pass


class _CheckedLoader(yaml.SafeLoader):
    """Refuses long numbers, values that are not of their type, and a key that occurs twice in a
    mapping, of which YAML would take the last.

    Mappings are checked as they are written: what a merge key adds to one is overridden by its own.
    """

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node: yaml.MappingNode = super().compose_mapping_node(anchor)
        seen: set[tuple[str, str]] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if (key.tag, key.value) in seen:
                    raise _RefusedError(
                        problem=f"{key.value} occurs twice", problem_mark=key.start_mark
                    )
                seen.add((key.tag, key.value))
        return node

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        if not isinstance(node, yaml.ScalarNode):
            return super().construct_object(node, deep)
        kind = node.tag.removeprefix("tag:yaml.org,2002:")
        problem = f"a value that is no {kind} (put a text in quotes)"
        if kind in ("int", "float") and len(node.value) > _MAX_DIGITS:
            problem = f"a number of {len(node.value)} characters (write at most {_MAX_DIGITS})"
            raise _RefusedError(problem=problem, problem_mark=node.start_mark)
        try:
            return super().construct_object(node, deep)
        except _OF_VALUES:
            raise _RefusedError(problem=problem, problem_mark=node.start_mark) from None


def load_yaml(path: Path, key: str) -> Any:
    """Read a YAML file.

    Raises:
        ConfigError: it cannot be read, is not YAML, or names something twice; ``key`` is the
            setting that names it.
    """
    text = read_text(path, key)
    try:
        return yaml.load(text, Loader=_CheckedLoader)
    except (yaml.YAMLError, RecursionError, *_OF_VALUES) as error:
        mark = getattr(error, "problem_mark", None)
        line = f" at line {mark.line + 1}" if mark else ""
        what = error.problem if isinstance(error, _RefusedError) else "not valid YAML"
        raise ConfigError(f"{key}: {path}: {what}{line}") from None


def read_yaml(path: Path) -> dict[str, Any]:
    """Read a settings file of ``key: value`` lines.

    Raises:
        ConfigError: it cannot be read or holds something else.
    """
    document = load_yaml(path, "config")
    if document is None:
        return {}
    if not isinstance(document, dict) or not all(isinstance(key, str) for key in document):
        raise ConfigError(f"config: {path} must hold key: value lines")
    return document


def lock_folder(folder: Path) -> int:
    """Make a folder of mode 0700 and lock it for this process.

    Returns:
        A descriptor; closing it, or the end of the process, unlocks the folder.

    Raises:
        BlockingIOError: another process has locked it.
        OSError: it cannot be written.
    """
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    folder.chmod(0o700)
    lock = os.open(folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(lock)
        raise
    return lock
