"""Ids and text equal transformers', whole and streamed."""

from __future__ import annotations

import io
import json
import random
import subprocess
import sys
from pathlib import Path

import pytest
import sentencepiece
from random_texts import random_texts
from tokenizers import AddedToken
from transformers import AutoTokenizer

from chunkllama.errors import ConfigError
from chunkllama.text.detokenizer import IncrementalDetokenizer
from chunkllama.text.tokenizer import load_tokenizer
from chunkllama.text.tokenizer_files import add_tokens

TYPE = {"type_id": 0}
KINDS = ("llama3", "chatml", "llama2", "mistral", "llama2_json")


@pytest.mark.parametrize("kind", KINDS)
def test_ids_equal_transformers(kind, folders, texts):
    from transformers import AutoTokenizer

    theirs, ours = AutoTokenizer.from_pretrained(folders[kind]), load_tokenizer(folders[kind])
    assert ours.vocab_size == len(theirs)
    assert ours.bos_token_id == theirs.bos_token_id
    assert theirs.eos_token_id in ours.eos_token_ids
    for text in texts:
        parsed = theirs.encode(text, add_special_tokens=False)
        assert ours.encode(text, allow_special=True) == parsed, text
        plain = theirs.encode(text, add_special_tokens=False, split_special_tokens=True)
        assert ours.encode(text) == plain, text
        if ours.special_ids.isdisjoint(parsed):
            assert ours.encode(text, add_special_tokens=True) == theirs.encode(text), text


@pytest.mark.parametrize("kind", ["llama3", "llama2"])
def test_bos_is_never_doubled(kind, folders):
    tokenizer = load_tokenizer(folders[kind])
    text = tokenizer.special_tokens["bos_token"] + "hello"
    ids = tokenizer.encode(text, add_special_tokens=True, allow_special=True)
    assert ids.count(tokenizer.bos_token_id) == 1


@pytest.mark.parametrize("kind", KINDS)
def test_text_without_special_parsing_yields_no_control_token(kind, folders):
    tokenizer = load_tokenizer(folders[kind])
    for special in (tokenizer.added_tokens[i].content for i in tokenizer.special_ids):
        ids = tokenizer.encode(f"a {special} b{special}")
        assert tokenizer.special_ids.isdisjoint(ids)
        assert tokenizer.decode(ids) == f"a {special} b{special}"


@pytest.mark.parametrize("kind", ["llama3", "llama2"])
def test_stream_equals_decode_of_all_ids(kind, folders):
    """10,000 random id sequences over both kinds, half of them thick with bytes."""
    from transformers import AutoTokenizer

    theirs, ours = AutoTokenizer.from_pretrained(folders[kind]), load_tokenizer(folders[kind])
    single_bytes = [i for i in range(ours.vocab_size) if len(ours.token_bytes(i)) == 1]
    rng = random.Random(5)
    for case in range(5000):
        ids = [rng.randrange(ours.vocab_size) for _ in range(rng.randrange(1, 24))]
        if case % 2:
            ids = [rng.choice(single_bytes) if rng.random() < 0.7 else i for i in ids]
        skip = rng.random() < 0.5
        detokenizer = IncrementalDetokenizer(ours, skip)
        pieces, start = [], 0
        while start < len(ids):
            step = rng.randrange(1, 4)
            pieces.append(detokenizer.add(ids[start : start + step]))
            start += step
        pieces.append(detokenizer.finish())
        expected = theirs.decode(ids, skip_special_tokens=skip)
        assert "".join(pieces) == expected == ours.decode(ids, skip), ids


@pytest.mark.parametrize("kind", ["llama3", "llama2"])
def test_stream_never_shows_part_of_a_character(kind, folders, exotic):
    tokenizer = load_tokenizer(folders[kind])
    ids = tokenizer.encode(exotic)
    detokenizer = IncrementalDetokenizer(tokenizer, skip_special_tokens=True)
    pieces = [detokenizer.add([i]) for i in ids]
    assert "\ufffd" not in "".join(pieces)
    assert "".join(pieces) + detokenizer.finish() == exotic
    cut = IncrementalDetokenizer(tokenizer, skip_special_tokens=True)
    assert cut.add(tokenizer.encode("🤖")[:-1]).strip() == ""
    assert "\ufffd" in cut.finish()


def test_answer_to_a_chat_loses_the_leading_space_and_a_continuation_keeps_it(folders):
    tokenizer = load_tokenizer(folders["llama2"])
    prompt, answer = tokenizer.encode("The capital"), tokenizer.encode("of France")
    assert IncrementalDetokenizer(tokenizer, True).add(answer) == "of France"
    assert IncrementalDetokenizer(tokenizer, True, prompt).add(answer) == " of France"


@pytest.mark.parametrize("kind", ["llama3", "llama2"])
def test_token_bytes_spell_the_text(kind, folders, texts):
    tokenizer = load_tokenizer(folders[kind])
    for text in texts:
        ids = tokenizer.encode(text)
        spelled = b"".join(map(tokenizer.token_bytes, ids)).decode()
        assert spelled[tokenizer.rule.strip_left :] == tokenizer.decode(ids)
    assert tokenizer.token_bytes(tokenizer.vocab_size) == b""
    assert tokenizer.token_bytes(-1) == b""
    eos = tokenizer.special_tokens["eos_token"]
    assert tokenizer.token_str(tokenizer.token_id(eos)) == eos


def test_eos_ids_are_the_union_of_every_file(folders, tmp_path):
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((folders["llama3"] / name).read_bytes())
    (tmp_path / "config.json").write_text('{"eos_token_id": 3}')
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [4, 5]}')
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.eos_token_ids == (3, 4, 5, tokenizer.token_id("<|eot_id|>"))


def _unusable(folder: Path, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        load_tokenizer(folder)
    assert "\n" not in str(caught.value)


def test_unusable_folders_are_named(folders, tmp_path):
    _unusable(tmp_path, "neither tokenizer.json nor tokenizer.model")
    (tmp_path / "tokenizer.model").write_bytes(b"\xff\xfe not a model")
    _unusable(tmp_path, r"tokenizer\.model")
    (tmp_path / "tokenizer.json").write_text('{"model": ')
    _unusable(tmp_path, r"tokenizer\.json")
    (tmp_path / "tokenizer_config.json").write_text("[]")
    _unusable(tmp_path, "must hold a JSON object")
    (tmp_path / "tokenizer_config.json").write_text("{}")
    document = json.loads((folders["llama3"] / "tokenizer.json").read_text())
    document["decoder"] = {"type": "WordPiece", "prefix": "##", "cleanup": True}
    (tmp_path / "tokenizer.json").write_text(json.dumps(document))
    _unusable(tmp_path, "decoder WordPiece")


@pytest.mark.parametrize(
    "odd",
    [
        {"bos_token": 5},
        {"eos_token": [1]},
        {"added_tokens_decoder": [1]},
        {"added_tokens_decoder": {"x": {"content": "q"}}},
        {"added_tokens_decoder": {"0": {}}},
        {"extra_special_tokens": 5},
        {"additional_special_tokens": [1]},
    ],
)
def test_values_of_the_wrong_type_are_one_line(odd, folders, tmp_path):
    source = folders["llama3"]
    (tmp_path / "tokenizer.json").write_bytes((source / "tokenizer.json").read_bytes())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(odd))
    _unusable(tmp_path, r"tokenizer_config\.json")


def test_text_room_imports_no_torch():
    code = (
        "import sys, chunkllama.text.chat_template, chunkllama.text.detokenizer;"
        "sys.exit(any(m in sys.modules for m in ('torch', 'transformers')))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize(
    "flags",
    [
        {"add_eos_token": False},
        {"add_eos_token": True},
        {"add_bos_token": False},
        {"add_bos_token": None},
        {"add_bos_token": True, "add_eos_token": True},
    ],
    ids=json.dumps,
)
def test_the_rule_of_tokenizer_json_stands_beside_flags(flags, folders, tmp_path):
    for name in ("tokenizer.json", "tokenizer_config.json", "config.json"):
        (tmp_path / name).write_bytes((folders["llama3"] / name).read_bytes())
    path = tmp_path / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **flags}))
    ids = load_tokenizer(tmp_path).encode("a b", add_special_tokens=True)
    assert ids == AutoTokenizer.from_pretrained(tmp_path).encode("a b")
    assert len(ids) == 3


def test_a_bos_that_only_the_flag_asks_for_is_added(folders, tmp_path):
    """DeepSeek-V3's folder; what tokenizer.json adds stays."""
    for name in ("tokenizer.json", "tokenizer_config.json", "config.json"):
        (tmp_path / name).write_bytes((folders["llama3"] / name).read_bytes())
    path = tmp_path / "tokenizer.json"
    document = json.loads(path.read_text())
    token = "<|eot_id|>"
    ends = {"id": token, "ids": [load_tokenizer(tmp_path).token_id(token)], "tokens": [token]}
    document["post_processor"] |= {
        "single": [{"Sequence": {"id": "A", "type_id": 0}}, {"SpecialToken": {"id": token} | TYPE}],
        "special_tokens": {token: ends},
    }
    path.write_text(json.dumps(document))
    plain = load_tokenizer(tmp_path).encode("a b", add_special_tokens=True)
    config = tmp_path / "tokenizer_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "add_bos_token": True}))
    tokenizer = load_tokenizer(tmp_path)
    assert plain[-1] == tokenizer.token_id(token)
    assert tokenizer.encode("a b", add_special_tokens=True) == [tokenizer.bos_token_id, *plain]


@pytest.mark.parametrize("removes_spaces", [False, True])
@pytest.mark.parametrize("legacy", [None, True, False])
@pytest.mark.parametrize("model_type", ["mistral", "phi3"])
def test_models_that_keep_sentencepieces_rules_get_its_ids(
    model_type: str, legacy: bool | None, removes_spaces: bool, tmp_path: Path
) -> None:
    """With ``legacy`` false transformers adds no space before a text that begins with one."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(random_texts(300, seed=2)),
        model_writer=model,
        vocab_size=2000,
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=removes_spaces,
        user_defined_symbols=["::", "def"],
        control_symbols=["[INST]"],
        hard_vocab_limit=False,
        num_threads=1,
        minloglevel=2,
    )
    (tmp_path / "tokenizer.model").write_bytes(model.getvalue())
    config = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>"}
    config |= {"unk_token": "<unk>", "add_bos_token": True}
    config |= {} if legacy is None else {"legacy": legacy}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
    ours = load_tokenizer(tmp_path)
    processor = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
    reference = AutoTokenizer.from_pretrained(tmp_path)
    texts = [" ", "  two", "a  b ", " x :: def\n", *random_texts(200, seed=9)]
    plain = [x for x in texts if not any(name in x for name in ("<s>", "</s>", "<unk>", "[INST]"))]
    for text in plain:
        ids = ours.encode(text, allow_special=True)
        assert ids == reference.encode(text, add_special_tokens=False), text
        if legacy is not False:
            assert ids == processor.encode(text), text
        assert ours.decode(ids) == reference.decode(ids), text
    if legacy is not False:
        for text in texts:
            ids = reference.encode(text, add_special_tokens=False)
            assert ours.encode(text, allow_special=True) == ids, text


def test_gemmas_pieces_have_no_space_before_the_first_word(folders, tmp_path):
    path = tmp_path / "tokenizer.model"
    path.write_bytes((folders["llama2"] / "tokenizer.model").read_bytes())
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gemma2"}))
    config = {"tokenizer_class": "GemmaTokenizer", "bos_token": "<s>", "eos_token": "</s>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({**config, "add_bos_token": True}))
    ours, theirs = load_tokenizer(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    for text in ("Paris", " Paris", "  two", "a  b ", "", *random_texts(100, seed=3)):
        ids = ours.encode(text, add_special_tokens=True, allow_special=True)
        assert ids == theirs.encode(text), text
        assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True), text
    assert ours.decode(ours.encode(" Paris")) == " Paris"


def test_thousands_of_added_tokens_are_few_calls():
    """Each call builds the search for all of them again: Gemma 3 has 6,400."""
    calls: list[tuple[str, int]] = []

    class Backend:
        def add_tokens(self, tokens: list[AddedToken]) -> None:
            calls.append(("plain", len(tokens)))

        def add_special_tokens(self, tokens: list[AddedToken]) -> None:
            calls.append(("special", len(tokens)))

    tokens = [AddedToken(f"<{i}>", special=not 10 <= i < 12) for i in range(6400)]
    add_tokens(Backend(), tokens)
    assert calls == [("special", 10), ("plain", 2), ("special", 6388)]
