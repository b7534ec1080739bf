"""Models by their sizes alone: a YAML file with what a config.json holds, and no weights. No torch.

With ``load_format: dummy`` such a model, or any folder's, is served with random weights: speed and
memory depend on sizes only.
"""

from __future__ import annotations

import hashlib
import json
import math
from pathlib import Path
from typing import Any, Final

import yaml

from chunkllama.errors import ConfigError
from chunkllama.model_spec import ModelSpec
from chunkllama.models.config import parse_spec
from chunkllama.models.loading.safetensors import ITEM_SIZES, Checkpoint
from chunkllama.models.loading.tensor_info import TensorInfo
from chunkllama.models.tensors import expected_shapes

SUFFIX: Final = ".yaml"
_MAX_BYTES: Final = 64 << 10
_VERSION: Final = 1  # raise it when what is written changes
_MARK: Final = "sizes.yaml"
_CONTROL: Final = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
_TEMPLATE: Final = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
_DTYPES: Final = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}


class Shapes(Checkpoint):
    """The tensors that a model needs, of the sizes that its specification gives them; no bytes.

    Args:
        spec: of an architecture of this server.
    """

    def __init__(self, spec: ModelSpec) -> None:
        dtype = _DTYPES[spec.dtype]
        self._infos = {
            name: TensorInfo(Path(), dtype, shape, 0, math.prod(shape) * ITEM_SIZES[dtype])
            for name, shape in expected_shapes(spec)
        }
        self._maps = {}
        self._modules = {}


def open_checkpoint(folder: Path, spec: ModelSpec, load_format: str) -> Checkpoint:
    """Return a folder's tensors, checked, or with ``dummy`` those that ``spec`` asks for.

    Raises:
        ConfigError: as ``Checkpoint``; a folder without weights, or a model whose tensors only
            transformers knows.
    """
    if load_format == "dummy":
        if not spec.is_native:
            raise ConfigError(
                f"load_format: dummy needs an architecture of this server, not {spec.architecture}"
            )
        return Shapes(spec)
    if (folder / _MARK).exists():
        raise ConfigError("load_format: the model is sizes without weights; set it to dummy")
    return Checkpoint(folder, spec)


def shape_folder_name(path: Path) -> str:
    """The name of the cached folder of a YAML file: another content has another name.

    Raises:
        ConfigError: the file cannot be read, or is too large for sizes.
    """
    digest = hashlib.sha256(f"{_VERSION}\0".encode() + _read(path)).hexdigest()
    return f"{path.stem}-{digest[:12]}"


def write_shape_folder(path: Path, folder: Path) -> None:
    """Write what a YAML file lacks of a model's folder: its config.json and a tokenizer.

    A token is a byte of text; those beyond are numbers as text, so that every id of an answer has
    one.

    Args:
        path: of the file.
        folder: exists and is empty.

    Raises:
        ConfigError: the file does not describe a model.
    """
    from tokenizers import pre_tokenizers  # here, as starts that are refused need none

    text = _read(path)
    try:
        values = yaml.safe_load(text)
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ConfigError(f"{path}: not valid YAML: {reason}") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: a model's file maps the keys of config.json to values")
    spec = parse_spec(values, path)
    tokens = [*sorted(pre_tokenizers.ByteLevel.alphabet()), *_CONTROL]
    if spec.vocab_size < len(tokens):
        raise ConfigError(f"{path}: vocab_size must be at least {len(tokens)}, for all bytes")
    (folder / "config.json").write_text(json.dumps(values))
    (folder / _MARK).write_bytes(text)
    _write_tokenizer(folder, [*tokens, *(f"Ġ{n}" for n in range(len(tokens), spec.vocab_size))])


def _write_tokenizer(folder: Path, tokens: list[str]) -> None:
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(name, special=True) for name in _CONTROL])
    tokenizer.save(str(folder / "tokenizer.json"))
    config: dict[str, Any] = {
        "bos_token": _CONTROL[0],
        "eos_token": _CONTROL[2],
        "add_bos_token": False,
        "chat_template": _TEMPLATE,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


def _read(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            text = file.read(_MAX_BYTES + 1)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from None
    if len(text) > _MAX_BYTES:
        raise ConfigError(f"{path}: larger than {_MAX_BYTES >> 10} KiB, not a model's sizes")
    return text
