"""Commands that need no server."""

from __future__ import annotations

import subprocess
import sys

import pytest

from chunkllama import __version__
from chunkllama_server.config.flags import choices
from chunkllama_server.config.settings import Settings


def test_version_and_help(chunkllama):
    assert chunkllama("version").stdout.strip() == __version__
    listed = chunkllama("--help").stdout
    for command in ("serve", "bench", "capacity", "health", "config", "version", "models"):
        assert command in listed
    assert "--num-chunks" in chunkllama("serve", "--help").stdout


def test_version_and_help_as_flags(chunkllama):
    assert chunkllama("--version").stdout.strip() == __version__
    for arguments in ((), ("-h",)):
        result = chunkllama(*arguments)
        assert (result.returncode, result.stderr) == (0, "")
        assert result.stdout == chunkllama("--help").stdout
    assert chunkllama("config").stdout == chunkllama("config", "-h").stdout


@pytest.mark.parametrize("command", [("serve",), ("config", "show")])
def test_help_is_complete_in_a_narrow_terminal(chunkllama, command):
    listed = chunkllama(*command, "-h", COLUMNS="60").stdout
    words = set(listed.split())
    for group in Settings.groups:
        assert f"\n{group.__name__.removesuffix('Config')}:\n" in listed
        for key, field in group.model_fields.items():
            assert f"--{key.replace('_', '-')}" in words
            if options := choices(field.annotation):
                assert "|".join(map(str, options)) in "".join(listed.split())
    assert "…" not in listed


def test_unknown_commands_are_one_line(chunkllama):
    result = chunkllama("serv")
    assert result.returncode == 2
    assert result.stderr.startswith("chunkllama: error: No such command 'serv'")
    assert len(result.stderr.splitlines()) == 1


def test_light_commands_import_little():
    code = (
        "import sys\nfrom chunkllama_server.commands import run\n"
        "run(['version'])\nrun(['health', '--url', 'x'])\n"
        "heavy = {'torch', 'httpx', 'fastapi', 'tokenizers', 'numpy'} & set(sys.modules)\n"
        "sys.exit(', '.join(heavy) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=False, text=True)
    assert done.returncode == 0, done.stderr


def test_config_show_prints_values_and_origins(chunkllama, tmp_path):
    file = tmp_path / "server.yaml"
    file.write_text("num_chunks: 64\nport: 9000\n")
    result = chunkllama(
        "config", "show", "--config", file, "--port", 9001, "--api-key", "t:canary",
        CHUNKLLAMA_THREADS="3", CHUNKLLAMA_PORT="9002", COLUMNS="200",
    )  # fmt: skip
    rows = {}
    for line in result.stdout.splitlines():
        cells = [cell.strip() for cell in line.split("│")]
        if len(cells) > 3:
            rows[cells[1]] = cells[2:4]
    assert rows["port"] == ["9001", "command line"]
    assert rows["threads"] == ["3", "environment"]
    assert rows["num_chunks"] == ["64", str(file)]
    assert rows["chunk_size"] == ["64", "default"]
    assert "canary" not in result.stdout


def test_models_lists_what_can_be_fetched(chunkllama, tmp_path, tiny_model):
    assert "smollm2-135m-instruct" in chunkllama("models", CHUNKLLAMA_CACHE=str(tmp_path)).stdout
    assert chunkllama("models", "fetch", tiny_model).stdout.strip() == str(tiny_model)
    missing = chunkllama("models", "fetch", "/nowhere")
    assert missing.returncode == 2
