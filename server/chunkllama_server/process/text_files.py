"""Read a model's tokenizer and chat template, and the public prefixes, while the engine starts.

Imports nothing of the HTTP layer, which takes longer to load than the files take to be refused.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from chunkllama.errors import ConfigError
from chunkllama.logger import init_logger
from chunkllama.model_spec import ModelSpec
from chunkllama.text.chat_template import ChatTemplate, load_chat_template
from chunkllama.text.tokenizer import Tokenizer, load_tokenizer
from chunkllama_server.config.settings import Settings
from chunkllama_server.process.public_prefixes import load_public_prefixes

logger = init_logger(__name__)


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
    else:
        logger.warning(
            "%s has no chat template: chat requests are refused, /v1/completions works; "
            "--chat-template FILE gives it one",
            path.name,
        )
    prefixes = load_public_prefixes(settings.public_prefixes, template)
    return TextFiles(tokenizer, template, prefixes)
