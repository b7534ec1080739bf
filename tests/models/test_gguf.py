"""GGUF files: the same model as the folder they were made from."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from gguf_files import PROMPT, converted, write_gguf
from transformers import AutoModelForCausalLM, AutoTokenizer

from chunkllama.errors import ConfigError
from chunkllama.models.loading.hub import resolve_model


@pytest.mark.parametrize(
    "changes", [{}, {"tie_word_embeddings": True}, {"attention_bias": True}, {"head_dim": 16}]
)
def test_gguf_equals_its_folder(changes, make_tiny, our_logits, tmp_path: Path) -> None:
    model = make_tiny(**changes)
    if changes.get("tie_word_embeddings"):
        del model.lm_head
    write_gguf(tmp_path / "m.gguf", model)
    make_tiny(**changes).save_pretrained(tmp_path / "hf")
    from_gguf = our_logits(converted(tmp_path / "m.gguf", tmp_path / "out"), PROMPT)
    assert torch.equal(from_gguf, our_logits(tmp_path / "hf", PROMPT))


@pytest.mark.parametrize("kind", ["F16", "BF16", "Q8_0", "Q4_1", "Q5_0"])
def test_quantized_gguf_equals_transformers_reading_it(
    kind: str, make_tiny, our_logits, tmp_path: Path
) -> None:
    model = make_tiny(hidden_size=96, intermediate_size=64, num_attention_heads=6)
    write_gguf(tmp_path / "m.gguf", model, gguf.GGMLQuantizationType[kind])
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="m.gguf", dtype=torch.float32)
    ours = our_logits(converted(tmp_path / "m.gguf", tmp_path / "out"), PROMPT)
    with torch.inference_mode():
        expected = theirs(torch.tensor([PROMPT])).logits[0]
    torch.testing.assert_close(ours, expected, atol=2e-5, rtol=2e-5)
    stored = {"F16": "float16"}.get(kind, "bfloat16")
    assert json.loads((tmp_path / "out/config.json").read_text())["dtype"] == stored


def test_llama3_rope_comes_back_from_its_divisors(make_tiny, our_logits, tmp_path: Path) -> None:
    rope = {
        "rope_type": "llama3",
        "rope_theta": 500.0,
        "factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    }
    model = make_tiny(rope_parameters=dict(rope))
    model.save_pretrained(tmp_path / "hf")
    plain = 1 / 500.0 ** (np.arange(0, 8, 2) / 8)
    model.rope_factors = (plain / model.model.rotary_emb.inv_freq.numpy()).tolist()
    write_gguf(tmp_path / "m.gguf", model, rope_scaling_orig_ctx_len=(32,))
    ours = our_logits(converted(tmp_path / "m.gguf", tmp_path / "out"), PROMPT)
    torch.testing.assert_close(ours, our_logits(tmp_path / "hf", PROMPT), atol=1e-4, rtol=1e-4)

    model.rope_factors[1] *= 1.5
    write_gguf(tmp_path / "odd.gguf", model, rope_scaling_orig_ctx_len=(32,))
    with pytest.raises(ConfigError, match="llama3's rule"):
        converted(tmp_path / "odd.gguf", tmp_path / "odd")


def test_linear_rope_scaling_is_kept(make_tiny, our_logits, tmp_path: Path) -> None:
    model = make_tiny(rope_parameters={"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0})
    model.save_pretrained(tmp_path / "hf")
    write_gguf(
        tmp_path / "m.gguf",
        model,
        rope_scaling_type=(gguf.RopeScalingType.LINEAR,),
        rope_scaling_factor=(4.0,),
    )
    ours = our_logits(converted(tmp_path / "m.gguf", tmp_path / "out"), PROMPT)
    assert torch.equal(ours, our_logits(tmp_path / "hf", PROMPT))


def test_files_that_are_no_llama_are_refused(make_tiny, tmp_path: Path) -> None:
    (tmp_path / "junk.gguf").write_bytes(b"GGUF" + bytes(100))
    write_gguf(tmp_path / "other.gguf", make_tiny(), architecture="falcon")
    write_gguf(tmp_path / "whole.gguf", make_tiny())
    (tmp_path / "short.gguf").write_bytes((tmp_path / "whole.gguf").read_bytes()[:9000])
    for name, words in {"junk": "GGUF", "other": "'falcon'", "short": "GGUF"}.items():
        with pytest.raises(ConfigError, match=words) as caught:
            converted(tmp_path / f"{name}.gguf", tmp_path / name)
        assert "\n" not in str(caught.value)


def test_resolving_a_gguf_is_done_once_and_without_torch(
    make_tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CHUNKLLAMA_CACHE", str(tmp_path / "cache"))
    path = tmp_path / "m.gguf"
    write_gguf(path, make_tiny())
    code = (
        "import sys; from chunkllama.models.loading.hub import resolve_model;"
        f"print(resolve_model({str(path)!r})); print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    folder, torch_imported = done.stdout.split()
    assert torch_imported == "False"
    before = (Path(folder) / "model.safetensors").stat().st_mtime_ns
    assert resolve_model(str(path)) == Path(folder)
    assert (Path(folder) / "model.safetensors").stat().st_mtime_ns == before
    assert [p.name for p in Path(folder).parent.iterdir() if p.name.startswith(".tmp")] == []
    write_gguf(path, make_tiny(vocab_size=140))
    assert resolve_model(str(path)) != Path(folder)


def test_demo_model_speaks_chatml() -> None:
    """The demo model's folder, by transformers: tokenizer and template are complete."""
    tokenizer = AutoTokenizer.from_pretrained(resolve_model("smollm2-135m-instruct"))
    ids = tokenizer("def f(x):\n    return 12345 # naïve 🙂").input_ids
    assert tokenizer.decode(ids) == "def f(x):\n    return 12345 # naïve 🙂"
    assert [tokenizer.decode(i) for i in ids[8:13]] == ["1", "2", "3", "4", "5"]
    rendered = tokenizer.apply_chat_template(
        [{"role": "user", "content": "hi"}], add_generation_prompt=True, tokenize=False
    )
    assert rendered.endswith("<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n")
    assert tokenizer.eos_token_id == 2
