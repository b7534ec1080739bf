"""Grammars as token masks, compiled and stepped by llguidance. No torch: the API process validates
with it.
"""

from __future__ import annotations

import re
import threading
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, Protocol

import llguidance
import msgspec
import numpy as np
from numpy.typing import NDArray

from chunkllama.engine.closing import ClosingMatcher
from chunkllama.engine.end_search import EndSearch
from chunkllama.engine.end_texts import end_texts
from chunkllama.engine.end_tokens import EndTokens
from chunkllama.engine.grammar_text import one_line, to_llguidance
from chunkllama.engine.thinking import ThinkingMatcher
from chunkllama.engine.token_masks import token_ids_of
from chunkllama.errors import InvalidRequestError
from chunkllama.sampling_params import GrammarSpec

_MAX_COMPILED = 64
# What may stand in a JSON string, so often at most: llguidance computes the masks of these once. By
# itself it knows 10 and 30 only, and a bounded string is slow where fewer characters are left.
_SLICES = [r'[^"\\\x00-\x1F\x7F]' + times for times in ("{1,6}", "{1,10}", "{1,16}", "{1,30}", "+")]


class Matcher(Protocol):
    """What may come next in one sequence."""

    def fill_mask(self, mask: NDArray[np.int32], *, whole: bool = False) -> None:
        """Set bit t of ``mask`` [ceil(vocab / 32)] for each token t that may come next.

        Args:
            mask: of zeros.
            whole: also those behind which no end fits in the tokens that are left.
        """
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

    @property
    def is_closing(self) -> bool:
        """Return whether the tokens ran out so far that only the end of the answer was allowed."""
        ...

    def copy(self) -> Matcher:
        """A matcher in the same state, which moves on by itself."""
        ...

    def forced(self) -> list[int]:
        """The next tokens as far as there is no other text; the same text in other tokens may be
        allowed, too."""
        ...


class GrammarMatcher:
    """The state of one sequence's grammar; ``eos_token_id`` may come where the answer is whole."""

    def __init__(self, matcher: llguidance.LLMatcher, eos_token_id: int) -> None:
        self._matcher = matcher
        self._eos_token_id = eos_token_id

    def fill_mask(self, mask: NDArray[np.int32], *, whole: bool = False) -> None:
        self._matcher.unsafe_compute_mask_ptr(mask.ctypes.data, mask.nbytes)

    @property
    def error(self) -> str:
        return one_line(self._matcher.get_error()) if self._matcher.is_error() else ""

    def accept(self, token_id: int) -> bool:
        # The end-of-sequence token after a complete answer is not part of the grammar.
        return self._matcher.is_stopped() or bool(self._matcher.consume_token(token_id))

    @property
    def is_finished(self) -> bool:
        return bool(self._matcher.is_stopped())

    @property
    def is_closing(self) -> bool:
        return False

    def spend(self) -> None:
        """Count a token that the grammar does not see: it has no limit."""

    def has_room(self, num_tokens: int) -> bool:
        """Return that so many tokens fit: there is no limit."""
        return True

    def allows(self, token_ids: list[int]) -> bool:
        """Return whether some tokens may come next."""
        return bool(self._matcher.validate_tokens(token_ids) == len(token_ids))

    def may_end_behind(self, token_ids: list[int]) -> bool:
        """Return whether the answer is whole with some tokens more."""
        if not token_ids and self.is_finished:
            return True
        return self.allows([*token_ids, self._eos_token_id])

    def copy(self) -> GrammarMatcher:
        return GrammarMatcher(self._matcher.deep_copy(), self._eos_token_id)

    def forced(self) -> list[int]:
        return list(self._matcher.compute_ff_tokens())


# How the library says that a grammar is beyond its limits; that a token does not follow is another
# error.
_BEYOND = re.compile(r"lexer error|too ?(?:complex|many|large)|fuel", re.IGNORECASE)
TOO_COMPLEX: Final = "grammar_too_complex"


def is_beyond_limits(error: str) -> bool:
    """Return whether a matcher's error says that its grammar is beyond the library's limits."""
    return _BEYOND.search(error) is not None


def _answer_spec(spec: GrammarSpec) -> GrammarSpec:
    """The grammar of the answer alone, which requests with other thoughts share."""
    return msgspec.structs.replace(spec, thinking=None)


@dataclass(slots=True)
class _Compiled:
    """A grammar before the first token, and what finds its ends once that is wanted."""

    matcher: GrammarMatcher
    search: EndSearch | None = None


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
                f"{one_line(str(error))[:200]}",
                "grammar",
            ) from None
        self._eos_token_ids = eos_token_ids
        self._compiled: OrderedDict[GrammarSpec, _Compiled] = OrderedDict()
        self._lock = threading.Lock()  # of the order of _compiled
        self._end_tokens: EndTokens | None = None

    def has(self, spec: GrammarSpec) -> bool:
        """Return whether all is there that ``prepare`` makes."""
        compiled = self._compiled.get(_answer_spec(spec))
        if compiled is None:
            return spec.kind == "any"
        return not spec.is_json or compiled.search is not None

    def prepare(self, spec: GrammarSpec) -> None:
        """Compile a grammar, and for JSON find the shortest answer and sort the vocabulary by its
        part in ends, which takes a second if it is large.

        Raises:
            InvalidRequestError: the grammar does not compile.
        """
        self._prepare(spec)

    def _prepare(self, spec: GrammarSpec) -> _Compiled | None:
        if spec.kind == "any":
            return None
        compiled = self._compile(_answer_spec(spec))
        if spec.is_json and compiled.search is None:
            self._find_ends(spec, compiled)
        return compiled

    def maker(self, spec: GrammarSpec, max_tokens: int | None) -> Callable[[], Matcher] | None:
        """Return what makes a matcher as ``matcher`` does, but compiles nothing, however many other
        grammars come meanwhile; None if not all is there that ``prepare`` makes.
        """
        compiled = None
        if spec.kind != "any":
            with self._lock:
                compiled = self._compiled.get(_answer_spec(spec))
                if compiled is not None:
                    self._compiled.move_to_end(_answer_spec(spec))
            if compiled is None or (spec.is_json and compiled.search is None):
                return None
        return lambda: self._make(spec, compiled, [], max_tokens)

    def matcher(
        self, spec: GrammarSpec, output_token_ids: list[int], max_tokens: int | None = None
    ) -> Matcher:
        """A matcher that has already seen ``output_token_ids``. Several threads may call.

        Args:
            max_tokens: of the whole output; where it has JSON, this is closed before they run out.

        Raises:
            InvalidRequestError: the grammar does not compile, or the tokens do not follow it.
        """
        is_closed = max_tokens is not None and spec.is_json
        if is_closed or spec.kind == "any":
            compiled = self._prepare(spec)
        else:
            compiled = self._compile(_answer_spec(spec))
        return self._make(spec, compiled, output_token_ids, max_tokens)

    def _make(
        self,
        spec: GrammarSpec,
        compiled: _Compiled | None,
        output_token_ids: list[int],
        max_tokens: int | None,
    ) -> Matcher:
        answer: GrammarMatcher | ClosingMatcher | None = None
        if compiled is not None:
            answer = compiled.matcher.copy()
            if max_tokens is not None and spec.is_json:
                assert compiled.search is not None
                answer = ClosingMatcher(answer, max_tokens, compiled.search)
        matcher: Matcher
        if spec.thinking is None:
            assert answer is not None, "a grammar of kind any bounds thoughts"
            matcher = answer
        else:
            matcher = ThinkingMatcher(spec.thinking, answer, self._token_bytes, self._eos_token_ids)
        if not all(matcher.accept(token) for token in output_token_ids):
            raise InvalidRequestError("the tokens so far do not follow the grammar", "grammar")
        if isinstance(answer, ClosingMatcher):
            answer.catch_up()
        return matcher

    def _token_bytes(self, token_id: int) -> bytes:
        return bytes(self._tokenizer.decode_bytes([token_id]))

    def _find_ends(self, spec: GrammarSpec, compiled: _Compiled) -> None:
        if self._end_tokens is None:
            size = self._tokenizer.vocab_size
            self._end_tokens = EndTokens(
                self._token_bytes, self._tokenizer.tokenize_bytes, size, self._eos_token_ids
            )
        texts = end_texts(_answer_spec(spec))
        compiled.search = EndSearch(compiled.matcher.copy(), self._end_tokens, texts)

    def _compile(self, spec: GrammarSpec) -> _Compiled:
        with self._lock:
            compiled = self._compiled.get(spec)
        if compiled is None:
            matcher = llguidance.LLMatcher(self._tokenizer, to_llguidance(spec), log_level=0)
            if matcher.is_error():
                reason = one_line(matcher.get_error())
                raise InvalidRequestError(f"invalid {spec.kind}: {reason}", "grammar")
            compiled = _Compiled(GrammarMatcher(matcher, self._tokenizer.eos_token))
        with self._lock:
            self._compiled[spec] = compiled
            self._compiled.move_to_end(spec)
            if len(self._compiled) > _MAX_COMPILED:
                self._compiled.popitem(last=False)
        return compiled

    def check(self, spec: GrammarSpec) -> None:
        """Compile a grammar, compute its first mask, where too complex ones fail, and accept a
        token of it: a mask that was left incomplete shows no error by itself.

        Raises:
            InvalidRequestError: it does not compile, or nothing can follow it.
        """
        if spec.kind == "any":
            return
        matcher = self._compile(_answer_spec(spec)).matcher.copy()
        mask = np.zeros(-(-self._tokenizer.vocab_size // 32), dtype=np.int32)
        matcher.fill_mask(mask)
        allowed = token_ids_of(mask)
        if not matcher.error and len(allowed):
            matcher.accept(int(allowed[0]))
        if is_beyond_limits(matcher.error):
            raise InvalidRequestError(
                f"the {spec.kind} is too complex to be followed: {matcher.error}; lower its repeat "
                "counts, or have less that may be left out",
                "grammar",
                TOO_COMPLEX,
            )
        if matcher.error:
            reason = "nothing matches it" if "NoExtension" in matcher.error else matcher.error
            raise InvalidRequestError(f"invalid {spec.kind}: {reason}", "grammar")
