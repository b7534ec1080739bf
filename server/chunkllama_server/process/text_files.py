"""Read a model's tokenizer and chat template, and the public prefixes, while the engine starts.

Imports nothing of the HTTP layer, which takes longer to load than the files take to be refused.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from chunkllama.errors import ConfigError, InvalidRequestError
from chunkllama.logger import init_logger
from chunkllama.model_spec import ModelSpec
from chunkllama.text.chat_template import ChatTemplate, load_chat_template
from chunkllama.text.tokenizer import Tokenizer, load_tokenizer
from chunkllama_server.config.settings import Settings
from chunkllama_server.process.public_prefixes import load_public_prefixes

logger = init_logger(__name__)

_ANSWER: Final = "qzanswer"


@dataclass(frozen=True, slots=True)
class TextFiles:
    """What the text side needs of the files that the settings name.

    Attributes:
        template: None where the model has none; chat requests are refused then.
        prefixes: token ids of each public prefix.
    """

    tokenizer: Tokenizer
    template: ChatTemplate | None
    prefixes: list[list[int]]


def read_text_files(settings: Settings, path: Path, spec: ModelSpec) -> TextFiles:
    """Read and check them.

    Args:
        path, spec: the model's folder and numbers.

    Raises:
        ConfigError: tokenizer, chat template or public prefixes cannot be used.
    """
    tokenizer = load_tokenizer(path)
    if tokenizer.vocab_size > spec.vocab_size:
        raise ConfigError(
            f"{path}: the tokenizer has {tokenizer.vocab_size} tokens and the model "
            f"{spec.vocab_size}; they are not of the same model"
        )
    template = load_chat_template(path, tokenizer, settings.chat_template)
    if template is not None:
        logger.info("chat template: %s", template.capabilities.describe())
        _warn_of_endless_answers(template, tokenizer, path)
    else:
        logger.warning(
            "%s has no chat template: chat requests are refused, /v1/completions works; "
            "--chat-template FILE gives it one",
            path.name,
        )
    prefixes = load_public_prefixes(settings.public_prefixes, template)
    return TextFiles(tokenizer, template, prefixes)


def _warn_of_endless_answers(template: ChatTemplate, tokenizer: Tokenizer, path: Path) -> None:
    """Say that the token with which the template closes an answer does not end one.

    transformers does not stop there either: it follows eos_token_id.
    """
    end = turn_end(template, tokenizer)
    if end is not None and tokenizer.token_id(end) not in tokenizer.eos_token_ids:
        logger.warning(
            "%s: the chat template closes an answer with %s, which is no eos_token_id of "
            "generation_config.json or config.json: answers to chats may run on until max_tokens; "
            "add %s to eos_token_id",
            path.name,
            end,
            tokenizer.token_id(end),
        )


def turn_end(template: ChatTemplate, tokenizer: Tokenizer) -> str | None:
    """The added token that the template writes first after an answer; None: it writes none, or
    refuses a conversation of three turns.
    """
    texts = [("user", "qzquestion"), ("assistant", _ANSWER), ("user", "qznext")]
    is_text = template.capabilities.content == "text"
    turns = [
        {"role": role, "content": text if is_text else [{"type": "text", "text": text}]}
        for role, text in texts
    ]
    try:
        rendered = template.render(turns, add_generation_prompt=False)
    except InvalidRequestError:
        return None
    names = [token.content for token in tokenizer.added_tokens.values()]
    names = sorted((name for name in names if name.strip()), key=len, reverse=True)
    tail = rendered.rpartition(_ANSWER)[2].partition("qznext")[0]
    found = re.search("|".join(map(re.escape, names)) or r"(?!)", tail)
    return found[0] if found else None
