"""Mutations of every file of a model folder, each tried as a server's start tries it.

Run in a process of its own (``hostile_files.py KIND COUNT SEED FOLDER``), so that the peak of its
memory is that of the mutations; prints one JSON object.
"""

from __future__ import annotations

import contextlib
import copy
import json
import logging
import os
import random
import resource
import shutil
import struct
import sys
import traceback
from pathlib import Path
from typing import Any

from tiny_forms import QUANTIZATION, write_folder, write_gguf, write_quantized, write_shards

from chunkllama.config import EngineConfig
from chunkllama.engine.build import build_engine
from chunkllama.engine.core import EngineCore
from chunkllama.engine.grammar import GrammarCompiler
from chunkllama.errors import ChunkLlamaError, ConfigError, InvalidRequestError
from chunkllama.messages import EngineRequest
from chunkllama.models.config import read_spec
from chunkllama.models.loading.gguf import convert_gguf, index_gguf
from chunkllama.models.loading.safetensors import Checkpoint
from chunkllama.sampling_params import SamplingParams
from chunkllama.text.chat_template import load_chat_template
from chunkllama.text.tokenizer import load_tokenizer

HOSTILE: list[Any] = [
    None, True, False, -1, 0, 1, 50.0, 0.5, 1e-300, 1e308, float("nan"), float("inf"), 2**31,
    2**32, 2**62, 2**63, 10**400, "", "x", "\ud800", "../../etc/passwd", "a" * 10_000, [], {},
    [[]], [{}], [1e9] * 50, {"a": {"b": []}}, [None, "y"],
]  # fmt: skip
FRAGMENTS = [
    "{% for i in range(99999999) %}{% endfor %}", "{{ ''.__class__.__mro__ }}", "{{ 'a' * 10**9 }}",
    "{% for a in range(999) %}{% for b in range(999) %}xxxxxxxx{% endfor %}{% endfor %}", "{{",
    "{% endfor %}", "{{ messages | tojson * 99999 }}",
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "{{ lipsum }}", "{{ cycler.__init__.__globals__ }}", "{% set x = messages %}", "\ufffd",
    "{{ 1/0 }}",
    "{{ messages[99].x.y }}", "{{ 9**9**9 }}", "{% include 'x' %}", "{{ raise_exception('no') }}",
    "{{ (messages,)*9999999 }}", "{{ m.content.format(m) }}", "{% if %}", "{{ '%s' % m }}",
    "{% break %}", "{% for a in x %}" * 25 + "{% endfor %}" * 25, "{{ f(a=1, a=2) }}",
    "{{ " + "not " * 250 + "a }}", "{{ " + "9" * 5000 + " }}",
    "{% macro m(a, a) %}{% endmacro %}",
]  # fmt: skip


def mutate_bytes(data: bytes, end: int, rng: random.Random) -> bytes:
    """One to three changes in the first ``end`` bytes."""
    out = bytearray(data)
    for _ in range(rng.randint(1, 3)):
        if not out:
            break
        at = rng.randrange(min(end, len(out)))
        match rng.randrange(6):
            case 0:
                out[at] ^= 1 << rng.randrange(8)
            case 1:
                value = rng.choice([0, 1, 2**16, 2**31, 2**32, 2**40, 2**63, 2**64 - 1])
                out[at : at + 8] = value.to_bytes(8, "little")
            case 2:
                del out[at : at + rng.choice([1, 4, 8, 100])]
            case 3:
                out[at:at] = rng.randbytes(rng.choice([1, 4, 8, 100]))
            case 4:
                out[at : at + 4] = rng.choice(
                    [b"\xff\xff\xff\xff", b"\0\0\0\0", b"\x80\x00\xfe\xff"]
                )
            case 5 if rng.random() < 0.3:
                del out[at:]
    return bytes(out)


def mutate_json(text: str, rng: random.Random) -> str:
    """One to three members replaced, removed or doubled; now and then the text itself."""
    if rng.random() < 0.1:
        return mutate_bytes(text.encode(), len(text), rng).decode("utf-8", "surrogateescape")
    document = json.loads(text)
    for _ in range(rng.randint(1, 3)):
        places: list[tuple[Any, Any]] = []
        pending = [document]
        while pending:
            node = pending.pop()
            keys = list(node) if isinstance(node, dict) else list(range(len(node)))
            keys = keys if len(keys) < 40 else rng.sample(keys, 10)
            places += [(node, key) for key in keys]
            pending += [node[key] for key in keys if isinstance(node[key], dict | list)]
        if not places:
            break
        node, key = rng.choice(places)
        if rng.random() < 0.2:
            del node[key]
        elif rng.random() < 0.1 and isinstance(node, list):
            node.append(copy.deepcopy(node[key]))
        else:
            node[key] = copy.deepcopy(rng.choice(HOSTILE))
    return json.dumps(document)


def mutate_template(text: str, rng: random.Random) -> str:
    for _ in range(rng.randint(1, 3)):
        at = rng.randrange(len(text) + 1)
        match rng.randrange(3):
            case 0:
                text = text[:at] + text[at + rng.randint(1, 20) :]
            case 1:
                text = text[:at] + rng.choice(FRAGMENTS) + text[at:]
            case 2:
                text = text[:at] + text[at : at + 30] * rng.choice([2, 50]) + text[at:]
    return text


def start_and_answer(folder: Path) -> None:
    """What ``chunkllama serve`` does with a folder, and one request."""
    spec = read_spec(folder)
    Checkpoint(folder, spec)
    tokenizer = load_tokenizer(folder)
    if tokenizer.vocab_size > spec.vocab_size:
        raise ConfigError(f"{folder}: the tokenizer is larger than the model")
    template = load_chat_template(folder, tokenizer)
    with contextlib.suppress(InvalidRequestError):  # structured output is refused per request
        GrammarCompiler(tokenizer.to_json(), spec.vocab_size, list(spec.eos_token_ids))
    core = build_engine(
        EngineConfig.from_flat(model=str(folder), num_chunks=8, backend="reference", threads=1)
    )
    messages = [{"role": "user", "content": "hi <|im_end|>"}]
    try:
        ids = template.encode(messages) if template else tokenizer.encode("hi")
    except ChunkLlamaError:
        ids = tokenizer.encode("hi")
    answer(core, [i for i in ids if i < spec.vocab_size][:64] or [1], spec.default_sampling)


def answer(core: EngineCore, ids: list[int], defaults: dict[str, Any]) -> None:
    """Two tokens with the model's own sampling defaults."""
    sampling = SamplingParams(max_tokens=2, min_tokens=1, seed=1, **defaults)
    core.add(EngineRequest(request_id="r", prompt_token_ids=ids, sampling=sampling))
    for _ in range(50):
        deltas = core.step()
        if any(choice.finish_reason for delta in deltas for choice in delta.choices):
            return
    raise AssertionError("no answer in 50 steps")


def _prepare(kind: str, base: Path, folder: Path, rng: random.Random) -> None:
    """Write what the kind needs beside a copy of the model."""
    match kind:
        case "gguf_index":
            _convert(base / "tiny.gguf", folder)
        case "weight_index":
            write_shards(folder)
        case "quantization":
            write_quantized(folder, rng.choice(list(QUANTIZATION)))
        case "special_tokens":
            (folder / FILES[kind]).write_text(json.dumps(SPECIAL_TOKENS))
            (folder / "tokenizer_config.json").write_text("{}")


def _convert(path: Path, folder: Path) -> None:
    for file in folder.iterdir():
        file.unlink()
    index_gguf(path, folder)


def _mutate(kind: str, base: Path, folder: Path, rng: random.Random) -> None:
    """Damage one file of a copy of the model."""
    if kind == "gguf":
        data = (base / "tiny.gguf").read_bytes()
        damaged = folder.with_suffix(".gguf")
        # The metadata's end: what follows are weights, in which every value is one.
        damaged.write_bytes(mutate_bytes(data, data.rindex(b"blk.0.ffn_down") + 40, rng))
        for file in folder.iterdir():
            file.unlink()
        if rng.random() < 0.5:
            index_gguf(damaged, folder)
        else:
            convert_gguf(damaged, folder, lambda done, total: None)
        return
    if kind == "file":
        names = [name for name in FILES.values() if name]
        _replace(folder / rng.choice([*names, *OTHERS]), rng)
        return
    if kind == "quantization" and rng.random() < 0.5:
        config = json.loads((folder / "config.json").read_text())
        settings = mutate_json(json.dumps(config["quantization_config"]), rng)
        text = json.dumps(config | {"quantization_config": "@"}).replace('"@"', settings)
        (folder / "config.json").write_bytes(text.encode("utf-8", "surrogateescape"))
        return
    file = folder / FILES[kind]
    if file.suffix == ".safetensors":
        data = file.read_bytes()
        length = int.from_bytes(data[:8], "little")
        if rng.random() < 0.5:
            header = mutate_json(data[8 : 8 + length].decode(), rng)
            encoded = header.encode("utf-8", "surrogateescape")
            file.write_bytes(struct.pack("<Q", len(encoded)) + encoded + data[8 + length :])
        else:
            file.write_bytes(mutate_bytes(data, 8 + length, rng))
    elif kind == "template":
        file.write_text(mutate_template(file.read_text(), rng))
    else:
        text = mutate_json(file.read_text(), rng)
        file.write_bytes(text.encode("utf-8", "surrogateescape"))


def _replace(path: Path, rng: random.Random) -> None:
    """Put something else in a file's place: what no download makes, but an archive may hold."""
    path.unlink(missing_ok=True)
    match rng.randrange(9):
        case 0:
            path.mkdir()
        case 1:
            path.symlink_to(path)
        case 2:
            path.symlink_to("/nonexistent")
        case 3:
            path.symlink_to("/dev/zero")
        case 4:
            os.mkfifo(path)
        case 5:
            path.write_bytes(b"")
        case 6:
            path.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
        case 7:
            with path.open("wb") as file:  # sparse
                file.truncate(2**36)
        case 8:
            path.write_bytes(rng.randbytes(rng.choice([1, 8, 9, 100, 5000])))


SPECIAL_TOKENS: dict[str, Any] = {
    "bos_token": "<|endoftext|>",
    "eos_token": {"content": "<|im_end|>", "lstrip": False, "special": True},
    "additional_special_tokens": ["<|im_start|>", {"content": "<|im_end|>"}],
}
FILES = {
    "safetensors": "model.safetensors",
    "gguf": "tiny.gguf",
    "config": "config.json",
    "generation": "generation_config.json",
    "tokenizer": "tokenizer.json",
    "tokenizer_config": "tokenizer_config.json",
    "template": "chat_template.jinja",
    "weight_index": "model.safetensors.index.json",
    "special_tokens": "special_tokens_map.json",
    "gguf_index": "gguf.json",
    "quantization": "model.safetensors",
    "file": "",
}
# Read where they are, or part of what publishers upload.
OTHERS = (
    *("tokenizer.model", "adapter_config.json", "preprocessor_config.json", "chat_template.json"),
    *("added_tokens.json", "vocab.json", "merges.txt", "README.md", "model.onnx"),
)


def main(kind: str, count: int, seed: int, root: Path) -> dict[str, Any]:
    """Try ``count`` mutations; a failure neither serves nor is refused in one line."""
    logging.disable(logging.CRITICAL)
    base = write_folder(root / "base")
    write_gguf(base / "tiny.gguf")
    outcomes = {"served": 0, "refused": 0}
    failures: list[str] = []
    unmutated = 0
    for index in range(-3, count):
        rng = random.Random(f"{kind} {seed} {index}")
        folder = root / "model"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(base, folder, ignore=shutil.ignore_patterns("*.gguf"))
        try:
            _prepare(kind, base, folder, rng)
            if index >= 0:
                _mutate(kind, base, folder, rng)
            elif kind == "gguf":
                _convert(base / "tiny.gguf", folder)
            start_and_answer(folder)
            outcomes["served"] += 1
        except ConfigError as error:
            outcomes["refused"] += 1
            if index < 0 or not str(error) or len(str(error)) > 1500:
                failures.append(f"{index}: {error}"[:2000])
        except BaseException as error:
            where = traceback.format_exc(limit=-4)
            failures.append(f"{index}: {type(error).__name__}: {error}\n{where}"[:3000])
        if index == -1:
            unmutated = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {**outcomes, "failures": failures, "memory_ratio": round(peak / unmutated, 3)}


if __name__ == "__main__":
    print(json.dumps(main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), Path(sys.argv[4]))))
