"""A template that closes an answer with a token that ends none is warned about at the start."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from chunkllama.model_spec import ModelSpec
from chunkllama.text.chat_template import load_chat_template
from chunkllama.text.tokenizer import load_tokenizer
from chunkllama_server.config.settings import Settings
from chunkllama_server.process.text_files import read_text_files, turn_end

ENDS = {"llama3": "<|eot_id|>", "chatml": "<|im_end|>", "llama2": "</s>", "mistral": "</s>"}
SPEC = ModelSpec(1, 8, 8, 1, 1, 8, vocab_size=2000, max_position=64)


@pytest.mark.parametrize("kind", ENDS)
def test_the_token_after_an_answer_is_found(kind: str, folders: dict[str, Path]) -> None:
    tokenizer = load_tokenizer(folders[kind])
    template = load_chat_template(folders[kind], tokenizer)
    assert template is not None
    assert turn_end(template, tokenizer) == ENDS[kind]


@pytest.mark.parametrize("eos", ["<|im_end|>", "<|endoftext|>"])
def test_answers_that_do_not_end_are_warned_about(
    eos: str, folders: dict[str, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((folders["chatml"] / name).read_bytes())
    path = tmp_path / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "eos_token": eos}))
    read_text_files(Settings(model=str(tmp_path)), tmp_path, SPEC)
    expected = "closes an answer with <|im_end|>, which is no eos_token_id"
    assert (expected in caplog.text) == (eos != "<|im_end|>")
