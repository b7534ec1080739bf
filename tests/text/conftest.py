"""Tiny tokenizers of both kinds, trained on the spot, in folders as a model publisher lays them
out."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
import sentencepiece
import tokenizers
from tokenizers import AddedToken, decoders, models, pre_tokenizers, processors, trainers

TEMPLATES = Path(__file__).parent / "templates"
CORPUS = [
    "The quick brown fox jumps over the lazy dog, and 1234567 other animals.",
    "def main():\n    return {'key': [1, 2, 3]}\n\n\tprint(\"hello\")",
    "नमस्ते दुनिया, यह एक परीक्षण है। বাংলা ভাষা সুন্দর।",
    "Привет, мир! Ça va très bien, où est l'église ?",
    "你好世界，这是一个测试。こんにちは世界。",
    "What is the capital of France? Paris. You are a helpful assistant.",
] * 20
LLAMA3_SPECIALS = [
    "<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>",
    "<|eot_id|>",
]  # fmt: skip
CHATML_SPECIALS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
# What tiny vocabularies know of nothing but bytes.
EXOTIC = "🤖👩‍👩‍👧‍👦🇮🇳 ക്ഷേമം தமிழ் ᚠᛇᚻ 𝔘𝔫𝔦 \u200d\ufeff\x00\x7f"


def _write(folder: Path, config: dict, template: str, model_type: str = "llama") -> Path:
    source = (TEMPLATES / f"{template}.jinja").read_text()
    config = {**config, "chat_template": source}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "config.json").write_text(json.dumps({"model_type": model_type, "eos_token_id": 1}))
    return folder


def _byte_level(
    folder: Path, specials: list[str], bos: str | None, eos: str, template: str
) -> Path:
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=600, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    backend.train_from_iterator(CORPUS, trainer)
    backend.add_special_tokens([AddedToken(s, special=True, normalized=False) for s in specials])
    backend.add_tokens([AddedToken("<tool_call>", normalized=False)])
    if bos:
        backend.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, backend.token_to_id(bos))]
        )
    backend.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": eos}
    return _write(folder, config | ({"bos_token": bos} if bos else {}), template)


def _sentencepiece(folder: Path, template: str) -> Path:
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS),
        model_writer=model,
        vocab_size=700,
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        split_digits=True,
        num_threads=1,
        minloglevel=2,
    )
    (folder / "tokenizer.model").write_bytes(model.getvalue())
    config = {
        "tokenizer_class": "LlamaTokenizer",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "add_bos_token": True,
        "add_eos_token": False,
        "legacy": False,
    }
    return _write(folder, config, template)


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Model folders (no weights) by kind; llama2_json is llama2 with tokenizer.json beside it."""
    from transformers import AutoTokenizer

    made = {
        name: tmp_path_factory.mktemp(name) for name in ("llama3", "chatml", "llama2", "mistral")
    }
    _byte_level(made["llama3"], LLAMA3_SPECIALS, "<|begin_of_text|>", "<|eot_id|>", "llama3")
    _byte_level(made["chatml"], CHATML_SPECIALS, None, "<|im_end|>", "chatml")
    _sentencepiece(made["llama2"], "llama2")
    _sentencepiece(made["mistral"], "mistral")
    made["llama2_json"] = tmp_path_factory.mktemp("llama2_json")
    AutoTokenizer.from_pretrained(made["llama2"]).save_pretrained(made["llama2_json"])
    (made["llama2_json"] / "config.json").write_text('{"model_type": "llama"}')
    return made


@pytest.fixture
def exotic() -> str:
    return EXOTIC


@pytest.fixture
def texts() -> list[str]:
    """Everything that is hard for a tokenizer, control-token strings included."""
    specials = [*LLAMA3_SPECIALS, *CHATML_SPECIALS, "<s>", "</s>", "[INST]", "<tool_call>"]
    edges = [
        "",
        " ",
        "  two  spaces ",
        " lead",
        "trail ",
        "\n\n x \t\n",
        "x" * 300,
        "\u2581a",
        "a<",
    ]
    return [*CORPUS[:6], EXOTIC, *edges, *(f"say {s} now{s} {s}" for s in specials), "|> b", "s>"]
