"""Which tags surround tool calls, by model family, and which family a model belongs to.

The family is read from what the model's chat template writes for an earlier call, and from its
vocabulary. It decides how a call is written in a grammar; reading understands all families unless
the operator names one.
"""

from __future__ import annotations

from dataclasses import dataclass

from chunkllama.text.template_capabilities import TemplateCapabilities
from chunkllama.text.tokenizer import Tokenizer
from chunkllama_server.api.tools.escaped_call import CLOSES, MARKS, OPENS
from chunkllama_server.config.server import ToolFamily as Family


@dataclass(frozen=True, slots=True)
class CallTags:
    """The tags that begin and end calls.

    Attributes:
        opens: a call, or a list of calls, follows.
        closes: a call or a list has ended.
    """

    opens: tuple[str, ...] = ()
    closes: tuple[str, ...] = ()

    def __or__(self, other: CallTags) -> CallTags:
        opens = dict.fromkeys((*self.opens, *other.opens))
        return CallTags(tuple(opens), tuple(dict.fromkeys((*self.closes, *other.closes))))


FAMILY_TAGS: dict[Family, CallTags] = {
    # Hermes 2 and 3, Qwen 2.5 and 3, SmolLM3, Exaone 4, Ernie 4.5, Granite 4; Nemotron in capitals.
    # Other tags around the same objects: LongCat, Command R7B, Apertus, InternLM.
    "hermes": CallTags(
        (
            *("<tool_call>", "<tool_calls>", "<TOOLCALL>", "<longcat_tool_call>"),
            *("<|START_ACTION|>", "<|tools_prefix|>", "<|action_start|>", "<|plugin|>"),
        ),
        (
            *("</tool_call>", "</tool_calls>", "</TOOLCALL>", "</longcat_tool_call>"),
            *("<|END_ACTION|>", "<|tools_suffix|>", "<|action_end|>"),
        ),
    ),
    "llama3_json": CallTags(("<|python_tag|>", "<function="), ("</function>", "<|eom_id|>")),
    # Llama 3.2 and 4, OLMo 3, LFM2, Gemma.
    "pythonic": CallTags(
        ("<|python_start|>", "<function_calls>", "<|tool_call_start|>", "```tool_code"),
        ("<|python_end|>", "</function_calls>", "<|tool_call_end|>"),
    ),
    # A list of objects up to tokenizer v7, a name and its arguments from v11 on.
    "mistral": CallTags(("[TOOL_CALLS]",), ("[/TOOL_CALLS]",)),
    # Qwen3-Coder, Seed-OSS.
    "qwen3_coder": CallTags(
        ("<tool_call>", "<function=", "<seed:tool_call>"),
        ("</tool_call>", "</function>", "</seed:tool_call>"),
    ),
    "minimax_m2": CallTags(
        ("<minimax:tool_call>", "<invoke name="), ("</minimax:tool_call>", "</invoke>")
    ),
    # GLM 4.5 to 4.7.
    "glm45": CallTags(("<tool_call>",), ("</tool_call>",)),
    "deepseek_v3": CallTags(
        ("<｜tool▁calls▁begin｜>", "<｜tool▁call▁begin｜>"),
        ("<｜tool▁call▁end｜>", "<｜tool▁calls▁end｜>"),
    ),
    "deepseek_v32": CallTags(
        ("<｜DSML｜function_calls>", "<｜DSML｜tool_calls>", "<｜DSML｜invoke name="),
        ("</｜DSML｜function_calls>", "</｜DSML｜tool_calls>", "</｜DSML｜invoke>"),
    ),
    "granite": CallTags(
        ("<|tool_call|>", "<tool_call>", "<function_call>"), ("</tool_call>", "</function_call>")
    ),
    "phi4_mini_json": CallTags(("functools[", "<|tool_call|>"), ("<|/tool_call|>",)),
    "functionary": CallTags((">>>", "<|recipient|>", "<function="), ("</function>",)),
    "kimi_k2": CallTags(
        ("<|tool_calls_section_begin|>", "<|tool_call_begin|>"),
        ("<|tool_call_end|>", "<|tool_calls_section_end|>"),
    ),
    # FunctionGemma; Gemma 4 has other tags and marks.
    "functiongemma": CallTags(OPENS, CLOSES),
}
# Tags that ordinary text may contain; they are read where the family is known.
_COMMON_TEXT = (">>>", "<|recipient|>")
# The first of these that a template writes around a call, or mentions beside its tools, tells the
# family; more special ones come first.
_SIGNS: tuple[tuple[str, Family], ...] = (
    ("<function=", "qwen3_coder"),
    ("<arg_key>", "glm45"),
    ("<minimax:tool_call>", "minimax_m2"),
    ("<｜DSML｜function_calls>", "deepseek_v32"),
    ("<start_function_call>", "functiongemma"),
    ("<｜tool▁calls▁begin｜>", "deepseek_v3"),
    ("<｜tool▁call▁begin｜>", "deepseek_v3"),
    ("<|tool_calls_section_begin|>", "kimi_k2"),
    ("[TOOL_CALLS]", "mistral"),
    ("<tool_call>", "hermes"),
    ("<|recipient|>", "functionary"),
    (">>>", "functionary"),
    ("functools[", "phi4_mini_json"),
    ("<|tool_call|>", "granite"),
    ("<function_calls>", "pythonic"),
    ("<|python_start|>", "pythonic"),
    ("<|tool_call_start|>", "pythonic"),
    ("<|python_tag|>", "llama3_json"),
)


def all_tags(family: Family | None) -> CallTags:
    """The tags of every family, without those that other text has unless they are of ``family``."""
    tags = CallTags()
    for name, own in FAMILY_TAGS.items():
        kept = tuple(tag for tag in own.opens if tag not in _COMMON_TEXT or name == family)
        tags = tags | CallTags(kept, own.closes)
    return tags


def tool_family(
    configured: Family | None, able: TemplateCapabilities | None, tokenizer: Tokenizer | None
) -> Family:
    """The configured family, else the one whose form the template writes.

    A template that prints no tools has them described in Hermes' words. Where its output does not
    tell, the vocabulary does: a tag that is one token was trained.
    """
    if configured is not None:
        return configured
    if able is None or not able.tools:
        return "hermes"
    written = next((f for sign, f in _SIGNS if sign in able.call_markers), None)
    if written is None and able.python_calls:
        return "pythonic"
    if written is None and not able.tool_calls:
        written = next((f for sign, f in _SIGNS if _is_added(sign, tokenizer)), None)
    if written == "qwen3_coder" and "<parameter=" not in able.call_markers:
        return "functionary"
    if written == "granite" and _is_added("<|/tool_call|>", tokenizer):
        return "phi4_mini_json"
    return written or "llama3_json"


def _is_added(tag: str, tokenizer: Tokenizer | None) -> bool:
    return tokenizer is not None and tokenizer.token_id(tag) in tokenizer.added_tokens


def set_of_tags(tags: CallTags) -> tuple[str, ...]:
    """All tags, those inside a call included."""
    return (*tags.opens, *tags.closes, *_INNER_TAGS)


def special_tags(tags: CallTags, tokenizer: Tokenizer) -> dict[int, str]:
    """The tags that are special tokens, by id: decoding leaves them out unless asked for."""
    found = {}
    for tag in set_of_tags(tags):
        token_id = tokenizer.token_id(tag)
        if token_id in tokenizer.special_ids and token_id not in tokenizer.eos_token_ids:
            assert token_id is not None
            found[token_id] = tag
    return found


# Inside a call.
_INNER_TAGS = (
    "[ARGS]",
    "[CALL_ID]",
    "<｜tool▁sep｜>",
    "<|tool_call_argument_begin|>",
    "<|content|>",
    *("<arg_key>", "</arg_key>", "<arg_value>", "</arg_value>", "｜DSML｜"),
    *MARKS,
)
