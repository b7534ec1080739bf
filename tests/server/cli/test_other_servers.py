"""A command line of another server is refused with what to write here."""

from __future__ import annotations

import re
import shlex

import pytest

from chunkllama_server.commands import command_names, run
from chunkllama_server.commands.other_servers import BENCH, COMMANDS, SERVE


def options(capsys: pytest.CaptureFixture[str], *words: str) -> set[str]:
    assert run([*words, "--help"]) == 0
    return set(re.findall(r"(?<![\w-])--?[a-z][a-z-]*", capsys.readouterr().out))


@pytest.mark.parametrize(
    ("command", "flags"), [(("serve",), SERVE), (("bench", "serve"), BENCH)], ids=["serve", "bench"]
)
def test_advice_names_options_that_exist_for_those_that_do_not(command, flags, capsys) -> None:
    own = options(capsys, *command)
    assert not set(flags) & own
    named = {name for text in flags.values() for name in re.findall(r"--[a-z-]+", text)}
    assert len(named) > 3 and not named - own


def test_advice_names_commands_that_exist() -> None:
    own = {" ".join(words) for words in command_names()}
    assert not set(COMMANDS) & own
    named = {
        each for text in COMMANDS.values() for each in re.findall(r"chunkllama ([a-z ]+)", text)
    }
    assert {each.strip() for each in named} <= own


@pytest.mark.parametrize(
    ("line", "answer"),
    [
        ("run llama3", "no command 'run' here; write chunkllama serve MODEL; /dashboard of the "
         "server has a chat box"),
        ("help serve", "no command 'help' here; write chunkllama --help, or chunkllama COMMAND "
         "--help"),
        ("serv", "No such command 'serv'. Did you mean 'serve'?"),
        ("serve --ctx-size=4096 -m x", "no option --ctx-size here, use --max-model-len; no option "
         "-m here, use --model"),
        ("serve --kv_cache_dtype fp8", "no option --kv-cache-dtype here, use --kv-dtype"),
        ("serve --num-chunk 3", "No such option: --num-chunk; did you mean --num-chunks?"),
        ("serve --max-total-tokens 9", "no option --max-total-tokens here, use --max-model-len, or "
         "--num-chunks or --kv-cache-memory for the pool"),
        ("serve --max-concurrent-requests 9", "no option --max-concurrent-requests here, use "
         "--max-waiting"),
        ("serve --temp 0", "no option --temp here, set it in each request"),
        ("rm llama3", "no command 'rm' here; delete the model's folder in models/ of the cache, "
         "which is $CHUNKLLAMA_CACHE or ~/.cache/chunkllama"),
        ("cp a b", "no command 'cp' here; a folder may be copied, and --served-model-name gives a "
         "model its names"),
        ("push a", "no command 'push' here; models are not uploaded"),
        # An option that serves the purpose elsewhere is none of this command.
        ("health --ctx-size 3", "No such option: --ctx-size"),
        ("version --temp 0", "No such option: --temp"),
        ("health --hostname x --time-out 3", "No such option: --hostname"),
        ("health --time-out 3", "No such option: --time-out; did you mean --timeout?"),
        ("bench serve --num-prompts 9", "no option --num-prompts here, use --conversations"),
        ("--port 8000", "a command comes before --port, such as chunkllama serve"),
        ("-m x.gguf", "a command comes before -m, such as chunkllama serve; no option -m here, use "
         "--model"),
    ],
)  # fmt: skip
def test_a_refused_line_says_what_to_write(line, answer, capsys) -> None:
    assert run(shlex.split(line)) == 2
    printed = capsys.readouterr().err.strip()
    assert printed == f"chunkllama: error: {answer}"


@pytest.mark.parametrize("command", [["doctor"], ["config", "show"]], ids=" ".join)
def test_the_model_may_be_the_first_word(command, capsys, tiny_model) -> None:
    assert run([*command, str(tiny_model), "--device", "cpu", "--num-chunks", "64"]) == 0
    assert "tiny" in capsys.readouterr().out


def test_the_list_of_commands_is_not_cut(capsys, monkeypatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    groups = {words[:-1] for words in command_names() if len(words) > 1}
    for words in [(), *groups]:
        assert run([*words, "--help"]) == 0
        usage, *lines = capsys.readouterr().out.splitlines()
        assert usage.startswith("Usage: ") and len(lines) > 5
        assert not [line for line in lines if "..." in line]
