"""The tokenizer of a model against transformers': ids, BOS, text."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import tokenizers

from chunkllama.text.detokenizer import IncrementalDetokenizer
from chunkllama.text.tokenizer import Tokenizer, encode_ids, load_tokenizer
from chunkllama.verify.report import Finding

_STREAM_PIECES = (1, 2, 3)


def check_tokenizer(folder: Path, reference: Path, texts: Sequence[str]) -> Iterator[Finding]:
    """Compare ids, BOS, decoded and streamed text. Code of a folder is not executed.

    Args:
        folder: of the model.
        reference: folder that transformers reads.
        texts: to compare on.
    """
    from transformers import AutoTokenizer

    ours = load_tokenizer(folder)
    try:
        theirs = AutoTokenizer.from_pretrained(
            reference, trust_remote_code=False, local_files_only=True
        )
    except (AttributeError, ImportError, LookupError, OSError, TypeError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        yield Finding("tokenizer", "", None, f"transformers cannot read it: {reason}")
        return
    whole = tokenizers.Tokenizer.from_str(ours.to_json())
    checks: dict[str, Callable[[str], tuple[Any, Any]]] = {
        "tokenizer": lambda text: (
            ours.encode(text, allow_special=True),
            theirs.encode(text, add_special_tokens=False),
        ),
        "BOS": lambda text: _with_bos(ours, whole, theirs, text),
        "decoding": lambda text: _decoded(ours, theirs, text),
        "streamed decoding": lambda text: (
            _streamed(ours, theirs.encode(text, add_special_tokens=False)),
            _decode(theirs, theirs.encode(text, add_special_tokens=False)),
        ),
    }
    for area, compare in checks.items():
        differing = [(text, *pair) for text in texts if (pair := compare(text))[0] != pair[1]]
        yield Finding(
            area,
            "",
            not differing,
            _detail(len(texts), differing),
            {"texts": len(texts), "differing": len(differing)},
        )


def _detail(count: int, differing: list[tuple[str, Any, Any]]) -> str:
    if not differing:
        return f"{count} texts equal"
    text, ours, theirs = differing[0]
    return (
        f"{len(differing)} of {count} texts differ; {text[:30]!r} gives {str(ours)[:60]} instead "
        f"of {str(theirs)[:60]}"
    )


def _with_bos(
    ours: Tokenizer, whole: tokenizers.Tokenizer, theirs: Any, text: str
) -> tuple[list[int], list[int]]:
    """What is served, or else what the files ask for: a BOS too many is left out of the former."""
    expected = theirs.encode(text)
    served = ours.encode(text, add_special_tokens=True, allow_special=True)
    if served != expected:
        return served, expected
    return encode_ids(whole, text, add_special_tokens=True), expected


def _decode(theirs: Any, ids: list[int]) -> str:
    text: str = theirs.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    return text


def _decoded(ours: Tokenizer, theirs: Any, text: str) -> tuple[str, str]:
    ids = theirs.encode(text, add_special_tokens=False)
    return ours.decode(ids, skip_special_tokens=False), _decode(theirs, ids)


def _streamed(ours: Tokenizer, ids: list[int]) -> str:
    detokenizer, parts, at = IncrementalDetokenizer(ours, False), [], 0
    while at < len(ids):
        size = _STREAM_PIECES[at % len(_STREAM_PIECES)]
        parts.append(detokenizer.add(ids[at : at + size]))
        at += size
    return "".join((*parts, detokenizer.finish()))
