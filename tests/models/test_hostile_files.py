"""Damaged model files: each mutation is refused in one line or served, in bounded memory."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import struct
import subprocess
import sys
from pathlib import Path

import hostile_files
import pytest
import tiny_forms

from chunkllama.config import EngineConfig
from chunkllama.engine.build import build_engine
from chunkllama.errors import ConfigError, InvalidRequestError
from chunkllama.models.config import read_spec
from chunkllama.models.loading.gguf import convert_gguf, index_gguf
from chunkllama.models.loading.gguf_index import read_index
from chunkllama.models.loading.gguf_layout import check_gguf
from chunkllama.models.loading.safetensors import Checkpoint, read_header
from chunkllama.text.tokenizer import load_tokenizer


def run(kind: str, count: int, folder: Path, seed: str) -> None:
    environment = {k: v for k, v in os.environ.items() if k != "RUST_BACKTRACE"}
    done = subprocess.run(
        [sys.executable, hostile_files.__file__, kind, str(count), seed, str(folder)],
        env={**environment, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[1])},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    result = json.loads(done.stdout)
    assert result["failures"] == []
    assert result["served"] + result["refused"] == count + 3
    assert result["refused"] > 0 and result["served"] >= 3
    assert result["memory_ratio"] <= 1.2


@pytest.mark.parametrize("kind", list(hostile_files.FILES))
def test_S23_mutations_are_refused_in_one_line_or_served(
    kind: str, tmp_path: Path, child_environment: dict[str, str]
) -> None:
    run(kind, 100, tmp_path, child_environment["CHUNKLLAMA_TEST_SEED"])


@pytest.mark.nightly
@pytest.mark.parametrize("kind", list(hostile_files.FILES))
def test_two_thousand_mutations(
    kind: str, tmp_path: Path, child_environment: dict[str, str]
) -> None:
    run(kind, 2000, tmp_path, child_environment["CHUNKLLAMA_TEST_SEED"])


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tiny_forms.write_folder(tmp_path / "model")


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("top_k", 50.0, 50),
        ("top_k", 50.5, None),
        ("top_k", True, None),
        ("top_k", -7, None),
        ("top_k", 2**40, None),
        ("temperature", True, None),
        ("temperature", -1, None),
        ("temperature", "0.5", None),
        ("temperature", float("nan"), None),
        ("temperature", 10**400, None),
        ("top_p", [0.5], None),
        ("top_p", 1.5, None),
        ("min_p", {}, None),
        ("repetition_penalty", 1e-300, None),
        ("repetition_penalty", 0, None),
        ("repetition_penalty", None, None),
        ("repetition_penalty", 2, 2.0),
    ],
)
def test_unusable_sampling_defaults_are_left_out_with_a_warning(
    name, value, expected, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (folder / "generation_config.json").write_text(json.dumps({name: value}))
    defaults = read_spec(folder).default_sampling
    assert defaults.get(name) == expected
    assert type(defaults.get(name)) is type(expected)
    warned = [r.getMessage() for r in caplog.records if name in r.getMessage()]
    assert len(warned) == (expected is None and value is not None)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps"),
        ({"rms_norm_eps": -1}, "rms_norm_eps"),
        ({"rope_theta": float("inf")}, "rope_theta"),
        ({"rope_theta": 0.5}, "rope_theta"),
        ({"max_position_embeddings": 2**31 - 1}, "max_position_embeddings"),
        ({"max_position_embeddings": 1}, "max_position_embeddings"),
        ({"head_dim": 2**20}, "head_dim"),
        ({"hidden_size": 10**400}, "hidden_size"),
        ({"architectures": 5}, "unsupported architecture 5"),
        ({"num_hidden_layers": "a" * 100_000}, "num_hidden_layers"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 0}}, "factor"),
        ({"rope_scaling": {"rope_type": "yarn", "mscale": "x"}}, "mscale"),
    ],
)
def test_numbers_no_model_has_are_refused(changes, words, folder: Path) -> None:
    (folder / "config.json").write_text(json.dumps(tiny_forms.CONFIG | changes))
    with pytest.raises(ConfigError, match=words) as caught:
        read_spec(folder)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 1100


def test_end_tokens_outside_the_vocabulary_are_left_out(folder: Path, caplog) -> None:
    config = tiny_forms.CONFIG | {"eos_token_id": [258, 272, 2**30]}
    (folder / "config.json").write_text(json.dumps(config))
    assert read_spec(folder).eos_token_ids == (258,)
    assert "[272, 1073741824]" in caplog.text


def test_a_token_id_far_beyond_the_others_is_refused(folder: Path) -> None:
    document = json.loads((folder / "tokenizer.json").read_text())
    document["model"]["vocab"]["x x"] = 2**31
    (folder / "tokenizer.json").write_text(json.dumps(document))
    with pytest.raises(ConfigError, match="2147483648"):
        load_tokenizer(folder)


@pytest.mark.parametrize("place", ["vocabulary", "special_tokens_map"])
def test_a_token_no_grammar_can_hold_is_refused(place: str, folder: Path) -> None:
    token = "x" * 2000
    if place == "vocabulary":
        document = json.loads((folder / "tokenizer.json").read_text())
        document["model"]["vocab"][token] = 259
        (folder / "tokenizer.json").write_text(json.dumps(document))
    else:
        (folder / "special_tokens_map.json").write_text(json.dumps({"pad_token": token}))
    with pytest.raises(ConfigError, match="a token of 2000 characters"):
        load_tokenizer(folder)


def _normalized_by(folder: Path, *steps: dict[str, object]) -> None:
    document = json.loads((folder / "tokenizer.json").read_text())
    document["normalizer"] = {"type": "Sequence", "normalizers": [*steps]}
    (folder / "tokenizer.json").write_text(json.dumps(document))


def _replace(pattern: dict[str, str], content: str) -> dict[str, object]:
    return {"type": "Replace", "pattern": pattern, "content": content}


def _precompiled(*texts: str) -> dict[str, object]:
    """Sentencepiece's table of characters, with a trie in which none is found."""
    table = (1024).to_bytes(4, "little") + bytes(1024)
    table += b"".join(text.encode() + b"\0" for text in texts)
    return {"type": "Precompiled", "precompiled_charsmap": base64.b64encode(table).decode()}


_BERT = dict.fromkeys(("clean_text", "strip_accents", "lowercase"), False)
_BERT["handle_chinese_chars"] = True


@pytest.mark.parametrize(
    "steps",
    [
        [_replace({"String": "a"}, "aa")] * 500,
        [{"type": "Sequence", "normalizers": [_replace({"String": "ab"}, "abab")]}] * 7,
        [_replace({"Regex": ""}, "x" * 64)],
        [_replace({"String": " "}, "x" * 65)],
        [{"type": "Prepend", "prepend": "a" * 64}],
        [{"type": "Prepend", "prepend": "a"}] * 7,
        [_replace({"Regex": " *"}, "x")] * 7,
        [_replace({"Regex": "a|"}, "x")] * 7,
        [_replace({"Regex": "(?=a)"}, "x")] * 7,
        [_precompiled("fine", "x" * 65)],
        [_precompiled(), *[_replace({"String": "a"}, "aa")] * 7],
        [{"type": "ByteLevel"}] * 6,
        [{"type": "NFKD"}, _replace({"String": " "}, "\ufdfa")] * 3,
        [{"type": "BertNormalizer", **_BERT}, _replace({"String": " "}, "\u4e2d")] * 6,
    ],
    ids=[
        *("doubled", "nested", "between", "replaced", "prepended", "each prepended"),
        *("blanks or none", "a letter or none", "before a letter", "by a table"),
        *("behind a table", "as bytes", "decomposed", "spaced"),
    ],
)
def test_normalizers_that_lengthen_texts_without_bound_are_refused(steps, folder: Path) -> None:
    """Twenty of the first kind make a megabyte of one letter."""
    _normalized_by(folder, *steps)
    with pytest.raises(ConfigError, match=r"tokenizer\.json: the normalizer .* at most 64"):
        load_tokenizer(folder)


@pytest.mark.parametrize(
    "regex", ["a{1}*", "a+*", "a{1}?", "a{1,0}", "[]a]*", "[a[b]]*", r"a\K", "ab{2}??+*|", r"\R*"]
)
def test_regular_expressions_that_may_match_between_characters_are_refused(
    regex: str, folder: Path
) -> None:
    """Oniguruma reads repeats of repeats, and what begins with [] or has [ in a class."""
    _normalized_by(folder, *[_replace({"Regex": regex}, "x")] * 7)
    with pytest.raises(ConfigError, match=r"tokenizer\.json: the normalizer .* at most 64"):
        load_tokenizer(folder)


def test_normalizers_of_models_are_accepted(folder: Path) -> None:
    space = _replace({"String": " "}, "\u2581")
    _normalized_by(folder, {"type": "Prepend", "prepend": "\u2581"}, space, {"type": "NFKC"})
    assert load_tokenizer(folder).encode("a b")
    regexes = (" {2,}", r"\s+", r"[\n\r]+", r"[^\]a]", "\u200b", r"\p{Zs}{1,9}", "''", r"\.{3,}b*")
    _normalized_by(folder, *(_replace({"Regex": regex}, " ") for regex in regexes))
    assert load_tokenizer(folder).encode("a b")
    _normalized_by(folder, _precompiled("a", "\u00e9" * 64))  # of two bytes each
    load_tokenizer(folder)
    forms = ("NFKD", "StripAccents", "Lowercase")
    _normalized_by(folder, *({"type": form} for form in forms), _precompiled("x" * 18))
    load_tokenizer(folder)


def test_a_post_processor_that_puts_thousands_of_tokens_around_a_text_is_refused(folder) -> None:
    document = json.loads((folder / "tokenizer.json").read_text())
    token = {"SpecialToken": {"id": "<b>", "type_id": 0}}
    text = [{"Sequence": {"id": "A", "type_id": 0}}]
    document["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [token] * 100 + text,
        "pair": text,
        "special_tokens": {"<b>": {"id": "<b>", "ids": [256] * 50, "tokens": ["<b>"] * 50}},
    }
    (folder / "tokenizer.json").write_text(json.dumps(document))
    with pytest.raises(ConfigError, match="puts 5000 tokens around a text, at most 64"):
        load_tokenizer(folder)


def test_a_text_at_which_the_models_pattern_takes_too_long_is_refused(folder: Path) -> None:
    document = json.loads((folder / "tokenizer.json").read_text())
    pattern = {"type": "Split", "pattern": {"Regex": "(a+)+$"}}
    split = {**pattern, "behavior": "Isolated", "invert": False}
    document["pre_tokenizer"] = {
        "type": "Sequence",
        "pretokenizers": [split, document["pre_tokenizer"]],
    }
    (folder / "tokenizer.json").write_text(json.dumps(document))
    tokenizer = load_tokenizer(folder)
    assert tokenizer.encode("aaa")
    with pytest.raises(InvalidRequestError, match=r"tokenizer.json .* characters \(Onig"):
        tokenizer.encode("a" * 60 + "!")


@pytest.fixture
def gguf_bytes(tmp_path: Path) -> bytes:
    return tiny_forms.write_gguf(tmp_path / "good.gguf").read_bytes()


def _value_at(data: bytes, key: bytes) -> int:
    """Where a key's value begins, behind its type."""
    return data.index(key) + len(key) + 4


@pytest.mark.parametrize(
    "key", [b"general.name", b"tokenizer.ggml.model", b"tokenizer.chat_template"]
)
def test_gguf_strings_must_be_utf8(key: bytes, gguf_bytes: bytes, tmp_path: Path) -> None:
    data = bytearray(gguf_bytes)
    data[_value_at(gguf_bytes, key) + 8] = 0xFF
    (tmp_path / "bad.gguf").write_bytes(data)
    with pytest.raises(ConfigError, match="UTF-8"):
        check_gguf(tmp_path / "bad.gguf")


@pytest.mark.parametrize("count", [2**22, 2**40, 2**63, 2**64 - 1])
def test_gguf_lengths_are_checked_before_anything_is_allocated(
    count: int, gguf_bytes: bytes, tmp_path: Path
) -> None:
    data = bytearray(gguf_bytes)
    at = _value_at(gguf_bytes, b"tokenizer.ggml.token_type") + 4
    data[at : at + 8] = struct.pack("<Q", count)
    (tmp_path / "bad.gguf").write_bytes(data)
    (tmp_path / "out").mkdir()
    with pytest.raises(ConfigError, match="token_type"):
        convert_gguf(tmp_path / "bad.gguf", tmp_path / "out", lambda done, total: None)


def test_gguf_tensors_may_not_share_bytes(gguf_bytes: bytes, tmp_path: Path) -> None:
    data = bytearray(gguf_bytes)
    name = b"blk.0.ffn_up.weight"
    at = gguf_bytes.index(name) + len(name) + 4 + 16 + 4
    data[at : at + 8] = struct.pack("<Q", 0)
    (tmp_path / "bad.gguf").write_bytes(data)
    with pytest.raises(ConfigError, match="over another tensor"):
        check_gguf(tmp_path / "bad.gguf")


def test_sizes_that_take_long_to_multiply_are_refused(folder: Path) -> None:
    path = folder / "model.safetensors"
    shape = [2**62] * 100_000
    header = {"a": {"dtype": "F32", "shape": shape, "data_offsets": [0, 4]}}
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + bytes(4))
    with pytest.raises(ConfigError, match="100000 dimensions"):
        read_header(path)


def test_a_shard_of_a_name_too_long_is_refused(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    index = {"weight_map": {"a": "x" * 300 + ".safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ConfigError, match="whose name is too long"):
        Checkpoint(folder, read_spec(folder))


@pytest.mark.parametrize("length", [0, 3, 23, 24, 100, 5000])
def test_a_gguf_cut_short_is_refused(length: int, gguf_bytes: bytes, tmp_path: Path) -> None:
    (tmp_path / "bad.gguf").write_bytes(gguf_bytes[:length])
    with pytest.raises(ConfigError, match="GGUF"):
        check_gguf(tmp_path / "bad.gguf")


@pytest.mark.parametrize(
    "name", ["config.json", "tokenizer.json", "chat_template.jinja", "model.safetensors", "x.json"]
)
def test_pipes_and_devices_of_a_folder_are_not_opened(name: str, folder: Path) -> None:
    """A reader would wait at a pipe, and take all memory for /dev/zero."""
    (folder / name).unlink(missing_ok=True)
    os.mkfifo(folder / name)
    with pytest.raises(ConfigError, match=f"{name}: a device, pipe or socket"):
        read_spec(folder)
    (folder / name).unlink()
    (folder / name).symlink_to("/dev/zero")
    with pytest.raises(ConfigError, match=f"{name}: a device, pipe or socket"):
        read_spec(folder)


@pytest.mark.parametrize(
    "name", ["generation_config.json", "chat_template.jinja", "tokenizer.model"]
)
def test_files_too_large_to_be_read_as_a_whole_are_refused(name: str, folder: Path) -> None:
    with (folder / name).open("wb") as file:
        file.truncate(2**36)  # sparse
    with pytest.raises(ConfigError, match="larger than 256 MiB"):
        read_spec(folder)


@pytest.fixture
def indexed(gguf_bytes: bytes, folder: Path, tmp_path: Path) -> Path:
    """A folder for a GGUF file that is served where it lies."""
    for file in folder.iterdir():
        file.unlink()
    index_gguf(tmp_path / "good.gguf", folder)
    return folder


def test_a_damaged_index_of_a_gguf_is_refused(indexed: Path) -> None:
    assert read_index(indexed)
    text = (indexed / "gguf.json").read_text()
    (indexed / "gguf.json").write_text(text.replace('"heads": 2', '"heads": 3', 1))
    with pytest.raises(ConfigError, match="damaged"):
        read_index(indexed)


def test_an_index_of_a_publisher_reads_no_other_file(indexed: Path, tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_bytes(b"s" * 1000)
    tensor = {"type": "F32", "shape": [1, 16], "begin": 0, "end": 64, "heads": 0}
    content = {"file": str(secret), "size": 1000, "tensors": {"lm_head.weight": tensor}}
    digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    (indexed / "gguf.json").write_text(json.dumps(content | {"sha256": digest}))
    with pytest.raises(ConfigError, match="secret"):
        read_index(indexed)


def test_a_gguf_may_keep_one_projection_of_a_layer_in_floats(tmp_path: Path) -> None:
    """Rows of K in llama.cpp's order and in the type that is computed in, beside a quantized Q."""
    folder = tmp_path / "model"
    folder.mkdir()
    path = tiny_forms.write_gguf(tmp_path / "mixed.gguf", quantized=("blk.0.attn_q",))
    index_gguf(path, folder)
    config = EngineConfig.from_flat(
        model=str(folder), num_chunks=8, threads=1, dtype="float32", backend="reference"
    )
    hostile_files.answer(build_engine(config), [1, 2, 3], {"temperature": 0.0})
