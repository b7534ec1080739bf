"""``chunkllama doctor``: what it finds, what it advises, and that it starts and fetches nothing."""

from __future__ import annotations

import os
import re

import pytest

from chunkllama import __version__


@pytest.fixture
def chunkllama(in_process):
    return in_process


def _findings(done) -> dict[str, list[tuple[str, str]]]:
    findings: dict[str, list[tuple[str, str]]] = {}
    for line in done.stdout.splitlines():
        verdict, topic, text = line[:8].strip(), line[9:20].strip(), line[21:]
        findings.setdefault(topic, []).append((verdict, text))
    return findings


def test_a_machine_that_can_serve(chunkllama, tiny_model):
    done = chunkllama("doctor", "--model", tiny_model, "--num-chunks", "64")
    assert (done.returncode, done.stderr) == (0, "")
    findings = _findings(done)
    assert f"chunkllama {__version__}," in findings["versions"][0][1]
    assert findings["memory"][0][0] == "ok"
    ((verdict, text),) = findings["model"]
    assert verdict == "ok" and "2 layers" in text and text.endswith("context 1,024 tokens")
    ((verdict, text),) = findings["chunk pool"]
    assert verdict == "ok"
    assert re.search(r"64 chunks of 64 tokens, .*requests of up to 1,024 tokens, 4 of", text)


def test_a_pool_below_the_context_is_a_note(chunkllama, tiny_model):
    done = chunkllama("doctor", "--model", tiny_model, "--num-chunks", "4")
    assert done.returncode == 0
    (_, text), (verdict, advice) = _findings(done)["chunk pool"]
    assert "requests of up to 257 tokens, 1 of" in text
    assert verdict == "note" and "1,024" in advice and "num_chunks" in advice


def test_a_pool_beyond_the_memory_is_a_problem(chunkllama, tiny_model):
    done = chunkllama("doctor", "--model", tiny_model, "--num-chunks", "2000000000")
    assert done.returncode == 1
    verdict, advice = _findings(done)["memory"][-1]
    assert verdict == "problem" and "num_chunks" in advice


def test_an_unusable_model_is_a_problem(chunkllama, tmp_path):
    done = chunkllama("doctor", "--model", tmp_path)
    assert done.returncode == 1
    ((verdict, text),) = _findings(done)["model"]
    assert verdict == "problem" and "config.json" in text
    done = chunkllama("doctor", "--model", "/nowhere")
    assert (done.returncode, _findings(done)["model"][0][0]) == (1, "problem")


@pytest.mark.parametrize("model", ["smollm2-135m-instruct", "owner/name"])
def test_a_model_that_is_not_here_is_not_fetched(chunkllama, tmp_path, model):
    done = chunkllama("doctor", "--model", model, CHUNKLLAMA_CACHE=str(tmp_path / "cache"))
    assert done.returncode == 0
    assert _findings(done)["model"][0][0] == "note"
    assert not (tmp_path / "cache" / "models").exists()


def test_a_missing_compiler_is_a_note(chunkllama, tiny_model, tmp_path):
    done = chunkllama(
        "doctor", "--model", tiny_model, CXX="no-such-compiler", CHUNKLLAMA_NATIVE_DIR=str(tmp_path)
    )
    assert done.returncode == 0
    ((verdict, text),) = _findings(done)["kernels"]
    assert verdict == "note" and "no-such-compiler" in text and "install g++" in text


def test_bad_settings_are_one_line(chunkllama):
    done = chunkllama("doctor", "--num-chunks", "none")
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1 and "num_chunks" in done.stderr
    assert os.linesep not in done.stdout
