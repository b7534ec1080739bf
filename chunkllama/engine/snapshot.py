"""Writes the hot part of the tree to a file while the engine serves, for the next process to load.

The step loop copies chunks of the pool between two steps, a thread rearranges and writes them. A
chunk that is evicted before its turn is left out. The file takes its place when it is whole; what a
process that was killed has left is removed by the next one. A file during whose load a process has
ended is not loaded by the next one.
"""

from __future__ import annotations

import contextlib
import math
import queue
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import torch

from chunkllama.cache.adapter_tags import adapter_of
from chunkllama.cache.manager import CacheManager
from chunkllama.cache.node import Node, decode_tokens
from chunkllama.cache_messages import KeepSnapshot, LoadPack, WriteSnapshot
from chunkllama.engine.chunk_io import ChunkIO
from chunkllama.engine.pack_loader import PackLoader
from chunkllama.logger import init_logger
from chunkllama.messages import CommandReply
from chunkllama.packs.document import FORMAT, NO_PARENT, PackDocument, PackedChunk, Scope
from chunkllama.packs.file import PackWriter, loading_mark, remove_unfinished

logger = init_logger(__name__)

_MARK_MODE: Final = 0o600
_IN_USE: Final = 1 << 62  # more than any tick of the tree
_STAGED_BYTES: Final = 32 << 20  # copied and not written yet
_STEP_BYTES: Final = 4 << 20  # copied between two steps of a busy loop
_POLL: Final = 0.002  # seconds that an idle loop waits for the thread


@dataclass(slots=True)
class _Writing:
    """A snapshot that is being written.

    Attributes:
        nodes: to write, parents before children.
        staged: (node, its copied chunk) for the thread; None is the end.
        tick: of the tree when it began.
        failure: why it cannot be written, once the thread has ended.
    """

    nodes: list[Node]
    staged: queue.Queue[tuple[Node, torch.Tensor] | None]
    tick: int
    deadline: float
    command_id: int | None
    position: int = 0
    failure: str = ""
    writer: PackWriter | None = None
    done: threading.Event = field(default_factory=threading.Event)
    cancelled: threading.Event = field(default_factory=threading.Event)


class SnapshotKeeper:
    """Loads a snapshot, and writes others: at times, on demand, never while one is loaded.

    Args:
        cache, chunk_io: of the engine.
        loader: loads the file.
        clock: monotonic seconds.
    """

    def __init__(
        self,
        cache: CacheManager,
        chunk_io: ChunkIO,
        loader: PackLoader,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._cache = cache
        self._io = chunk_io
        self._loader = loader
        self._clock = clock
        self._command: KeepSnapshot | None = None
        self._writing: _Writing | None = None
        self._written_tick = -1
        self._next = 0.0
        self._is_off = False

    @property
    def is_writing(self) -> bool:
        """``turn`` has work."""
        return self._writing is not None

    def keep(self, command: KeepSnapshot) -> None:
        """Load the file, if there is one, and keep it up to date from now on."""
        self._command = command
        self._next = self._clock() + command.seconds
        path = Path(command.path)
        try:
            remove_unfinished(path)
            exists = path.is_file()
        except OSError as error:
            self._turn_off(f"{error.strerror}")
            return
        # Hashing the weights takes longer than the snapshot at the end may.
        threading.Thread(target=self._identify, name="identify-model", daemon=True).start()
        if exists:
            self._load(command)

    def _load(self, command: KeepSnapshot) -> None:
        """Load the file, unless a process has ended while it did so."""
        mark = loading_mark(Path(command.path))
        if mark.exists():
            logger.warning(
                "%s is not loaded: an engine process has ended while it loaded it", command.path
            )
            return
        with contextlib.suppress(OSError):  # the disk is full, perhaps
            mark.touch(_MARK_MODE)
        self._loader.load(
            LoadPack(
                path=command.path,
                namespaces=dict.fromkeys(command.tenants, ""),
                template=command.template,
                realm=command.realm,
            ),
            lambda: _remove_mark(command),
        )

    def forget(self, tenant: str | None = None) -> None:
        """Remove the file: an operator has dropped something that is in it.

        Args:
            tenant: that was dropped: packs that are being loaded go on without it.
        """
        if tenant is not None:
            self._loader.drop_tenant(tenant)
        if self._command is None:
            return
        if self._writing is not None:
            self._writing.cancelled.set()
        self._written_tick = -1
        self._loader.stop(self._command.path)
        try:
            Path(self._command.path).unlink(missing_ok=True)
        except OSError as error:
            logger.error("the snapshot with dropped chunks cannot be removed: %s", error)

    def write(self, command: WriteSnapshot) -> list[CommandReply]:
        """Write a snapshot now; returns the reply if there is nothing to write."""
        if self._writing is not None:  # it holds what was hot a moment ago
            self._writing.command_id = command.command_id
            self._writing.deadline = self._clock() + command.seconds
            return []
        if not self._begin(command.seconds, command.command_id):
            return [CommandReply(command_id=command.command_id, found=False)]
        return []

    def turn(self, *, is_busy: bool) -> list[CommandReply]:
        """Begin a snapshot that is due, or go on with it; call it between two steps."""
        writing = self._writing
        if writing is None:
            command = self._command
            if command is not None and command.seconds and self._clock() >= self._next:
                self._begin(math.inf, None)
            return []
        self._copy(writing, _STEP_BYTES if is_busy else _STAGED_BYTES)
        if not writing.done.wait(0 if is_busy else _POLL):
            return []
        return self._end(writing)

    def close(self) -> None:
        """End the thread; a snapshot that is being written is discarded."""
        if self._writing is not None:
            self._writing.cancelled.set()
            self._writing.done.wait()
            self._end(self._writing)

    def _begin(self, seconds: float, command_id: int | None) -> bool:
        """Choose what to write, and start the thread; False: there is nothing to do."""
        command = self._command
        if command is None or self._is_off or self._loader.is_loading:
            return False
        now = self._clock()
        self._next = now + command.seconds
        if (tick := self._cache.tree.tick) == self._written_tick:
            return False
        nodes = self._hot_nodes(command.max_bytes // self._io.chunk_bytes)
        if not nodes:
            return False
        staged: queue.Queue[tuple[Node, torch.Tensor] | None] = queue.Queue()
        self._writing = _Writing(nodes, staged, tick, now + seconds, command_id)
        threading.Thread(
            target=self._run,
            args=(self._writing, command),
            name="write-snapshot",
            daemon=True,
        ).start()
        return True

    def _hot_nodes(self, most: int) -> list[Node]:
        """Whole computed chunks, those in use and last used first, each after those above it.

        Those of adapters are left out: the next process may number other ones. So are those that
        the tier has rounded, and what was computed behind them.
        """
        size = self._cache.chunk_size
        inexact: set[Node | None] = set()
        whole: list[Node] = []
        for node in self._cache.tree.nodes():
            if node.bits or node.parent in inexact:
                inexact.add(node)
            elif node.filled == size and not adapter_of(node.key):
                whole.append(node)
        # The loop waits for this: a number to sort by, no generator for a path.
        whole.sort(key=lambda node: (0 if node.is_evictable else _IN_USE) + node.last_use)
        chosen: dict[Node, None] = {}
        for node in reversed(whole):
            path: list[Node] = []
            step = node
            while step not in chosen and step.parent is not None:
                path.append(step)
                step = step.parent
            if len(chosen) + len(path) > most:
                break
            for step in reversed(path):
                chosen[step] = None
        return list(chosen)

    def _copy(self, writing: _Writing, budget: int) -> None:
        """Hand chunks to the thread, as many as the budget and its backlog allow."""
        size = self._io.chunk_bytes
        if writing.position > len(writing.nodes):
            return
        while writing.position < len(writing.nodes) and not writing.cancelled.is_set():
            if self._clock() >= writing.deadline:
                break
            if budget <= 0 or writing.staged.qsize() * size >= _STAGED_BYTES:
                return
            node = writing.nodes[writing.position]
            writing.position += 1
            if node.chunk_id >= 0:
                writing.staged.put((node, self._io.copy(node.chunk_id)))
                budget -= size
        writing.position = len(writing.nodes) + 1
        writing.staged.put(None)

    def _end(self, writing: _Writing) -> list[CommandReply]:
        self._writing = None
        is_there = False
        if writing.failure and not writing.cancelled.is_set():
            self._turn_off(writing.failure)
        elif writing.writer is not None and not writing.cancelled.is_set():
            assert self._command is not None
            try:
                writing.writer.publish()
                _remove_mark(self._command)
                is_there = True
                self._written_tick = writing.tick
            except OSError as error:
                self._turn_off(str(error.strerror))
        if writing.writer is not None and not is_there:
            writing.writer.discard()
        if self._command is not None:
            self._next = self._clock() + self._command.seconds
        if writing.command_id is None:
            return []
        return [CommandReply(command_id=writing.command_id, found=is_there)]

    def _turn_off(self, reason: str) -> None:
        if not self._is_off:
            logger.warning("snapshots are off until the next start: %s", reason)
        self._is_off = True

    # -- the thread ---------------------------------------------------------------------------

    def _identify(self) -> None:
        with contextlib.suppress(Exception):  # the next snapshot meets it again, and reports it
            self._io.identify()

    def _run(self, writing: _Writing, command: KeepSnapshot) -> None:
        try:
            self._write(writing, command)
        except OSError as error:
            writing.failure = f"{command.path}: {error.strerror}"
        except Exception as error:  # the step loop gets it
            logger.exception("a snapshot cannot be written")
            writing.failure = repr(error)
        writing.done.set()

    def _write(self, writing: _Writing, command: KeepSnapshot) -> None:
        model = self._io.identify()
        scopes: dict[Scope, int] = {}

        def describe(node: Node, numbers: dict[Node, int], sha256: str) -> PackedChunk:
            parent = NO_PARENT if node.depth == 0 else numbers[node.parent]  # type: ignore[index]
            scope = scopes.setdefault(Scope(node.owner, node.namespace), len(scopes))
            return PackedChunk(parent, scope, decode_tokens(node.key), sha256)

        def document(chunks: list[PackedChunk]) -> PackDocument:
            return PackDocument(
                FORMAT, model, command.template, command.realm, list(scopes), [], chunks
            )

        # All that may be written, for the room of its header.
        numbers = {node: number for number, node in enumerate(writing.nodes)}
        planned = [describe(node, numbers, "") for node in writing.nodes]
        writer = PackWriter(Path(command.path), document(planned))
        writing.writer = writer
        numbers, chunks = {}, []
        while (item := self._next_item(writing)) is not None:
            node, copied = item
            if node.depth == 0 or node.parent in numbers:  # not if that one was evicted
                chunks.append(describe(node, numbers, writer.add(self._io.restore(copied))))
                numbers[node] = len(numbers)
        if not writing.cancelled.is_set():
            writer.finish(document(chunks))

    def _next_item(self, writing: _Writing) -> tuple[Node, torch.Tensor] | None:
        while not writing.cancelled.is_set():
            try:
                return writing.staged.get(timeout=0.1)
            except queue.Empty:
                continue
        return None


def _remove_mark(command: KeepSnapshot) -> None:
    """Let the next process load the file that is there now."""
    with contextlib.suppress(OSError):
        loading_mark(Path(command.path)).unlink(missing_ok=True)
