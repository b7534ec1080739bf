"""Unusable folders are refused with one line that names the file, before any weight is read."""

from __future__ import annotations

import json
import math
import pickle
import resource
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from chunkllama.errors import ConfigError
from chunkllama.models.config import read_spec
from chunkllama.models.identity import hash_weights
from chunkllama.models.loading.safetensors import Checkpoint, read_header
from chunkllama.models.loading.sizes import allocated_bytes


def refusal(folder: Path) -> str:
    """The one-line message with which a folder is refused."""
    with pytest.raises(ConfigError) as caught:
        Checkpoint(folder, read_spec(folder))
    message = str(caught.value)
    assert "\n" not in message
    assert str(folder) in message
    return message


def edit_json(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def edit_header(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    data = path.read_bytes()
    (length,) = struct.unpack_from("<Q", data)
    header = json.loads(data[8 : 8 + length])
    change(header)
    encoded = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(encoded)) + encoded + data[8 + length :])


def test_missing_folder_and_files(tiny_folder: Path) -> None:
    with pytest.raises(ConfigError, match="no such folder"):
        read_spec(tiny_folder / "nowhere")
    (tiny_folder / "model.safetensors").unlink()
    assert "no model.safetensors" in refusal(tiny_folder)
    (tiny_folder / "config.json").unlink()
    assert "config.json: missing" in refusal(tiny_folder)


@pytest.mark.parametrize("text", ["", "{", "[1]", "nope", "[" * 100_000, '{"a": \udcff}'])
def test_config_that_is_not_a_json_object(text: str, tiny_folder: Path) -> None:
    (tiny_folder / "config.json").write_bytes(text.encode(errors="surrogateescape"))
    assert "config.json" in refusal(tiny_folder)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"architectures": ["BertForMaskedLM"]}, "unsupported architecture BertForMaskedLM"),
        ({"architectures": [], "model_type": "gpt2"}, "architecture unknown; supported: decoders"),
        ({"hidden_size": "big"}, "hidden_size must be a positive integer"),
        ({"num_hidden_layers": 0}, "num_hidden_layers must be a positive integer"),
        ({"num_hidden_layers": True}, "num_hidden_layers must be a positive integer"),
        ({"num_hidden_layers": 10**9}, "1000000000 layers"),
        ({"vocab_size": -1}, "vocab_size"),
        ({"num_key_value_heads": 4}, "no multiple"),
        ({"head_dim": 7}, "odd"),
        ({"hidden_act": "mish"}, "hidden_act 'mish' is not supported; supported: silu"),
        ({"quantization_config": {"bits": 4}}, "quant_method"),
        ({"dtype": "float8_e4m3fn"}, "dtype"),
        ({"rms_norm_eps": "small"}, "rms_norm_eps must be a number"),
        ({"rope_parameters": {"rope_type": "spiral"}}, "rope_type 'spiral'"),
        ({"rope_parameters": {"rope_type": "longrope"}}, "needs short_factor"),
        ({"rope_parameters": {"rope_type": "linear"}}, "needs factor"),
        ({"rope_parameters": 3}, "must be an object"),
        ({"intermediate_size": 81}, "mlp.gate_proj.weight has shape [80, 48]"),
        ({"vocab_size": 130}, "embed_tokens.weight has shape [131, 48]"),
        ({"num_hidden_layers": 3}, "no tensor model.layers.2"),
        ({"num_hidden_layers": 1}, "unexpected tensor model.layers.1"),
        ({"attention_bias": True}, "q_proj.bias"),
    ],
    ids=lambda value: str(value)[:50],
)
def test_config_that_does_not_fit(change: dict[str, Any], words: str, tiny_folder: Path) -> None:
    edit_json(tiny_folder / "config.json", lambda config: config.update(change))
    assert words in refusal(tiny_folder)


def test_the_window_of_a_mistral_is_the_default_of_transformers(tiny_folder: Path) -> None:
    path = tiny_folder / "config.json"
    edit_json(path, lambda config: config.update(architectures=["MistralForCausalLM"]))
    assert read_spec(tiny_folder).layers[0].window == 4096
    edit_json(path, lambda config: config.update(sliding_window=4))
    assert read_spec(tiny_folder).layers[0].window == 4
    edit_json(path, lambda config: config.update(sliding_window=None))
    assert read_spec(tiny_folder).layers[0].window is None
    edit_json(path, lambda config: config.update(sliding_window=0))
    with pytest.raises(ConfigError, match="sliding_window must be a positive integer"):
        read_spec(tiny_folder)


def test_eos_is_the_union_of_its_three_homes(tiny_folder: Path) -> None:
    (tiny_folder / "generation_config.json").write_text(
        json.dumps({"eos_token_id": [5, 7], "temperature": 0.6, "top_k": None, "do_sample": True})
    )
    added = {"id": 11, "content": "<|end|>", "special": True}
    (tiny_folder / "tokenizer.json").write_text(json.dumps({"added_tokens": [added]}))
    (tiny_folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|end|>"}))
    spec = read_spec(tiny_folder)
    assert spec.eos_token_ids == (2, 5, 7, 11)
    assert spec.default_sampling == {"temperature": 0.6}


def test_fork_tokens_of_a_model_that_forks(tiny_folder: Path) -> None:
    assert read_spec(tiny_folder).fork_tokens is None
    path = tiny_folder / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "fork_token_id": 5, "child_token_id": 6}))
    assert read_spec(tiny_folder).fork_tokens == (5, 6)
    for wrong in ({"fork_token_id": 5}, {"fork_token_id": 5, "child_token_id": 1 << 30}):
        path.write_text(json.dumps({**config, **wrong}))
        with pytest.raises(ConfigError, match="child_token_id must be a token id below"):
            read_spec(tiny_folder)


class _Canary:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return (Path.touch, (self.path,))


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "consolidated.00.pth"])
def test_pickled_weights_are_refused_unread(name: str, tiny_folder: Path) -> None:
    canary = tiny_folder / "canary"
    (tiny_folder / "model.safetensors").unlink()
    (tiny_folder / name).write_bytes(pickle.dumps(_Canary(canary)))
    message = refusal(tiny_folder)
    assert name in message
    assert "can run code" in message
    assert not canary.exists()


def test_remote_code_is_ignored(tiny_folder: Path) -> None:
    canary = tiny_folder / "canary"
    (tiny_folder / "modeling.py").write_text(f"open({str(canary)!r}, 'w')")
    edit_json(
        tiny_folder / "config.json",
        lambda config: config.update(
            auto_map={"AutoModelForCausalLM": "modeling.Model"}, trust_remote_code=True
        ),
    )
    Checkpoint(tiny_folder, read_spec(tiny_folder))
    assert not canary.exists()


@pytest.fixture
def sharded(make_tiny, tmp_path: Path) -> Path:
    folder = tmp_path / "sharded"
    make_tiny().save_pretrained(folder, max_shard_size="40kB")
    return folder


def test_missing_shard(sharded: Path) -> None:
    shard = sorted(sharded.glob("*.safetensors"))[1]
    shard.unlink()
    assert shard.name in refusal(sharded)


def test_shards_without_their_index(sharded: Path) -> None:
    (sharded / "model.safetensors.index.json").unlink()
    assert "; download model.safetensors.index.json" in refusal(sharded)
    first, *others = sorted(sharded.glob("*.safetensors"))
    for path in others:
        path.unlink()
    assert f"; rename {first.name} to model.safetensors" in refusal(sharded)


def test_a_decoder_saved_without_its_head_has_the_tensors_of_the_model(tiny_folder: Path) -> None:
    path = tiny_folder / "config.json"
    edit_json(path, lambda content: content.update(tie_word_embeddings=True))
    whole = set(Checkpoint(tiny_folder, read_spec(tiny_folder))._infos) - {"lm_head.weight"}

    def shorten(header: dict[str, Any]) -> None:
        for name in list(header):
            header[name.removeprefix("model.")] = header.pop(name)

    edit_header(tiny_folder / "model.safetensors", shorten)
    found = set(Checkpoint(tiny_folder, read_spec(tiny_folder))._infos)
    assert found - {"lm_head.weight"} == whole
    assert "model.embed_tokens.weight" in found


@pytest.mark.parametrize("place", ["../outside.safetensors", "/etc/passwd", "..", "", 3, "a/b"])
def test_index_names_no_file_outside_the_folder(place: Any, sharded: Path) -> None:
    whole = sharded.parent / "outside.safetensors"
    shutil.copy(next(sharded.glob("*.safetensors")), whole)
    index = sharded / "model.safetensors.index.json"
    edit_json(index, lambda content: content["weight_map"].update({"lm_head.weight": place}))
    assert "not a plain file name" in refusal(sharded)


def test_index_names_a_pickle_or_a_wrong_shard(sharded: Path) -> None:
    index = sharded / "model.safetensors.index.json"
    first, *_, last = sorted(path.name for path in sharded.glob("*.safetensors"))
    weight_map = json.loads(index.read_text())["weight_map"]
    name = next(name for name, shard in weight_map.items() if shard == first)
    edit_json(index, lambda content: content["weight_map"].update({name: last}))
    assert f"has no tensor {name}" in refusal(sharded)
    edit_json(index, lambda content: content["weight_map"].update({name: "x.bin"}))
    assert "not a safetensors file" in refusal(sharded)


def set_entry(**changes: Any) -> Callable[[dict[str, Any]], object]:
    return lambda header: header["model.norm.weight"].update(changes)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (set_entry(dtype="I64", shape=[24]), "norm.weight"),
        (set_entry(dtype="F8_E4M3", shape=[192]), "norm.weight"),
        (set_entry(dtype="X9"), "unknown dtype"),
        (set_entry(shape=[49]), "bytes for F32 [49]"),
        (set_entry(shape=[-48]), "not a size"),
        (set_entry(shape=[48.0]), "not a size"),
        (set_entry(shape=[2**62, 2**62]), "bytes for"),
        (set_entry(data_offsets=[0, 192]), "starts at byte"),
        (set_entry(data_offsets=[5]), "tensor model.norm.weight"),
        (lambda header: header.pop("model.norm.weight"), "its tensors end at byte"),
        (lambda header: header.update(extra=[]), "tensor extra"),
    ],
)
def test_headers_that_lie(change: Any, words: str, tiny_folder: Path) -> None:
    edit_header(tiny_folder / "model.safetensors", change)
    message = refusal(tiny_folder)
    assert words in message
    assert "model.safetensors" in message


@pytest.mark.parametrize("length", [0, 7, 8, 100, 5000])
def test_truncated_file(length: int, tiny_folder: Path) -> None:
    path = tiny_folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:length])
    assert "corrupt" in refusal(tiny_folder)


def test_huge_headers_are_refused_unparsed(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    many = b'{"a":{"dtype":"F32","shape":[],"data_offsets":[0,4]},' * 1_000_000
    for length, header in ((len(many), many), (2**63, b"{}"), (4_000_000, b"[" * 4_000_000)):
        path.write_bytes(struct.pack("<Q", length) + header)
        with pytest.raises(ConfigError, match="corrupt"):
            read_header(path)
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown < 300 * 1024  # KiB; the files themselves are made here


@settings(
    max_examples=1000,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    edits=st.lists(st.tuples(st.integers(0, 3000), st.integers(0, 255)), min_size=1, max_size=6),
    cut=st.integers(0, 400),
)
def test_any_mutated_header_is_read_or_refused(edits, cut: int, tiny_folder: Path) -> None:
    """Any bytes: a ConfigError of one line, or tensors that lie inside the file."""
    pristine = tiny_folder / "pristine"
    if not pristine.exists():
        shutil.copy(tiny_folder / "model.safetensors", pristine)
    data = bytearray(pristine.read_bytes())
    for position, value in edits:
        data[position % len(data)] = value
    path = tiny_folder / "mutated.safetensors"
    path.write_bytes(data[: len(data) - cut])
    try:
        infos = read_header(path)
    except ConfigError as error:
        assert str(path) in str(error)
        assert "\n" not in str(error)
    else:
        assert all(0 <= info.begin <= info.end <= len(data) for info in infos.values())


def test_memory_is_that_of_the_models_tensors_as_they_are_stored(tiny_folder: Path) -> None:
    """Files that the index does not name do not count; types narrower than the file's do."""
    checkpoint = Checkpoint(tiny_folder, read_spec(tiny_folder))
    elements = sum(math.prod(info.shape) for info in checkpoint)
    (tiny_folder / "consolidated.safetensors").write_bytes(bytes(1 << 20))
    again = Checkpoint(tiny_folder, read_spec(tiny_folder))
    for dtype, size in (("float32", 4), ("bfloat16", 2)):
        assert allocated_bytes(again, dtype, "auto") == size * elements
    matrices = sum(math.prod(info.shape) for info in checkpoint if len(info.shape) == 2)
    for quantization, bits in (("int8", 8.5), ("int4", 4.5)):
        expected = (matrices * bits + (elements - matrices) * 16) / 8
        assert abs(allocated_bytes(again, "bfloat16", quantization) - expected) <= 1


def test_an_error_escapes_what_a_terminal_acts_on() -> None:
    """Names of tensors are quoted in errors; a file may hold any."""
    message = str(ConfigError("tensor a\x1b[31m\x9b\r\x7f has no shape\nx"))
    assert message == "tensor a\\x1b[31m\\x9b\\r\\x7f has no shape\nx"


def test_a_hash_of_weights_can_be_ended(tiny_folder: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("CHUNKLLAMA_CACHE", str(tmp_path / "cache"))
    spec = read_spec(tiny_folder)
    whole = hash_weights(tiny_folder, spec)
    shutil.rmtree(tmp_path / "cache")

    def end() -> None:
        raise RuntimeError("ended")

    with pytest.raises(RuntimeError, match="ended"):
        hash_weights(tiny_folder, spec, end)
    assert not (tmp_path / "cache").exists(), "half a hash is not kept"
    assert hash_weights(tiny_folder, spec) == whole
