"""Drive a CacheManager with strings for token lists, and draw its tree."""

from __future__ import annotations

from textwrap import dedent

import numpy as np

from chunkllama.cache.manager import CacheManager
from chunkllama.cache.node import Node, encode_tokens
from chunkllama.cache.sequence_chunks import SequenceChunks

PUBLIC_LIMIT = 2**62


def ids(text: str) -> np.ndarray:
    return np.array([ord(letter) for letter in text], np.int32)


class Text:
    """A live sequence whose tokens are letters."""

    def __init__(self, driver: CacheDriver, text: str, chunks: SequenceChunks, cached: int) -> None:
        self.driver, self.text, self.chunks = driver, text, chunks
        self.num_cached = self.num_computed = cached

    def schedule(self, count: int | None = None) -> None:
        """The step being put together computes ``count`` more letters (all, if None)."""
        self._end = len(self.text) if count is None else self.num_computed + count
        self.driver.cache.will_compute(self.chunks, self.num_computed, self._end)

    def commit(self) -> bool:
        """The step has run; True if an equal chunk was adopted."""
        cache = self.driver.cache
        cache.end_step()
        cache.did_compute(self.chunks, self.num_computed, self._end)
        self.num_computed = self._end
        return cache.publish(self.chunks, ids(self.text), self.num_computed)

    def compute(self, count: int | None = None) -> bool:
        self.schedule(count)
        return self.commit()

    def write(self, text: str) -> bool:
        """Decode these letters; True if an equal chunk was adopted on the way."""
        adopted = False
        for letter in text:
            self.text += letter
            if len(self.text) > len(self.chunks) * self.driver.cache.chunk_size:
                assert self.driver.cache.grow(self.chunks, 1, 0)
            self._end = len(self.text)
            adopted |= self.commit()
        return adopted

    def release(self) -> None:
        self.driver.live.remove(self)
        self.driver.cache.release(self.chunks, ids(self.text), self.num_computed)

    @property
    def chunk_ids(self) -> list[int]:
        return self.chunks.ids.tolist()


class CacheDriver:
    """A cache with chunks of four letters and a clock that stands still unless told."""

    def __init__(self, num_chunks: int = 16, chunk_size: int = 4, reach: int | None = None) -> None:
        self.now = 0.0
        self.cache = CacheManager(num_chunks, chunk_size, lambda: self.now, reach=reach)
        self.live: list[Text] = []

    def match(self, text: str, namespace: str = "", limit: int | None = None):
        most = len(text) - 1 if limit is None else limit
        return self.cache.match(encode_tokens(ids(text)), most, namespace)

    def start(
        self,
        text: str,
        namespace: str = "",
        *,
        insert_limit: int = PUBLIC_LIMIT,
        option: int = 0,
        tenant: str = "",
    ) -> Text:
        """Admit a sequence; nothing of it is computed yet."""
        match = self.match(text, namespace)
        num_chunks = -(-len(text) // self.cache.chunk_size)
        admission = list(self.cache.admissions(match, num_chunks, namespace))[option]
        key = encode_tokens(ids(text))
        chunks = self.cache.admit(admission, key, namespace, insert_limit, tenant)
        live = Text(self, text, chunks, admission.match.num_tokens)
        self.live.append(live)
        return live

    def store(self, text: str, namespace: str = "", tenant: str = "") -> None:
        """Compute a text and release it."""
        live = self.start(text, namespace, tenant=tenant)
        live.compute()
        live.release()

    def check(self, *, in_step: bool = False) -> None:
        self.cache.check_invariants([live.chunks for live in self.live], in_step=in_step)

    def tree(self) -> str:
        """One line a node: letters, chunk, and what is not ordinary about it."""
        lines: list[str] = []

        def walk(node: Node) -> None:
            for namespace in sorted(node.children):
                for child in node.children[namespace]:
                    lines.append("  " * child.depth + _describe(child))
                    walk(child)

        walk(self.cache.tree.root(""))
        return "\n".join(lines)

    def assert_tree(self, drawing: str) -> None:
        self.check()
        assert self.tree() == dedent(drawing).strip("\n").rstrip()


def _describe(node: Node) -> str:
    letters = "".join(
        chr(int.from_bytes(node.key[i : i + 4], "big")) for i in range(0, len(node.key), 4)
    )
    parts = [letters, f"#{node.chunk_id}"]
    if node.num_sequences:
        parts.append(f"x{node.num_sequences}")
    if node.filled < node.num_tokens:
        parts.append(f"{node.filled}/{node.num_tokens}")
    if node.namespace:
        parts.append(f"@{node.namespace}")
    if node.num_pins:
        parts.append("pinned")
    return " ".join(parts)
