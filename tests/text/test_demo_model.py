"""The demo model's own tokenizer and template, against transformers."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from chunkllama.models.loading.hub import resolve_model
from chunkllama.text.chat_template import load_chat_template
from chunkllama.text.detokenizer import IncrementalDetokenizer
from chunkllama.text.tokenizer import load_tokenizer


@pytest.fixture(scope="module")
def demo() -> Path:
    return resolve_model("smollm2-135m-instruct")


def test_200_conversations_have_transformers_ids(demo, texts):
    from transformers import AutoTokenizer

    theirs = AutoTokenizer.from_pretrained(demo)
    tokenizer = load_tokenizer(demo)
    template = load_chat_template(demo, tokenizer)
    specials = [tokenizer.added_tokens[i].content for i in tokenizer.special_ids]
    clean = [t for t in texts if not any(s in t for s in specials)]
    rng = random.Random(11)
    for number in range(200):
        chat = [{"role": "system", "content": rng.choice(clean)}] if number % 3 == 0 else []
        for turn in range(rng.randrange(1, 6)):
            text = " ".join(rng.choice(clean) for _ in range(rng.randrange(1, 4)))
            chat.append({"role": ("user", "assistant")[turn % 2], "content": text})
        expected = theirs.apply_chat_template(
            chat, add_generation_prompt=number % 2 == 0, tokenize=True, return_dict=False
        )
        assert template.encode(chat, add_generation_prompt=number % 2 == 0) == expected


def test_streams_equal_decode(demo):
    from transformers import AutoTokenizer

    theirs, ours = AutoTokenizer.from_pretrained(demo), load_tokenizer(demo)
    rng = random.Random(12)
    for _ in range(1000):
        ids = [rng.randrange(ours.vocab_size) for _ in range(rng.randrange(1, 40))]
        detokenizer = IncrementalDetokenizer(ours, skip_special_tokens=True)
        streamed = "".join(detokenizer.add([i]) for i in ids) + detokenizer.finish()
        assert streamed == theirs.decode(ids, skip_special_tokens=True)
