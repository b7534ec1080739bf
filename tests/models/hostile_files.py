"""Mutations of every file of a model folder, each tried as a server's start tries it.

Run in a process of its own (``hostile_files.py KIND COUNT SEED FOLDER``), so that the peak of its
memory is that of the mutations; prints one JSON object.
"""

from __future__ import annotations

import contextlib
import copy
import json
import logging
import math
import os
import random
import resource
import shutil
import struct
import sys
import traceback
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from chunkllama.config import EngineConfig
from chunkllama.engine.build import build_engine
from chunkllama.engine.core import EngineCore
from chunkllama.engine.grammar import GrammarCompiler
from chunkllama.errors import ChunkLlamaError, ConfigError, InvalidRequestError
from chunkllama.messages import EngineRequest
from chunkllama.models.config import read_spec
from chunkllama.models.loading.gguf import convert_gguf, index_gguf
from chunkllama.models.loading.safetensors import Checkpoint
from chunkllama.models.tensors import expected_shapes
from chunkllama.sampling_params import SamplingParams
from chunkllama.text.chat_template import load_chat_template
from chunkllama.text.tokenizer import load_tokenizer

TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content | trim }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "vocab_size": 272,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "rope_scaling": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 128,
    },
    "tie_word_embeddings": True,
    "hidden_act": "silu",
    "torch_dtype": "float32",
    "bos_token_id": 256,
    "eos_token_id": 258,
}
Tensors = dict[str, tuple[str, list[int], bytes]]
GENERATION = {
    "temperature": 0.7,
    "top_p": 0.9,
    "top_k": 50,
    "min_p": 0.01,
    "repetition_penalty": 1.1,
    "bos_token_id": 256,
    "eos_token_id": [258],
}
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


def write_folder(folder: Path) -> Path:
    """A complete tiny model with a byte-level tokenizer."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(CONFIG))
    (folder / "generation_config.json").write_text(json.dumps(GENERATION))
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    names = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    tokenizer.add_special_tokens([AddedToken(name, special=True) for name in names])
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "bos_token": "<|endoftext|>",
        "eos_token": {"content": "<|im_end|>", "special": True},
        "add_bos_token": True,
        "added_tokens_decoder": {"258": {"content": "<|im_end|>", "special": True}},
        "additional_special_tokens": ["<|im_start|>"],
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    write_weights(folder / "model.safetensors", tensors(folder))
    return folder


def tensors(folder: Path) -> Tensors:
    """Type, shape and content of each tensor of the folder's config.json."""
    rng = np.random.default_rng(0)
    return {
        name: ("F32", list(shape), rng.normal(0, 0.1, shape).astype(np.float32).tobytes())
        for name, shape in expected_shapes(read_spec(folder))
    }


def write_weights(path: Path, found: Tensors) -> None:
    header, at = {}, 0
    for name, (dtype, shape, blob) in found.items():
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [at, at + len(blob)]}
        at += len(blob)
    text = json.dumps(header).encode()
    blobs = b"".join(blob for _, _, blob in found.values())
    path.write_bytes(struct.pack("<Q", len(text)) + text + blobs)


def write_shards(folder: Path) -> None:
    """The weights in two files with an index."""
    found = tensors(folder)
    (folder / "model.safetensors").unlink()
    names = sorted(found)
    weight_map = {name: f"model-{i % 2 + 1}.safetensors" for i, name in enumerate(names)}
    for shard in sorted(set(weight_map.values())):
        part = {name: found[name] for name in names if weight_map[name] == shard}
        write_weights(folder / shard, part)
    index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


QUANTIZATION: dict[str, dict[str, Any]] = {
    "awq": {"quant_method": "awq", "bits": 4, "group_size": 16, "version": "gemm"},
    "gptq": {"quant_method": "gptq", "bits": 4, "group_size": 16, "desc_act": False},
    "packed": {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "config_groups": {"group_0": {"weights": {"num_bits": 4}, "targets": ["Linear"]}},
        "sparsity_config": {"format": "dense"},
        "transform_config": {},
        "ignore": ["lm_head"],
    },
    "int8": {"quant_method": "compressed-tensors", "config_groups": {}},
    "fp8": {"quant_method": "fp8", "weight_block_size": [128, 128], "ignored_layers": []},
}


def write_quantized(folder: Path, method: str) -> None:
    """The projections as codes of 4 or 8 bits with scales."""
    found = tensors(folder)
    rng = np.random.default_rng(1)
    for name in [name for name in found if name.endswith("_proj.weight")]:
        module, (_, (rows, columns), _) = name.removesuffix("weight"), found.pop(name)
        groups = columns // 16
        parts: dict[str, tuple[str, list[int]]] = {
            "awq": {
                "qweight": ("I32", [columns, rows // 8]),
                "qzeros": ("I32", [groups, rows // 8]),
                "scales": ("F16", [groups, rows]),
            },
            "gptq": {
                "qweight": ("I32", [columns // 8, rows]),
                "qzeros": ("I32", [groups, rows // 8]),
                "scales": ("F16", [groups, rows]),
            },
            "packed": {
                "weight_packed": ("I32", [rows, columns // 8]),
                "weight_scale": ("F16", [rows, groups]),
            },
            "int8": {"weight": ("I8", [rows, columns]), "weight_scale": ("F16", [rows, 1])},
            "fp8": {"weight": ("F8_E4M3", [rows, columns]), "weight_scale": ("F16", [1])},
        }[method]
        for part, (dtype, shape) in parts.items():
            if dtype == "F16":
                blob = np.full(shape, 0.01, np.float16).tobytes()
            else:
                size = 4 if dtype == "I32" else 1
                # of a byte's values the two NaN of fp8 are left out
                blob = (rng.integers(0, 256, math.prod(shape) * size) & 0x7E).astype("u1").tobytes()
            found[module + part] = (dtype, shape, blob)
    write_weights(folder / "model.safetensors", found)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(
        json.dumps(config | {"quantization_config": QUANTIZATION[method]})
    )


def write_gguf(path: Path, quantized: tuple[str, ...] = ()) -> Path:
    """The same model as llama.cpp writes it.

    Args:
        quantized: tensors stored as Q8_0 instead of F32.
    """
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("tiny")
    writer.add_context_length(512)
    writer.add_embedding_length(32)
    writer.add_block_count(1)
    writer.add_feed_forward_length(48)
    writer.add_head_count(2)
    writer.add_head_count_kv(1)
    writer.add_key_length(16)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(16)
    writer.add_rope_freq_base(10000.0)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    tokens = [*sorted(pre_tokenizers.ByteLevel.alphabet()), "<|endoftext|>", "ab", "<|im_end|>"]
    writer.add_token_list(tokens)
    writer.add_token_types([*[1] * 256, 3, 1, 3])
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(256)
    writer.add_eos_token_id(258)
    writer.add_chat_template(TEMPLATE)
    rng = np.random.default_rng(0)
    shapes = {
        "token_embd": (259, 32), "output_norm": (32,), "blk.0.attn_norm": (32,),
        "blk.0.ffn_norm": (32,), "blk.0.attn_q": (32, 32), "blk.0.attn_k": (16, 32),
        "blk.0.attn_v": (16, 32), "blk.0.attn_output": (32, 32), "blk.0.ffn_gate": (48, 32),
        "blk.0.ffn_up": (48, 32), "blk.0.ffn_down": (32, 48),
    }  # fmt: skip
    for name, shape in shapes.items():
        values = rng.normal(0, 0.1, shape).astype(np.float32)
        if name in quantized:
            codes = gguf.quantize(values, gguf.GGMLQuantizationType.Q8_0)
            writer.add_tensor(f"{name}.weight", codes, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
        else:
            writer.add_tensor(f"{name}.weight", values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


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
