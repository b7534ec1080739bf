"""System prompts that every tenant shares: computed at start, pinned, in the public namespace.

With isolation on, tenants reuse each other's chunks for these texts alone, so timing tells nothing
that the operator has not made public.
"""

from __future__ import annotations

from itertools import takewhile
from pathlib import Path

from chunkllama.engine.client import EngineClient
from chunkllama.errors import ChunkLlamaError, ConfigError
from chunkllama.logger import init_logger
from chunkllama.messages import EngineRequest
from chunkllama.sampling_params import SamplingParams
from chunkllama.text.chat_template import ChatTemplate
from chunkllama_server.config.files import load_yaml

logger = init_logger(__name__)

# For as long as the process lives.
_PIN_SECONDS = 10 * 365 * 86_400.0


def load_public_prefixes(path: Path | None, template: ChatTemplate | None) -> list[list[int]]:
    """Token ids that every conversation with one of the file's system prompts begins with.

    Args:
        path: YAML list of strings; None is no prefixes.

    Raises:
        ConfigError: the file is not such a list, or the model has no chat template.
    """
    if path is None:
        return []
    prompts = load_yaml(path, "public_prefixes")
    if not isinstance(prompts, list) or not all(isinstance(text, str) and text for text in prompts):
        raise ConfigError(f"public_prefixes: {path} must be a YAML list of system prompts")
    if template is None:
        raise ConfigError("public_prefixes: the model has no chat template; give chat_template")
    return [_common_ids(text, template) for text in prompts]


async def register_public_prefixes(engine: EngineClient, prefixes: list[list[int]]) -> None:
    """Compute each prefix once and pin it.

    Raises:
        ConfigError: a prefix does not fit the context, the pool, or the half of it that pins get.
    """
    for number, ids in enumerate(prefixes, start=1):
        request = EngineRequest(
            request_id=f"public-prefix-{number}",
            prompt_token_ids=ids,
            sampling=SamplingParams(temperature=0.0, max_tokens=1),
            pin_seconds=_PIN_SECONDS,
        )
        try:
            first = await engine.keep_public(request)
        except ChunkLlamaError as error:
            raise ConfigError(f"public_prefixes: entry {number}: {error}") from None
        if first.pin_refused:
            raise ConfigError(
                f"public_prefixes: entry {number}: pinned prompts may hold half of the chunk pool "
                "and there is no room left; give it more memory or restart without old prefixes"
            )
    if prefixes:
        logger.info("%d public prefixes, %d tokens", len(prefixes), sum(map(len, prefixes)))


def _common_ids(text: str, template: ChatTemplate) -> list[int]:
    """What two conversations that differ in the user's first character have in common."""
    first, second = (
        template.encode([{"role": "system", "content": text}, {"role": "user", "content": user}])
        for user in ("a", "1")
    )
    same = takewhile(lambda pair: pair[0] == pair[1], zip(first, second, strict=False))
    return [token for token, _ in same]
