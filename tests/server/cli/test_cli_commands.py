"""Commands that need no server."""

from __future__ import annotations

import errno
import os
import subprocess
import sys

import pytest

from chunkllama import __version__
from chunkllama_server import commands
from chunkllama_server.commands import run
from chunkllama_server.config.kinds import choices
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
def test_help_is_complete_in_a_narrow_terminal(in_process, command):
    listed = in_process(*command, "-h", COLUMNS="60").stdout
    words = {word.rstrip(",") for word in listed.split()}
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
        "run(['version'])\nrun(['--version'])\nrun(['health', '--url', 'x'])\n"
        "heavy = {'torch', 'httpx', 'fastapi', 'tokenizers', 'numpy'} & set(sys.modules)\n"
        "sys.exit(', '.join(heavy) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=False, text=True)
    assert done.returncode == 0, done.stderr


def test_no_help_and_no_wrong_word_imports_torch():
    code = (
        "import sys\nfrom chunkllama_server.commands import command_names, run\n"
        "for words in [(), *command_names()]:\n"
        "    run([*words, '-h'])\n"
        "    assert run([*words, '--no-such-flag']) == 2\n"
        "assert run(['serv']) == 2\n"
        "heavy = {'torch', 'transformers', 'fastapi', 'uvicorn', 'ray'} & set(sys.modules)\n"
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


def test_config_show_cuts_no_value_where_no_terminal_reads_it(chunkllama, tmp_path):
    folder = tmp_path / ("a-long-name-" * 15)
    folder.mkdir()
    file = folder / "server.yaml"
    file.write_text("num_chunks: 64\n")
    shown = chunkllama("config", "show", "--config", file, COLUMNS="80").stdout
    (line,) = [line for line in shown.splitlines() if line.startswith("│ num_chunks ")]
    assert [cell.strip() for cell in line.split("│")][2:4] == ["64", str(file)]
    assert "…" not in shown


def _in_effect(stdout: str) -> dict[str, str]:
    rows = [line.split("│") for line in stdout.splitlines() if line.count("│") > 4]
    return {cells[1].strip(): cells[4].strip() for cells in rows if cells[4].strip()}


def test_config_show_resolves_automatic_values(in_process, tiny_model):
    flags = ("--model", tiny_model, "--num-chunks", 64, "--device", "cpu", "--threads", 1)
    shown = _in_effect(in_process("config", "show", *flags, COLUMNS="200").stdout)
    assert shown["dtype"] == "float32"
    assert shown["backend"] in ("cpu", "reference")
    assert shown["max_model_len"] == "1024"
    assert 64 * 2 * 2 * 64 * 2 * 16 * 4 == 2 << 20
    assert shown["kv_cache_memory"] == "2MiB"
    assert shown["isolation"] == "off"
    assert shown["served_model_name"] == "tiny"
    assert not {"num_chunks", "device", "threads", "port"} & set(shown)  # given, or no default
    keyed = in_process("config", "show", *flags, "--api-key", "a:b", "--chunk-size", 32)
    shown = _in_effect(keyed.stdout)
    assert shown["isolation"] == "tenant"
    assert shown["backend"] == "reference" and "isa_level" not in shown


def test_config_show_fetches_nothing_and_reports_what_it_cannot_tell(in_process, tmp_path):
    cache = tmp_path / "cache"
    result = in_process("config", "show", "--device", "cpu", CHUNKLLAMA_CACHE=str(cache))
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout.splitlines()[-1].startswith("model: not on this machine yet")
    assert not cache.exists()
    broken = in_process("config", "show", "--device", "cpu", "--model", tmp_path)
    assert broken.returncode == 0
    assert broken.stdout.splitlines()[-1].endswith("is it a complete model folder?")


def test_names_with_brackets_are_printed_as_they_are(capsys):
    assert run(["config", "show", "--model", "[/x] :smile:", "--device", "cpu"]) == 0
    assert "│ [/x] :smile:" in capsys.readouterr().out


def test_a_command_whose_output_cannot_be_written_is_one_line():
    code = "import sys; from chunkllama_server.commands import run; sys.exit(run(['version']))"
    with open("/dev/full", "w") as full:
        command = [sys.executable, "-c", code]
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, check=False, text=True)
    assert done.returncode == 2
    assert (
        done.stderr == "chunkllama: error: the output cannot be written: No space left on device\n"
    )


def test_a_file_of_results_on_a_full_disk_leaves_the_output(monkeypatch, capfd):
    def fill() -> None:
        print("a result")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setitem(commands._COMMANDS, "version", lambda app: app.command("version")(fill))
    assert run(["version"]) == 2
    print("and more", flush=True)
    written = capfd.readouterr()
    assert written.out == "a result\nand more\n"
    assert (
        written.err == "chunkllama: error: the output cannot be written: No space left on device\n"
    )


def test_a_socket_that_breaks_under_a_server_is_reported(monkeypatch):
    def break_off() -> None:
        raise BrokenPipeError

    monkeypatch.setitem(commands._COMMANDS, "serve", lambda app: app.command("serve")(break_off))
    with pytest.raises(BrokenPipeError):
        run(["serve"])


def test_a_reader_that_has_ended_is_no_error():
    code = "import sys; from chunkllama_server.commands import run; sys.exit(run(['version']))"
    reading, writing = os.pipe()
    os.close(reading)
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, stdout=writing, stderr=subprocess.PIPE, check=False, text=True)
    os.close(writing)
    assert (done.returncode, done.stderr) == (1, "")


def test_a_file_that_no_command_has_checked_is_one_line(capsys):
    name = "a" * 300
    assert run(["finetune", "--data", name, "--out", "x"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line == f"chunkllama: error: {name}: File name too long"


def test_models_lists_what_can_be_fetched(chunkllama, tmp_path, tiny_model):
    assert "smollm2-135m-instruct" in chunkllama("models", CHUNKLLAMA_CACHE=str(tmp_path)).stdout
    assert chunkllama("models", "fetch", tiny_model).stdout.strip() == str(tiny_model)
    missing = chunkllama("models", "fetch", "/nowhere")
    assert missing.returncode == 2
