"""Loads packs while the engine serves: a thread reads and checks, the step loop inserts.

    thread    header, identity, signature ─► probe ─► chunk 0 ─► chunk 1 ─► ... (read, checksum,
                                              │          │                      rearrange)
    step loop                          recompute one   insert, copy to the pool

Nothing in the tree, the pool or the model is touched by the thread, and the loop inserts between
two steps, so that no request sees a chunk in part. A chunk whose parent was evicted meanwhile, or
is missing, is left out.
"""

from __future__ import annotations

import queue
import random
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import numpy as np
import torch

from chunkllama.cache.imports import ChunkImport
from chunkllama.cache.manager import CacheManager
from chunkllama.cache.node import encode_tokens
from chunkllama.cache_messages import LoadPack, PackInfo
from chunkllama.engine.chunk_io import TOLERANCE, ChunkIO
from chunkllama.errors import ConfigError
from chunkllama.logger import init_logger
from chunkllama.packs.document import NO_PARENT, PackDocument, Scope
from chunkllama.packs.file import Pack

logger = init_logger(__name__)

_STAGED_BYTES: Final = 64 << 20  # read ahead of the step loop
_PROBE_BYTES: Final = 256 << 20  # of the chunks above the one that is recomputed, and itself
_STEP_BYTES: Final = 8 << 20  # inserted between two steps of a busy loop
_PROBES: Final = 8  # chunks tried if the checksums of some are wrong
_PIN_SECONDS: Final = 10 * 365 * 86_400.0  # for as long as the process lives


@dataclass(slots=True, eq=False)
class _Load:
    """A pack that is being loaded.

    Attributes:
        on_end: called when it has ended.
        chunks: those that were inserted.
        is_stopped: no more chunks are to be inserted.
        dropped: tenants whose chunks are not to be inserted any more.
        probed: set when the chunk that the thread has staged was recomputed.
    """

    command: LoadPack
    on_end: Callable[[], None]
    info: PackInfo
    started: float
    chunks: ChunkImport
    is_stopped: bool = False
    dropped: set[str] = field(default_factory=set)
    probed: threading.Event = field(default_factory=threading.Event)


@dataclass(frozen=True, slots=True)
class _Chunk:
    """A chunk to insert.

    Attributes:
        arranged: its K/V; None if its checksum is wrong, or if it is not read.
        fits: it lies within the context.
    """

    load: _Load
    document: PackDocument
    index: int
    arranged: torch.Tensor | None
    fits: bool


@dataclass(frozen=True, slots=True)
class _Probe:
    """A chunk to recompute: ``above`` are the chunks before it, ``data`` its K/V, canonical."""

    load: _Load
    document: PackDocument
    index: int
    above: list[torch.Tensor]
    data: bytearray


@dataclass(frozen=True, slots=True)
class _End:
    """The end of a pack; ``refusal`` says why nothing of it is used."""

    load: _Load
    document: PackDocument | None
    refusal: str = ""


class PackLoader:
    """Inserts the chunks of packs into the tree of an engine.

    Args:
        cache: of the scheduler.
        chunk_io: reads and writes its pool.
        clock: monotonic seconds.

    Attributes:
        cache, io: as given.
    """

    def __init__(
        self,
        cache: CacheManager,
        chunk_io: ChunkIO,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.cache = cache
        self.io = chunk_io
        self._clock = clock
        self._infos: dict[str, PackInfo] = {}
        self._commands: queue.SimpleQueue[_Load | None] = queue.SimpleQueue()
        most = max(_STAGED_BYTES // chunk_io.chunk_bytes, 2)
        self._staged: queue.Queue[_Chunk | _Probe | _End] = queue.Queue(most)
        self._waiting: _Probe | None = None
        self._loads: list[_Load] = []
        self._stopped = threading.Event()
        self._thread: threading.Thread | None = None

    @property
    def is_loading(self) -> bool:
        """``turn`` has work, now or soon."""
        return bool(self._loads)

    def infos(self) -> list[PackInfo]:
        """Every pack that was to be loaded, in the order of their names."""
        return [self._infos[path] for path in sorted(self._infos)]

    def load(self, command: LoadPack, on_end: Callable[[], None] = lambda: None) -> None:
        """Begin to load a pack, unless it is being loaded; one that was is read again.

        Args:
            on_end: called by ``turn`` when it is loaded or refused.
        """
        known = self._infos.get(command.path)
        if known is not None and known.state == "loading":
            return
        info = self._infos[command.path] = PackInfo(name=Path(command.path).name)
        load = _Load(command, on_end, info, self._clock(), ChunkImport(self.cache))
        self._loads.append(load)
        self._commands.put(load)
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="load-packs", daemon=True)
            self._thread.start()

    def stop(self, path: str) -> None:
        """Insert nothing more of a file that is being loaded."""
        for load in self._loads:
            load.is_stopped |= load.command.path == path

    def drop_tenant(self, tenant: str) -> None:
        """Insert nothing more of a tenant from the files that are being loaded."""
        for load in self._loads:
            load.dropped.add(tenant)

    def close(self) -> None:
        """End the thread; what was not inserted yet is not."""
        self._stopped.set()
        self._commands.put(None)
        if self._thread is not None:
            self._thread.join()

    # -- the step loop ------------------------------------------------------------------------

    def turn(self, wait: float) -> None:
        """Insert what the thread has staged; call it between two steps.

        Args:
            wait: seconds that an idle loop may wait for something; 0: it is busy, and only a few
                chunks are inserted.
        """
        budget = _STEP_BYTES if not wait else _STAGED_BYTES
        deadline = self._clock() + wait
        while self._loads and budget > 0:
            if self._waiting is not None:
                if not self._probe(self._waiting):
                    return
                self._waiting = None
            left = deadline - self._clock()
            try:
                item = self._staged.get(timeout=left) if left > 0 else self._staged.get_nowait()
            except queue.Empty:
                return
            match item:
                case _Chunk():
                    self._insert(item)
                    budget -= item.document.model.chunk_bytes
                case _Probe():
                    self._waiting = item
                case _End():
                    self._end(item)

    def _probe(self, probe: _Probe) -> bool:
        """Recompute a chunk and compare; False: there is no room for it now."""
        cache, document = self.cache, probe.document
        missing = len(probe.above) + 1 - cache.pool.num_free
        if missing > cache.tree.num_evictable:
            return False
        peak = cache.pool.peak  # of what requests use
        if missing > 0:
            cache.tree.evict(missing)
        ids = cache.pool.allocate(len(probe.above) + 1)
        for chunk_id, arranged in zip(ids, probe.above, strict=False):
            self.io.write(chunk_id, arranged)
        tokens = document.chunks[probe.index].tokens
        difference = self.io.compare(tokens, ids, probe.data)
        for chunk_id in reversed(ids):
            cache.pool.free(chunk_id)
        cache.pool.peak = peak
        tolerance = TOLERANCE[document.model.dtype]
        if not difference <= tolerance:
            probe.load.info.reason = (
                f"chunk {probe.index} differs from what this model computes by {difference:.2g}, "
                f"more than {tolerance:g}"
            )
        probe.load.probed.set()
        return True

    def _insert(self, item: _Chunk) -> None:
        load, document, info = item.load, item.document, item.load.info
        chunk = document.chunks[item.index]
        scope = document.scopes[chunk.scope]
        namespace = _namespace(load, scope)
        if namespace is None or load.is_stopped or not item.fits:
            load.chunks.leave_out()
            info.chunks_left_out += 1
            return
        if item.arranged is None:
            load.chunks.leave_out()
            info.chunks_damaged += 1
            logger.warning("%s: chunk %d is damaged; it is computed again", info.name, item.index)
            return
        key = encode_tokens(np.array(chunk.tokens, np.int32))
        chunk_id, outcome = load.chunks.add(chunk.parent, namespace, key, scope.tenant)
        if outcome == "new":
            self.io.write(chunk_id, item.arranged)
            info.chunks_loaded += 1
        elif outcome == "present":
            info.chunks_present += 1
        else:
            info.chunks_left_out += 1

    def _end(self, end: _End) -> None:
        load, info = end.load, end.load.info
        self._loads.remove(load)
        info.seconds = self._clock() - load.started
        load.on_end()
        if end.refusal:
            info.state, info.reason = "refused", end.refusal
            logger.error("pack %s is refused: %s", info.name, end.refusal)
            return
        assert end.document is not None
        info.state = "loaded"
        self._pin(load, end.document)
        logger.info(
            "pack %s: %d of %d chunks loaded in %.1f s, %d were there, %d damaged, %d left out",
            info.name,
            info.chunks_loaded,
            info.chunks,
            info.seconds,
            info.chunks_present,
            info.chunks_damaged,
            info.chunks_left_out,
        )

    def _pin(self, load: _Load, document: PackDocument) -> None:
        for prefix in document.prefixes:
            scope = document.scopes[prefix.scope]
            namespace = _namespace(load, scope)
            if not prefix.pin or prefix.last == NO_PARENT or namespace is None:
                continue
            tokens = np.array(document.tokens(prefix.last), np.int32)
            if not self.cache.pin(tokens, namespace, _PIN_SECONDS, scope.tenant):
                logger.warning(
                    "pack %s: %s is not pinned: pins hold as many chunks as they may",
                    load.info.name,
                    prefix.name,
                )

    # -- the thread ---------------------------------------------------------------------------

    def _run(self) -> None:
        while (load := self._commands.get()) is not None:
            try:
                document = self._read(load)
                self._put(_End(load, document))
            except ConfigError as error:
                self._put(_End(load, None, str(error)))
            except Exception as error:  # the step loop gets it
                logger.exception("pack %s", load.info.name)
                self._put(_End(load, None, f"it cannot be loaded: {error!r}"))

    def _put(self, item: _Chunk | _Probe | _End) -> None:
        """Hand an item to the step loop, when it has taken enough of those before."""
        while not self._stopped.is_set():
            try:
                self._staged.put(item, timeout=0.1)
                return
            except queue.Full:
                continue

    def _read(self, load: _Load) -> PackDocument:
        """Check a pack and stage its chunks.

        Raises:
            ConfigError: it is refused.
        """
        command = load.command
        with Pack(Path(command.path)) as pack:
            if refusal := self.io.refusal(
                pack, command.template, command.public_key, command.realm
            ):
                raise ConfigError(refusal)
            document, info = pack.document, load.info
            info.is_signed = bool(command.public_key)
            info.prefixes = [prefix.name for prefix in document.prefixes]
            info.chunks, info.num_bytes = len(document.chunks), pack.num_bytes
            unknown = {scope.tenant for scope in document.scopes} - command.namespaces.keys()
            for tenant in sorted(unknown):
                logger.warning("pack %s: there is no tenant %s here", info.name, tenant)
            depths = document.depths()
            if max(depths, default=-1) >= self.io.max_path_chunks:
                logger.warning(
                    "%s has prompts longer than max_model_len; the rest of them is left out",
                    info.name,
                )
            self._stage_probe(load, pack, depths)
            for index, depth in enumerate(depths):
                fits = depth < self.io.max_path_chunks
                data = pack.read_chunk(index) if fits else None
                arranged = None if data is None else self.io.arrange(data, document.model)
                self._put(_Chunk(load, document, index, arranged, fits))
                if self._stopped.is_set():
                    break
            return document

    def _stage_probe(self, load: _Load, pack: Pack, depths: list[int]) -> None:
        """Have a random chunk recomputed; a pack with another one is not to be trusted.

        Args:
            depths: of its chunks.

        Raises:
            ConfigError: the chunk differs, or several have wrong checksums.
        """
        document = pack.document
        most = max(_PROBE_BYTES // document.model.chunk_bytes, 1)
        # Cached chunks are not evicted for it, or one at most.
        most = min(most, max(self.cache.pool.num_free, 1), self.io.max_path_chunks)
        candidates = [index for index, depth in enumerate(depths) if depth < most]
        random.SystemRandom().shuffle(candidates)
        for index in candidates[:_PROBES]:
            read = [pack.read_chunk(step) for step in document.path(index)]
            whole = [data for data in read if data is not None]
            if len(whole) < len(read):
                continue
            above = [self.io.arrange(data, document.model) for data in whole[:-1]]
            self._put(_Probe(load, document, index, above, whole[-1]))
            while not load.probed.wait(0.1):
                if self._stopped.is_set():
                    return
            if load.info.reason:
                raise ConfigError(load.info.reason)
            return
        if candidates:
            raise ConfigError("the checksums of all chunks that were looked at are wrong")


def _namespace(load: _Load, scope: Scope) -> str | None:
    """The namespace of a scope's chunks in the tree; None: its tenant is not here, or dropped."""
    command = load.command
    if scope.tenant in load.dropped:
        return None
    if command.realm:
        return scope.namespace if scope.tenant in command.namespaces else None
    return command.namespaces.get(scope.tenant)
