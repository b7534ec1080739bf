"""A bounded record of the prompts each tenant has sent, to explain why a match ended.

The prefix tree knows what is cached; this record knows what a tenant sent before, and what became
of it. Each tenant has a tree of its own over its recent prompts, in chunks, one per namespace that
it used. The least recently used chunks are dropped beyond ``max_chunks`` of a tenant, so no tenant
shortens the record of another. An explanation is made from the caller's record alone.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Final

from chunkllama.cache.adapter_tags import MAX_VOCABULARY, TOKEN_BITS, adapter_of
from chunkllama.cache.node import PUBLIC, TOKEN_BYTES, Node, common_prefix

MAX_TENANTS: Final = 1024
MAX_NAMESPACES: Final = 64  # of one tenant that are searched for a prompt


class Entry:
    """One chunk of prompts that a tenant has sent.

    Attributes:
        key: its tokens, encoded; fewer than a chunk's make a leaf.
        fingerprint: equal to that of tree nodes with the same tokens from the root on.
        is_stored: the tenant let its K/V be stored.
        lost: entries below it were dropped, so what is not there may have been sent.
        removed: (seconds, reason) of its chunk's first removal since the tenant last used it; None
            where the chunk is shared with other tenants and the time would reveal them.
        pin_ended: when a pin of the tenant on it ended, since the tenant last used it.
        children, keys: entries below it and their keys, sorted by these.
    """

    __slots__ = (
        "children",
        "fingerprint",
        "is_stored",
        "key",
        "keys",
        "lost",
        "namespace",
        "parent",
        "pin_ended",
        "removed",
        "tenant",
    )

    def __init__(self, tenant: str, namespace: str, parent: Entry | None, key: bytes) -> None:
        self.tenant = tenant
        self.namespace = namespace
        self.parent = parent
        self.key = key
        self.fingerprint: int = 0 if parent is None else hash((parent.fingerprint, key))
        self.children: list[Entry] = []
        self.keys: list[bytes] = []
        self.is_stored = False
        self.lost: bool = False if parent is None else parent.lost
        self.removed: tuple[float | None, str] | None = None
        self.pin_ended: float | None = None

    @property
    def num_tokens(self) -> int:
        return len(self.key) // TOKEN_BYTES

    def place(self, key: bytes) -> int:
        """Index of the first child whose key is not below ``key``."""
        return bisect_left(self.keys, key)

    def neighbours(self, key: bytes) -> list[Entry]:
        """The children just before and at (or after) ``key``; the longest overlap is there."""
        i = self.place(key)
        return self.children[max(i - 1, 0) : i + 1]


@dataclass(frozen=True, slots=True)
class Known:
    """What a tenant's record has of a prompt.

    Attributes:
        num_tokens: leading tokens that an earlier prompt of the tenant had too.
        path: entries of those tokens; the last one may match in part.
        has_branch: some earlier prompt continued after them, with other tokens.
        lost: the record may have lost a prompt that went on equally.
    """

    num_tokens: int
    path: list[Entry]
    has_branch: bool
    lost: bool


class _Record:
    """One tenant: a root per namespace, and its entries by last use."""

    def __init__(self, lost: bool) -> None:
        self.roots: OrderedDict[str, Entry] = OrderedDict()
        # every entry after all of its descendants, so that the first one is always a leaf
        self.by_use: OrderedDict[Entry, None] = OrderedDict()
        self.lost = lost


class PromptHistory:
    """Records of all tenants.

    Args:
        max_chunks: entries of one tenant; 0 records nothing.
        chunk_size: tokens of an entry.
        clock: monotonic seconds.

    Attributes:
        max_chunks, chunk_size: as given.
    """

    def __init__(self, max_chunks: int, chunk_size: int, clock: Callable[[], float]) -> None:
        self.max_chunks = max_chunks
        self.chunk_size = chunk_size
        self._width = chunk_size * TOKEN_BYTES
        self._clock = clock
        self._records: OrderedDict[str, _Record] = OrderedDict()
        self._by_fingerprint: dict[int, list[Entry]] = {}
        self._lost_tenants = False

    # -- prompts ----------------------------------------------------------------------------

    def record(self, tenant: str, namespace: str, key: bytes, num_stored: int) -> None:
        """Note a prompt that a tenant has sent, of which ``num_stored`` tokens may be stored."""
        if self.max_chunks == 0:
            return
        record = self._record_of(tenant)
        root = record.roots.get(namespace)
        if root is None:
            root = record.roots[namespace] = Entry(tenant, namespace, None, b"")
            root.lost = record.lost
        record.roots.move_to_end(namespace)
        kept = key[: self.max_chunks * self._width]
        path = self._extend(record, root, kept)
        if path and len(kept) < len(key):
            path[-1].lost = True
        end, stored = 0, num_stored * TOKEN_BYTES
        for entry in path:
            entry.removed = entry.pin_ended = None
            end += len(entry.key)  # the last one may reach beyond the prompt
            if end <= stored:
                entry.is_stored = True
        for entry in reversed(path):
            record.by_use.move_to_end(entry)
        while len(record.by_use) > self.max_chunks:
            self._drop(record, next(iter(record.by_use)))

    def _record_of(self, tenant: str) -> _Record:
        record = self._records.get(tenant)
        if record is None:
            record = self._records[tenant] = _Record(self._lost_tenants)
            if len(self._records) > MAX_TENANTS:
                self._forget(self._records.popitem(last=False)[1])
                self._lost_tenants = True
        self._records.move_to_end(tenant)
        return record

    def _extend(self, record: _Record, root: Entry, key: bytes) -> list[Entry]:
        """Return the path of ``key``, with what was missing added."""
        path: list[Entry] = []
        parent = root
        for start in range(0, len(key), self._width):
            part = key[start : start + self._width]
            at = bisect_left(parent.keys, part)
            if at < len(parent.keys) and parent.keys[at].startswith(part):
                parent = parent.children[at]  # for the last, shorter part perhaps a longer one
            else:
                parent = self._add(record, parent, part)
            path.append(parent)
        return path

    def _add(self, record: _Record, parent: Entry, key: bytes) -> Entry:
        """Add a child; it replaces a leaf that ended inside it."""
        for entry in parent.neighbours(key):
            if key.startswith(entry.key):
                self._unlink(record, entry)
        entry, at = Entry(parent.tenant, parent.namespace, parent, key), parent.place(key)
        parent.children.insert(at, entry)
        parent.keys.insert(at, key)
        record.by_use[entry] = None
        self._by_fingerprint.setdefault(entry.fingerprint, []).append(entry)
        return entry

    def _unlink(self, record: _Record, entry: Entry) -> None:
        assert entry.parent is not None and not entry.children
        at = entry.parent.place(entry.key)
        assert entry.parent.children[at] is entry
        del entry.parent.children[at], entry.parent.keys[at]
        record.by_use.pop(entry, None)
        same = self._by_fingerprint[entry.fingerprint]
        same.remove(entry)
        if not same:
            del self._by_fingerprint[entry.fingerprint]

    def _drop(self, record: _Record, entry: Entry) -> None:
        """Forget the least recently used leaf."""
        parent = entry.parent
        assert parent is not None
        self._unlink(record, entry)
        parent.lost = True
        if parent.parent is None and not parent.children:
            del record.roots[parent.namespace]
            record.lost = True

    def _forget(self, record: _Record) -> None:
        for entry in list(record.by_use):
            self._unlink(record, entry)

    def forget(self) -> None:
        """Drop all records; what tenants have sent before is not known."""
        self._records.clear()
        self._by_fingerprint.clear()
        self._lost_tenants = True

    # -- what became of them ----------------------------------------------------------------

    def removed(self, node: Node, reason: str) -> None:
        """Note that a node is about to leave the tree: evicted, or dropped by an operator."""
        for entry in self._by_fingerprint.get(node.fingerprint, ()):
            if entry.removed is None and node.namespace in (PUBLIC, entry.namespace):
                is_shared = node.namespace == PUBLIC and entry.tenant != ""
                entry.removed = (None if is_shared else self._clock(), reason)

    def pin_ended(self, node: Node, tenant: str) -> None:
        """Note that a tenant's pin of a node and its ancestors is over."""
        step: Node | None = node
        while step is not None and step.parent is not None:
            for entry in self._by_fingerprint.get(step.fingerprint, ()):
                if entry.tenant == tenant and step.namespace in (PUBLIC, entry.namespace):
                    entry.pin_ended = self._clock()
            step = step.parent

    # -- questions --------------------------------------------------------------------------

    def find(self, tenant: str, namespace: str, key: bytes) -> Known:
        """Return what the tenant's record has of a prompt in one namespace."""
        record = self._records.get(tenant)
        root = None if record is None else record.roots.get(namespace)
        if record is None or root is None:
            lost = self._lost_tenants if record is None else record.lost
            return Known(0, [], False, lost or self.max_chunks == 0)
        return self._find_below(root, key)

    def find_elsewhere(self, tenant: str, namespace: str, key: bytes) -> int:
        """Return the most leading tokens that the tenant sent in one of its other namespaces.

        Only the ``MAX_NAMESPACES`` used last are searched.
        """
        record = self._records.get(tenant)
        if record is None:
            return 0
        names = [name for name in reversed(record.roots) if name != namespace][:MAX_NAMESPACES]
        return max(
            (self._find_below(record.roots[name], key).num_tokens for name in names), default=0
        )

    def was_sent_under_another_adapter(
        self, tenant: str, namespace: str, key: bytes, known: Known
    ) -> bool:
        """Tell whether an earlier prompt went on with the same token under another adapter.

        Args:
            known: what the record has of ``key``; the token is the one after it.
        """
        record = self._records.get(tenant)
        root = None if record is None else record.roots.get(namespace)
        at = known.num_tokens * TOKEN_BYTES
        if root is None or at >= len(key):
            return False
        inside = at % self._width
        parent: Entry | None = known.path[-1] if known.path else root
        if inside and parent is not None:
            parent = parent.parent
        assert parent is not None
        above, token = key[at - inside : at], int.from_bytes(key[at : at + TOKEN_BYTES], "big")
        bits, i = token & (MAX_VOCABULARY - 1), parent.place(above)
        while i < len(parent.keys) and parent.keys[i].startswith(above):
            if len(parent.keys[i]) == inside:
                i += 1
                continue
            number = adapter_of(parent.keys[i][: inside + TOKEN_BYTES])
            wanted = above + ((number << TOKEN_BITS) | bits).to_bytes(TOKEN_BYTES, "big")
            found = parent.place(wanted)
            if found < len(parent.keys) and parent.keys[found].startswith(wanted):
                return True
            i = parent.place(above + ((number + 1) << TOKEN_BITS).to_bytes(TOKEN_BYTES, "big"))
        return False

    def _find_below(self, root: Entry, key: bytes) -> Known:
        path: list[Entry] = []
        num_tokens, parent = 0, root
        for start in range(0, len(key), self._width):
            part = key[start : start + self._width]
            best, overlap = None, 0
            for entry in parent.neighbours(part):
                tokens = common_prefix(entry.key, part)
                # of two that share as much, one whose chunk was removed says more
                if tokens > overlap or (tokens and tokens == overlap and entry.removed):
                    best, overlap = entry, tokens
            if best is None:
                break
            path.append(best)
            num_tokens += overlap
            parent = best
            if overlap * TOKEN_BYTES < self._width:
                break
        last = path[-1] if path else root
        at = num_tokens * TOKEN_BYTES
        whole = not path or (at % self._width == 0 and at // self._width == len(path))
        if whole:
            return Known(num_tokens, path, bool(last.children), last.lost)
        # inside a chunk: the tokens continue in some sibling, or end there
        inside = at % self._width
        prefix = last.key[:inside]
        above = last.parent
        assert above is not None
        has_branch = any(len(e.key) > inside for e in _with_prefix(above, prefix))
        return Known(num_tokens, path, has_branch, above.lost)

    def num_chunks(self, tenant: str) -> int:
        """Entries of a tenant."""
        record = self._records.get(tenant)
        return 0 if record is None else len(record.by_use)

    def check_invariants(self) -> None:
        """Every entry is linked once, ordered after its descendants, and within the bound."""
        linked = 0
        for record in self._records.values():
            assert len(record.by_use) <= self.max_chunks
            order = {entry: i for i, entry in enumerate(record.by_use)}
            for entry in record.by_use:
                linked += 1
                assert entry.parent is not None and entry in entry.parent.children
                assert entry in self._by_fingerprint[entry.fingerprint]
                assert not entry.children or len(entry.key) == self._width
                keys = [child.key for child in entry.children]
                assert keys == sorted(keys) == entry.keys
                assert all(order[child] < order[entry] for child in entry.children)
        assert linked == sum(map(len, self._by_fingerprint.values()))


def _with_prefix(parent: Entry, prefix: bytes) -> Iterator[Entry]:
    """Children whose tokens start with ``prefix``."""
    for i in range(parent.place(prefix), len(parent.children)):
        if not parent.children[i].key.startswith(prefix):
            return
        yield parent.children[i]
