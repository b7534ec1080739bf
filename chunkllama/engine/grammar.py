"""Grammars as token masks, compiled and stepped by llguidance. No torch: the API process validates
with it.
"""

from __future__ import annotations

import json
import re
import threading
from collections import OrderedDict
from collections.abc import Callable
from copy import copy
from typing import Any, Protocol

import llguidance
import msgspec
import numpy as np
from llguidance.gbnf_to_lark import gbnf_to_lark
from numpy.typing import NDArray

from chunkllama.errors import InvalidRequestError
from chunkllama.sampling_params import GrammarSpec, ThinkingSpec

# One optional blank between JSON tokens: a model that may write blanks without end will.
JSON_WHITESPACE = {"whitespace_pattern": "[ \\n]?", "whitespace_flexible": True}
_MAX_COMPILED = 64


def to_llguidance(spec: GrammarSpec) -> str:
    """llguidance's own grammar text.

    Raises:
        InvalidRequestError: ``text`` is not what ``kind`` says.
    """
    matcher = llguidance.LLMatcher
    json_options: Any = JSON_WHITESPACE
    try:
        match spec.kind:
            case "json_schema":
                return matcher.grammar_from_json_schema(spec.text, overrides=json_options)
            case "json_object":
                return matcher.grammar_from_json_schema('{"type":"object"}', overrides=json_options)
            case "regex":
                return matcher.grammar_from_regex(with_ascii_classes(spec.text))
            case "choice":
                return matcher.grammar_from_lark(_choice(json.loads(spec.text)))
            case "lark":
                return matcher.grammar_from_lark(spec.text)
            case "gbnf":
                return matcher.grammar_from_lark(gbnf_as_lark(spec.text))
    except ValueError as error:
        raise InvalidRequestError(f"invalid {spec.kind}: {_one_line(error)}", "grammar") from None
    raise InvalidRequestError(f"unknown grammar kind {spec.kind!r}", "grammar")


def is_gbnf(text: str) -> bool:
    """Whether a grammar is in GBNF (llama.cpp, xgrammar), not in Lark's syntax."""
    # Within one line: white space that may span lines is read again from each of them.
    return re.search(r"^[^\S\n]*[\w-]+[^\S\n]*::=", text, re.MULTILINE) is not None


def gbnf_as_lark(text: str) -> str:
    """A GBNF grammar in Lark's syntax; its rule ``root`` becomes ``start``.

    Raises:
        InvalidRequestError: it is malformed, or nested too deeply.
    """
    try:
        return str(gbnf_to_lark(text))
    except Exception as error:  # it raises a plain one for a rule that is missing
        raise InvalidRequestError(f"invalid gbnf: {_one_line(error)}", "grammar") from None


# ECMA-262's and Python's ASCII meaning of the classes that Rust's regex reads as Unicode's.
_ASCII_CLASSES = {"d": "0-9", "w": "0-9A-Za-z_"}


def with_ascii_classes(pattern: str) -> str:
    r"""A regex in which ``\d`` and ``\w`` and their opposites mean ASCII, as in ECMA-262."""
    parts: list[str] = []
    depth = at = 0
    while at < len(pattern):
        char, following = pattern[at], pattern[at + 1 : at + 2]
        if char == "\\":
            members = _ASCII_CLASSES.get(following.lower())
            if members is None:
                parts.append(char + following)
            elif following.isupper():
                parts.append(f"[^{members}]")
            else:
                parts.append(members if depth else f"[{members}]")
            at += 2
            continue
        if char == "[":
            depth += 1
            # A bracket that comes first in its class is a member.
            head = re.compile(r"\[\^?\]?").match(pattern, at)
            assert head is not None, "it begins with a bracket"
            parts.append(head[0])
            at = head.end()
            continue
        depth -= char == "]" and depth > 0
        parts.append(char)
        at += 1
    return "".join(parts)


def _choice(choices: object) -> str:
    if not (isinstance(choices, list) and choices and all(isinstance(c, str) for c in choices)):
        raise ValueError("expected a list of at least one string")
    return "start: " + " | ".join(json.dumps(choice, ensure_ascii=False) for choice in choices)


# What may stand in a JSON string, so often at most: llguidance computes the masks of these once. By
# itself it knows 10 and 30 only, and a bounded string is slow where fewer characters are left.
_SLICES = [r'[^"\\\x00-\x1F\x7F]' + times for times in ("{1,6}", "{1,10}", "{1,16}", "{1,30}", "+")]


def _one_line(error: object) -> str:
    """The message without the lines that quote; of a regular expression, with its last."""
    lines = str(error).strip().splitlines()
    if len(lines) > 1 and lines[0] == "regex parse error:":
        return f"{lines[1].strip()!r} is no regular expression: {lines[-1].strip()}"
    return lines[0] if lines else "not accepted"


class Matcher(Protocol):
    """What may come next in one sequence."""

    def fill_mask(self, mask: NDArray[np.int32]) -> None:
        """Set bit t of ``mask`` [ceil(vocab / 32)] for each token t that may come next."""
        ...

    @property
    def error(self) -> str:
        """Why no mask could be computed; "" while all is well."""
        ...

    def accept(self, token_id: int) -> bool:
        """Move on by a sampled token; False if the grammar does not allow it."""
        ...

    @property
    def is_finished(self) -> bool:
        """Nothing but the end of the sequence may follow."""
        ...

    def copy(self) -> Matcher:
        """A matcher in the same state, which moves on by itself."""
        ...

    def forced(self) -> list[int]:
        """The next tokens as far as there is no other text; the same text in other tokens may be
        allowed, too."""
        ...


class GrammarMatcher:
    """The state of one sequence's grammar."""

    def __init__(self, matcher: llguidance.LLMatcher) -> None:
        self._matcher = matcher

    def fill_mask(self, mask: NDArray[np.int32]) -> None:
        self._matcher.unsafe_compute_mask_ptr(mask.ctypes.data, mask.nbytes)

    @property
    def error(self) -> str:
        return _one_line(self._matcher.get_error()) if self._matcher.is_error() else ""

    def accept(self, token_id: int) -> bool:
        # The end-of-sequence token after a complete answer is not part of the grammar.
        return self._matcher.is_stopped() or bool(self._matcher.consume_token(token_id))

    @property
    def is_finished(self) -> bool:
        return bool(self._matcher.is_stopped())

    def copy(self) -> GrammarMatcher:
        return GrammarMatcher(self._matcher.deep_copy())

    def forced(self) -> list[int]:
        return list(self._matcher.compute_ff_tokens())


class ThinkingMatcher:
    """Thoughts of free text up to their budget, then a grammar or free text.

    Args:
        answer: what the answer obeys; None for free text.
        token_bytes: the bytes of one token.
        eos_token_ids: forbidden in thoughts that an answer with a grammar follows.
    """

    def __init__(
        self,
        spec: ThinkingSpec,
        answer: GrammarMatcher | None,
        token_bytes: Callable[[int], bytes],
        eos_token_ids: list[int],
    ) -> None:
        self._spec = spec
        self._answer = answer
        self._token_bytes = token_bytes
        self._eos_token_ids = eos_token_ids
        self._end = spec.end.encode()
        self._is_thinking = spec.is_open
        self._num_tokens = 0
        # Of the ending tag that is being forced.
        self._num_forced = 0
        self._tail = b""

    @property
    def _may_begin(self) -> bool:
        return not self._is_thinking and self._num_tokens == 0

    @property
    def _must_end(self) -> bool:
        budget = self._spec.budget
        return self._is_thinking and budget is not None and self._num_tokens >= budget

    def fill_mask(self, mask: NDArray[np.int32]) -> None:
        if self._must_end:
            _allow(mask, self._spec.end_token_ids[self._num_forced])
        elif self._is_thinking or self._answer is None:
            mask.fill(-1)
            if self._answer is not None:
                for token in self._eos_token_ids:
                    mask[token // 32] &= ~np.int32(_bit(token))
        else:
            self._answer.fill_mask(mask)
            if self._may_begin and self._spec.start_token_id is not None:
                _allow(mask, self._spec.start_token_id)

    @property
    def error(self) -> str:
        return "" if self._is_thinking or self._answer is None else self._answer.error

    def accept(self, token_id: int) -> bool:
        may_begin, must_end = self._may_begin, self._must_end
        self._num_tokens += 1
        if self._is_thinking:
            self._think(token_id, must_end)
            return True
        if may_begin and token_id == self._spec.start_token_id:
            self._is_thinking = True
            return True
        return self._answer is None or self._answer.accept(token_id)

    def _think(self, token_id: int, must_end: bool) -> None:
        if must_end:
            self._num_forced += 1
            self._is_thinking = self._num_forced < len(self._spec.end_token_ids)
            return
        self._tail += self._token_bytes(token_id)
        is_end = self._spec.end_token_ids == (token_id,) or self._end in self._tail
        self._tail = self._tail[-len(self._end) :]
        self._is_thinking = not is_end

    @property
    def is_finished(self) -> bool:
        return not self._is_thinking and self._answer is not None and self._answer.is_finished

    def copy(self) -> ThinkingMatcher:
        other = copy(self)
        other._answer = None if self._answer is None else self._answer.copy()
        return other

    def forced(self) -> list[int]:
        if self._must_end:
            return list(self._spec.end_token_ids[self._num_forced :])
        if self._is_thinking or self._answer is None or self._may_begin:
            return []
        return self._answer.forced()


def _bit(token_id: int) -> int:
    """The bit of a token in its 32-bit word, as a signed number."""
    bit = 1 << (token_id % 32)
    return bit - (1 << 32) if bit >> 31 else bit


def _allow(mask: NDArray[np.int32], token_id: int) -> None:
    mask[token_id // 32] |= np.int32(_bit(token_id))


def _answer_spec(spec: GrammarSpec) -> GrammarSpec:
    """The grammar of the answer alone, which requests with other thoughts share."""
    return msgspec.structs.replace(spec, thinking=None)


class GrammarCompiler:
    """Compiles grammars for one tokenizer, remembering the latest.

    Args:
        tokenizer_json: the tokenizer as tokenizer.json has it.
        vocab_size: of the model, which may have rows beyond the tokenizer's last id.
        eos_token_ids: allowed where the grammar may end.

    Raises:
        InvalidRequestError: the library cannot use this tokenizer, so no grammar can be used.
    """

    def __init__(self, tokenizer_json: str, vocab_size: int, eos_token_ids: list[int]) -> None:
        try:
            self._tokenizer = llguidance.LLTokenizer(
                tokenizer_json, n_vocab=vocab_size, eos_token=eos_token_ids or None, slices=_SLICES
            )
        except BaseException as error:
            # The library reports a failed assertion as a PanicException, which is no Exception.
            if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
                raise
            raise InvalidRequestError(
                f"structured output is not available with this model's tokenizer: "
                f"{_one_line(str(error))[:200]}",
                "grammar",
            ) from None
        self._eos_token_ids = eos_token_ids
        self._compiled: OrderedDict[GrammarSpec, llguidance.LLMatcher] = OrderedDict()
        self._lock = threading.Lock()  # of the order of _compiled

    def has(self, spec: GrammarSpec) -> bool:
        """Whether the grammar is compiled."""
        return spec.kind == "any" or _answer_spec(spec) in self._compiled

    def matcher(self, spec: GrammarSpec, output_token_ids: list[int]) -> Matcher:
        """A matcher that has already seen ``output_token_ids``. Several threads may call.

        Raises:
            InvalidRequestError: the grammar does not compile, or the tokens do not follow it.
        """
        answer = None if spec.kind == "any" else self._answer_matcher(_answer_spec(spec))
        matcher: Matcher
        if spec.thinking is None:
            assert answer is not None, "a grammar of kind any bounds thoughts"
            matcher = answer
        else:
            matcher = ThinkingMatcher(spec.thinking, answer, self._token_bytes, self._eos_token_ids)
        if not all(matcher.accept(token) for token in output_token_ids):
            raise InvalidRequestError("the tokens so far do not follow the grammar", "grammar")
        return matcher

    def _token_bytes(self, token_id: int) -> bytes:
        return bytes(self._tokenizer.decode_bytes([token_id]))

    def _answer_matcher(self, spec: GrammarSpec) -> GrammarMatcher:
        with self._lock:
            compiled = self._compiled.get(spec)
        if compiled is None:
            compiled = llguidance.LLMatcher(self._tokenizer, to_llguidance(spec), log_level=0)
            if compiled.is_error():
                reason = _one_line(compiled.get_error())
                raise InvalidRequestError(f"invalid {spec.kind}: {reason}", "grammar")
        with self._lock:
            self._compiled[spec] = compiled
            self._compiled.move_to_end(spec)
            if len(self._compiled) > _MAX_COMPILED:
                self._compiled.popitem(last=False)
        return GrammarMatcher(compiled.deep_copy())

    def check(self, spec: GrammarSpec) -> None:
        """Compile a grammar and compute its first mask, where too complex ones fail.

        Raises:
            InvalidRequestError: it does not compile, or nothing can follow it.
        """
        if spec.kind == "any":
            return
        matcher = self._answer_matcher(_answer_spec(spec))
        matcher.fill_mask(np.zeros(-(-self._tokenizer.vocab_size // 32), dtype=np.int32))
        if matcher.error:
            reason = "nothing matches it" if "NoExtension" in matcher.error else matcher.error
            raise InvalidRequestError(f"invalid {spec.kind}: {reason}", "grammar")
