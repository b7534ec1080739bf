"""Notice conversations whose next prompt does not begin as their last one did.

A prompt that begins as an earlier one takes its K/V from the cache. A date in the template, or a
system message or tools that change from turn to turn, make the whole conversation be computed
again.
"""

from __future__ import annotations

import hashlib
import json
from collections import OrderedDict
from threading import Lock
from typing import Any

from prometheus_client import CollectorRegistry, Counter

Message = dict[str, Any]
_CAPACITY = 4096
# The end of a prompt opens the answer, and the next prompt may write that otherwise.
_OPENING_TOKENS = 32


class PromptHeads:
    """Remembers the heads of the latest prompts, as hashes, and counts those that change.

    Args:
        registry: where the counter is exported.
        capacity: prompts remembered.
    """

    def __init__(self, registry: CollectorRegistry, capacity: int = _CAPACITY) -> None:
        self._counter = Counter(
            "chunkllama_prompt_heads",
            "Prompts of a conversation's later turns, by whether they begin as the last one did.",
            ["head"],
            registry=registry,
        )
        for head in ("kept", "changed"):
            self._counter.labels(head)
        self._capacity = capacity
        self._heads: OrderedDict[bytes, tuple[int, bytes]] = OrderedDict()
        self._lock = Lock()

    def observe(self, namespace: str, messages: list[Message], ids: list[int]) -> bool | None:
        """Remember a prompt; any thread may call it.

        Args:
            namespace: prompts of other namespaces share no K/V.
            messages: the conversation; system messages do not tell conversations apart.
            ids: the prompt.

        Returns:
            Whether the prompt begins as that of the conversation's last turn did; None for a first
            turn, and where that is forgotten.
        """
        said = [m for m in messages if m["role"] not in ("system", "developer")]
        answers = [i for i, message in enumerate(said) if message["role"] == "assistant"]
        kept = None
        if answers and answers[-1] > 0:
            earlier = _key(namespace, said[: answers[-1]])
            with self._lock:
                known = self._heads.get(earlier)
            if known is not None:
                kept = _hash(ids[: known[0]]) == known[1]
                self._counter.labels("kept" if kept else "changed").inc()
        length = max(len(ids) - _OPENING_TOKENS, 0)
        key, head = _key(namespace, said), _hash(ids[:length])
        with self._lock:
            self._heads[key] = (length, head)
            self._heads.move_to_end(key)
            if len(self._heads) > self._capacity:
                self._heads.popitem(last=False)
        return kept


def _key(namespace: str, messages: list[Message]) -> bytes:
    shown = [[m["role"], m["content"], m.get("tool_calls")] for m in messages]
    return _digest(json.dumps([namespace, shown], ensure_ascii=True))


def _hash(ids: list[int]) -> bytes:
    return _digest(",".join(map(str, ids)))


def _digest(text: str) -> bytes:
    return hashlib.blake2b(text.encode(), digest_size=16).digest()
