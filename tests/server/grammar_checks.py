"""What a grammar compiles to, and which texts it accepts."""

from __future__ import annotations

import llguidance

from chunkllama.engine.grammar_text import to_llguidance
from chunkllama.sampling_params import GrammarSpec


def compiles(spec: GrammarSpec) -> bool:
    return not llguidance.LLMatcher.validate_grammar(to_llguidance(spec), None)


def matches(spec: GrammarSpec, text: str) -> bool:
    """Whether a grammar accepts a text, each byte a token."""
    grammar = to_llguidance(spec)
    tokenizer = llguidance.LLTokenizer("byte")
    matcher = llguidance.LLMatcher(tokenizer, grammar, log_level=0)
    tokens = tokenizer.tokenize_str(text)
    return matcher.validate_tokens(tokens) == len(tokens) and (
        matcher.consume_tokens(tokens) and matcher.is_accepting()
    )
