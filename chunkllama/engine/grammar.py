"""Grammars as token masks, compiled and stepped by llguidance. No torch: the API process validates
with it.
"""

from __future__ import annotations

import json
import threading
from collections import OrderedDict
from typing import Any

import llguidance
import numpy as np
from numpy.typing import NDArray

from chunkllama.errors import InvalidRequestError
from chunkllama.sampling_params import GrammarSpec

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
                return matcher.grammar_from_regex(spec.text)
            case "choice":
                return matcher.grammar_from_lark(_choice(json.loads(spec.text)))
            case "lark":
                return matcher.grammar_from_lark(spec.text)
    except ValueError as error:
        raise InvalidRequestError(f"invalid {spec.kind}: {_one_line(error)}", "grammar") from None
    raise InvalidRequestError(f"unknown grammar kind {spec.kind!r}", "grammar")


def _choice(choices: object) -> str:
    if not (isinstance(choices, list) and choices and all(isinstance(c, str) for c in choices)):
        raise ValueError("expected a list of at least one string")
    return "start: " + " | ".join(json.dumps(choice, ensure_ascii=False) for choice in choices)


# What may stand in a JSON string, so often at most: llguidance computes the masks of these once. By
# itself it knows 10 and 30 only, and a bounded string is slow where fewer characters are left.
_SLICES = [r'[^"\\\x00-\x1F\x7F]' + times for times in ("{1,6}", "{1,10}", "{1,16}", "{1,30}", "+")]


def _one_line(error: object) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else "not accepted"


class GrammarMatcher:
    """The state of one sequence's grammar."""

    def __init__(self, matcher: llguidance.LLMatcher) -> None:
        self._matcher = matcher

    def fill_mask(self, mask: NDArray[np.int32]) -> None:
        """Set bit t of ``mask`` [ceil(vocab / 32)] for each token t that may come next."""
        self._matcher.unsafe_compute_mask_ptr(mask.ctypes.data, mask.nbytes)

    @property
    def error(self) -> str:
        """Why no mask could be computed; "" while all is well."""
        return _one_line(self._matcher.get_error()) if self._matcher.is_error() else ""

    def accept(self, token_id: int) -> bool:
        """Move on by a sampled token; False if the grammar does not allow it."""
        # The end-of-sequence token after a complete answer is not part of the grammar.
        return self._matcher.is_stopped() or bool(self._matcher.consume_token(token_id))

    @property
    def is_finished(self) -> bool:
        """Nothing but the end of the sequence may follow."""
        return bool(self._matcher.is_stopped())


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
        self._compiled: OrderedDict[GrammarSpec, llguidance.LLMatcher] = OrderedDict()
        self._lock = threading.Lock()  # of the order of _compiled

    def has(self, spec: GrammarSpec) -> bool:
        """Whether the grammar is compiled."""
        return spec in self._compiled

    def matcher(self, spec: GrammarSpec, output_token_ids: list[int]) -> GrammarMatcher:
        """A matcher that has already seen ``output_token_ids``. Several threads may call.

        Raises:
            InvalidRequestError: the grammar does not compile, or the tokens do not follow it.
        """
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
        matcher = GrammarMatcher(compiled.deep_copy())
        if not all(matcher.accept(token) for token in output_token_ids):
            raise InvalidRequestError("the tokens so far do not follow the grammar", "grammar")
        return matcher

    def check(self, spec: GrammarSpec) -> None:
        """Compile a grammar and compute its first mask, where too complex ones fail.

        Raises:
            InvalidRequestError: it does not compile, or nothing can follow it.
        """
        matcher = self.matcher(spec, [])
        matcher.fill_mask(np.zeros(-(-self._tokenizer.vocab_size // 32), dtype=np.int32))
        if matcher.error:
            reason = "nothing matches it" if "NoExtension" in matcher.error else matcher.error
            raise InvalidRequestError(f"invalid {spec.kind}: {reason}", "grammar")
