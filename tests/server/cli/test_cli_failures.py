"""What keeps a server from starting is one line that names the fix, and exit code 2."""

from __future__ import annotations

import json
import re
import socket

import pytest


def refused(result, pattern: str, *warnings: str) -> None:
    """Exit code 2 and one line with the reason, behind information and exactly these warnings."""
    assert result.returncode == 2, result.stderr
    lines = [line for line in result.stderr.splitlines() if line.split()[1:2] != ["INFO"]]
    *before, error = lines
    assert len(before) == len(warnings), result.stderr
    for line, expected in zip(before, warnings, strict=True):
        assert line.split()[1] == "WARNING" and re.search(expected, line), line
    assert error.startswith("chunkllama: error: ")
    assert re.search(pattern, error), error
    assert "Traceback" not in result.stderr


# ``test_bad_starts.py`` has these and many more, in one process.
@pytest.mark.parametrize(
    ("arguments", "pattern"),
    [
        (["--num-chunk", "3"], "--num-chunk.*--num-chunks"),
        (["--host", "192.0.2.1"], r"port: cannot listen on 192\.0\.2\.1:8000"),
        (["--ssl-certfile", "x.pem", "--ssl-keyfile", "y.pem"], "ssl_certfile.*No such file"),
    ],
)
def test_bad_settings(chunkllama, arguments, pattern):
    refused(chunkllama("serve", *arguments), pattern)


@pytest.mark.nightly
def test_unknown_keys_name_the_nearest(chunkllama, tmp_path):
    refused(chunkllama("serve", CHUNKLLAMA_NUM_CHUNK="3"), "environment.*did you mean num_chunks")
    file = tmp_path / "server.yaml"
    file.write_text("max_num_seq: 3\n")
    refused(chunkllama("serve", "--config", file), r"server\.yaml.*did you mean max_num_seqs")
    file.write_text("port: [1\n")
    refused(chunkllama("serve", "--config", file), r"not valid YAML at line")


def test_port_in_use(chunkllama, broken_model):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        result = chunkllama("serve", "--model", broken_model, "--port", port)
    refused(result, rf"port: cannot listen on 127\.0\.0\.1:{port}: Address already in use.*--port")


def _serve(chunkllama, folder):
    return chunkllama("serve", "--model", folder, "--port", 0)


def _edit(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.nightly
def test_S22_unusable_model_folders(chunkllama, broken_model):
    config, weights = broken_model / "config.json", broken_model / "model.safetensors"
    good = config.read_text()
    _edit(config, hidden_size=128)
    refused(_serve(chunkllama, broken_model), r"model\.embed_tokens\.weight has shape")
    _edit(config, architectures=["BertForMaskedLM"])
    refused(_serve(chunkllama, broken_model), r"config\.json: unsupported architecture")
    config.write_text(good[:-5])
    refused(_serve(chunkllama, broken_model), r"config\.json: not valid JSON")
    config.unlink()
    refused(_serve(chunkllama, broken_model), r"config\.json: missing")
    config.write_text(good)
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    refused(_serve(chunkllama, broken_model), r"model\.safetensors")
    weights.unlink()
    (broken_model / "pytorch_model.bin").write_bytes(b"pickle")
    refused(_serve(chunkllama, broken_model), "pytorch_model.bin|safetensors")
    weights.write_bytes(whole)
    tokenizer = broken_model / "tokenizer.json"
    kept = tokenizer.read_text()
    tokenizer.unlink()
    refused(_serve(chunkllama, broken_model), "neither tokenizer.json nor tokenizer.model")
    tokenizer.write_text(kept)
    _edit(config, vocab_size=100)
    unknown_end = r"eos_token_id \[258\] is outside the vocabulary of 100"
    refused(_serve(chunkllama, broken_model), "shape|tokenizer has", unknown_end)


@pytest.mark.nightly
def test_hostile_template_and_prefixes(chunkllama, broken_model, tmp_path):
    template = tmp_path / "t.jinja"
    template.write_text("{{ ''.__class__.__mro__ }}")
    flags = ("serve", "--model", broken_model, "--port", 0)
    refused(chunkllama(*flags, "--chat-template", template), r"t\.jinja")
    prefixes = tmp_path / "p.yaml"
    prefixes.write_text("one: two")
    refused(chunkllama(*flags, "--public-prefixes", prefixes), r"p\.yaml must be a YAML list")


@pytest.mark.nightly
def test_the_engine_cannot_start(chunkllama, broken_model):
    result = chunkllama("serve", "--model", broken_model, "--port", 0, "--kv-cache-memory", "1k")
    refused(result, "kv_cache_memory: 1000 bytes hold fewer than two chunks of 32768 bytes")
    result = chunkllama("serve", "--model", broken_model, "--port", 0, "--device", "cuda")
    refused(result, "device: cuda was asked for")
    result = chunkllama("serve", "--model", broken_model, "--port", 0, "--max-model-len", 9999)
    refused(result, "max_model_len: 9999 is above the model's own limit of 1024")
