"""Recognize what is often given in place of a model: adapters, Git LFS pointers, web pages."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Final

from chunkllama.errors import ConfigError

_LFS: Final = b"version https://git-lfs"
_PAGES: Final = (b"<!doctype", b"<html", b"<?xml")
_CHECKED: Final = ("*.json", "*.jinja", "*.safetensors", "tokenizer.model")
_MAX_FILES: Final = 2000
_MAX_BYTES: Final = 256 << 20  # of a file that is read as a whole; weights are not
# File of another layout, and what to do about it.
_LAYOUTS: Final = {
    "params.json": "Meta's own layout; give the folder in Hugging Face's layout, with config.json "
    "and *.safetensors",
    "model_index.json": "a diffusers pipeline, not a decoder",
    "model.onnx": "an ONNX model; give its safetensors folder",
    "openvino_model.xml": "an OpenVINO model; give its safetensors folder",
    "model.nemo": "a NeMo checkpoint; convert it to Hugging Face's layout",
}


def wrong_content(path: Path) -> str:
    """What a file holds in place of a model's data, and the fix; "" if it is nothing known."""
    try:
        with path.open("rb") as file:
            head = file.read(64).lstrip().lower()
    except OSError:
        return ""
    if head.startswith(_LFS):
        return "a Git LFS pointer, not the file itself; run 'git lfs pull' in its folder"
    if head.startswith(_PAGES):
        return "a web page, not the file itself; the download may need a login, repeat it"
    return ""


def check_is_file(path: Path) -> None:
    """Refuse what may block when it is opened, and a link to nothing, as a download that was cut
    leaves; a missing file and a folder pass.

    Raises:
        ConfigError: a device, pipe or socket, or a link whose target is gone.
    """
    if path.is_symlink() and not path.exists():
        raise ConfigError(
            f"{path}: a link to {path.readlink()}, which does not exist; download the file again"
        )
    if path.exists() and not path.is_file() and not path.is_dir():
        raise ConfigError(f"{path}: a device, pipe or socket, not a file; delete it")


def check_folder(folder: Path) -> None:
    """Refuse a folder that is recognizably no model, or that holds placeholders of its files.

    Raises:
        ConfigError: one line with what it is and what to give instead. A folder that is not
            recognized passes; the readers of its files find what is missing.
    """
    if not folder.is_dir():
        return
    if not (folder / "config.json").exists():
        found = _other_layout(folder)
        if found:
            raise ConfigError(f"{folder}: {found}")
    paths = [path for pattern in _CHECKED for path in folder.glob(pattern)]
    for path in sorted(paths)[:_MAX_FILES]:
        check_is_file(path)
        if path.is_file() and path.suffix != ".safetensors" and path.stat().st_size > _MAX_BYTES:
            raise ConfigError(f"{path}: larger than {_MAX_BYTES >> 20} MiB, not a model's file")
        if found := wrong_content(path):
            raise ConfigError(f"{path}: {found}")


def _other_layout(folder: Path) -> str:
    if (folder / "adapter_config.json").exists():
        base = _base_model(folder / "adapter_config.json")
        return (
            f"a LoRA adapter, not a model; give its base model{base} and --lora NAME=FOLDER, or "
            "merge it with peft's merge_and_unload() and give the merged folder"
        )
    for name, what in _LAYOUTS.items():
        if (folder / name).exists():
            return what
    if files := sorted(folder.glob("*.gguf")):
        return f"a folder of GGUF files; give one of them, such as {files[0]}"
    if snapshots := sorted(folder.glob("snapshots/*/config.json")):
        return f"a folder of the hub's cache; give {snapshots[-1].parent}"
    below = sorted(path.parent for path in folder.glob("*/config.json"))
    if below:
        return f"no config.json here; give the folder below it, such as {below[0]}"
    if not any(folder.iterdir()):
        return "empty, no config.json; is it a complete model folder?"
    return ""


def _base_model(path: Path) -> str:
    try:
        name = json.loads(path.read_text(encoding="utf-8"))["base_model_name_or_path"]
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        return ""
    return f" ({name:.200})" if isinstance(name, str) and name else ""
