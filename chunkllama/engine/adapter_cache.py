"""Loaded adapters of an engine, and which of their weights are in memory.

An adapter that is loaded has a name and a number; its weights are in memory while requests run that
use it and as long as their place is not needed. Weights are read in a thread and are in place
between two steps, so that no step waits for a file. A request asks for its adapter when it is its
turn to start, and is held while the weights are read. Requests that wait in the queue hold no
weights, so that a tenant's backlog does not keep other adapters out.

While a request finds no room, because running ones use every adapter in memory, no other request
with an adapter starts. So it gets its room when the running ones have ended.
"""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Protocol

from chunkllama.adapter_messages import AdapterInfo, LoadAdapter
from chunkllama.cache.adapter_tags import AdapterUse
from chunkllama.errors import ConfigError, InvalidRequestError
from chunkllama.logger import init_logger
from chunkllama.messages import CommandReply, EngineRequest
from chunkllama.models.loading.adapter_file import AdapterFile
from chunkllama.scheduler.adapter_numbers import AdapterNumbers

if TYPE_CHECKING:
    from chunkllama.backends.adapter import PreparedAdapter

logger = init_logger(__name__)

_TURN: Final = 16  # requests that are admitted at most before the weights are in place


class AdapterLoader(Protocol):
    """Reads adapters for an executor and tells it which ones are in memory."""

    def read_adapter(self, folder: Path) -> AdapterFile:
        """Check a folder; called in a thread.

        Raises:
            ConfigError: one line for the operator.
        """
        ...

    def size_of(self, file: AdapterFile) -> int:
        """Return the bytes that an adapter's weights take at least, without reading them."""
        ...

    def load_adapter(self, file: AdapterFile) -> tuple[PreparedAdapter, int]:
        """Return an adapter's weights and the bytes they take; called in a thread.

        Raises:
            ConfigError: the files have changed since they were checked.
        """
        ...

    def set_adapter(self, number: int, weights: PreparedAdapter | None) -> None:
        """Let steps use an adapter's weights by its number, or with None no longer."""
        ...


@dataclass(slots=True, eq=False)
class Adapter:
    """A loaded adapter.

    Attributes:
        requests: ids of the unfinished requests that use it.
        admitted: those of them that run, or start once its weights are in memory.
        later: those that ask again once its weights are in memory.
        reading: its weights, while they are read.
        last_use: number of its last use, for eviction.
    """

    info: AdapterInfo
    file: AdapterFile
    number: int
    requests: set[str] = field(default_factory=set)
    admitted: dict[str, None] = field(default_factory=dict)  # in order
    later: dict[str, None] = field(default_factory=dict)
    is_in_memory: bool = False
    reading: Future[tuple[PreparedAdapter, int]] | None = None
    last_use: int = 0


class AdapterCache:
    """Adapters by name.

    Args:
        loader: of the executor.
        numbers: where a loaded adapter gets its number.
        max_bytes: of the weights in memory.
    """

    def __init__(self, loader: AdapterLoader, numbers: AdapterNumbers, max_bytes: int) -> None:
        self._loader = loader
        self._numbers = numbers
        self._max_bytes = max_bytes
        self._adapters: dict[str, Adapter] = {}
        self._loads: dict[Future[tuple[AdapterFile, PreparedAdapter, int]], LoadAdapter] = {}
        self._users: dict[str, Adapter] = {}  # by id of the request
        self._next: str | None = None  # the request that waits for room
        self._behind: dict[str, None] = {}  # requests that ask again when it has its room
        self._uses = 0
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="adapter-load")

    @property
    def bytes_in_memory(self) -> int:
        """Of the weights in memory and of those being read again."""
        held = (a for a in self._adapters.values() if a.is_in_memory or a.reading is not None)
        return sum(adapter.info.num_bytes for adapter in held)

    @property
    def is_loading(self) -> bool:
        """Whether an adapter is being loaded for the first time."""
        return bool(self._loads)

    def futures(self) -> list[Future[Any]]:
        """What is being read."""
        again = [a.reading for a in self._adapters.values() if a.reading is not None]
        return [*self._loads, *again]

    # -- loading ------------------------------------------------------------------------------

    def load(self, command: LoadAdapter) -> CommandReply | None:
        """Begin to load an adapter; ``take_replies`` has the answer unless it is known already."""

        def read() -> tuple[AdapterFile, PreparedAdapter, int]:
            file = self._loader.read_adapter(Path(command.folder))
            self._check_size(command.folder, self._loader.size_of(file))
            return file, *self._loader.load_adapter(file)

        is_known = command.name in self._adapters
        if is_known or any(other.name == command.name for other in self._loads.values()):
            return _refused(command, f"adapter {command.name!r} is loaded already; unload it first")
        if self._numbers.num_free <= len(self._loads):
            return _refused(command, "too many adapters are loaded; unload one")
        self._loads[self._thread.submit(read)] = command
        return None

    def take_replies(self) -> list[CommandReply]:
        """Put adapters that have been read into place; returns an answer for each."""
        done = [future for future in self._loads if future.done()]
        return [self._loaded(self._loads.pop(future), future) for future in done]

    def _loaded(
        self, command: LoadAdapter, future: Future[tuple[AdapterFile, PreparedAdapter, int]]
    ) -> CommandReply:
        try:
            file, weights, num_bytes = future.result()
            self._check_size(command.folder, num_bytes)
        except Exception as error:
            return _refused(command, _reason(command.folder, error))
        info = AdapterInfo(
            name=command.name,
            folder=command.folder,
            rank=file.rank,
            num_bytes=num_bytes,
            is_activated=bool(file.invocation),
            digest=file.digest,
        )
        adapter = Adapter(info, file, self._numbers.assign())
        self._adapters[command.name] = adapter
        if self._make_room(num_bytes):
            self._place(adapter, weights)
        logger.info("adapter %s: rank %d, %d KiB", info.name, info.rank, num_bytes >> 10)
        return CommandReply(command_id=command.command_id, adapter=info)

    def unload(self, name: str) -> int | None:
        """Forget an adapter; returns its number, or None if there is none of this name.

        Raises:
            InvalidRequestError: requests use it.
        """
        adapter = self._adapters.get(name)
        if adapter is None:
            return None
        if adapter.requests:
            raise InvalidRequestError(
                f"adapter {name!r} is used by {len(adapter.requests)} requests; try again later"
            )
        self._evict(adapter)
        del self._adapters[name]
        return adapter.number

    # -- requests -----------------------------------------------------------------------------

    def use_of(self, name: str, prompt_token_ids: list[int]) -> AdapterUse | None:
        """Return where a prompt uses an adapter; None: nowhere, it has no invocation tokens.

        Raises:
            InvalidRequestError: no such adapter is loaded.
        """
        adapter = self._adapters.get(name)
        if adapter is None:
            raise InvalidRequestError(f"adapter {name!r} is not loaded", "model", "model_not_found")
        if not adapter.file.invocation:
            return AdapterUse(adapter.number, 0)
        start = last_occurrence(adapter.file.invocation, prompt_token_ids)
        return None if start is None else AdapterUse(adapter.number, start)

    def add(self, request: EngineRequest) -> None:
        """Note a request that uses its adapter."""
        adapter = self._adapters[request.adapter]
        adapter.requests.add(request.request_id)
        self._users[request.request_id] = adapter

    def may_start(self, request_id: str) -> bool:
        """Whether a request may start now, as far as its adapter goes.

        Otherwise it is to be held until ``poll`` names it.
        """
        adapter = self._users.get(request_id)
        if adapter is None:
            return True
        if request_id not in adapter.admitted and request_id != self._next:
            if self._next is not None:
                self._behind[request_id] = None
            elif adapter.reading is not None and len(adapter.admitted) >= _TURN:
                adapter.later[request_id] = None
            elif not self._admit(request_id, adapter):
                self._next = request_id
        return request_id in adapter.admitted and adapter.is_in_memory

    def end(self, request_id: str) -> None:
        """Note the end of a request; others are ignored."""
        adapter = self._users.pop(request_id, None)
        self._behind.pop(request_id, None)
        if request_id == self._next:
            self._next = None
        if adapter is not None:
            adapter.requests.discard(request_id)
            adapter.later.pop(request_id, None)
            if request_id in adapter.admitted:
                del adapter.admitted[request_id]
                self._touch(adapter)

    def poll(self) -> tuple[list[str], dict[str, str]]:
        """Put weights that have been read again into place.

        Returns:
            Requests that may start, and those whose adapter could not be read, with what their
            clients get.
        """
        ready: list[str] = []
        failed: dict[str, str] = {}
        for adapter in self._adapters.values():
            if adapter.reading is None or not adapter.reading.done():
                continue
            reading, adapter.reading = adapter.reading, None
            try:
                weights, _ = reading.result()
            except Exception as error:
                name = adapter.info.name
                logger.error("adapter %s: %s", name, _reason(adapter.info.folder, error))
                # Tenants get it: without the path.
                failed.update(dict.fromkeys(adapter.requests, f"adapter {name!r} cannot be read"))
                continue
            self._place(adapter, weights)
            ready += [*adapter.admitted, *adapter.later]
            adapter.later.clear()
        return [*ready, *self._end_turn()], failed

    def _end_turn(self) -> list[str]:
        """Let the request that waits for room have it, if there is some; returns who may ask."""
        if self._next is not None:
            adapter = self._users[self._next]
            if not self._admit(self._next, adapter):
                return []
            same = [each for each in self._behind if self._users[each] is adapter]
            adapter.admitted.update(dict.fromkeys(same[: _TURN - 1]))
            self._next = None
        # Those whose weights are now being read are named again when these are in place.
        behind, self._behind = self._behind, {}
        return list(behind)

    def close(self) -> None:
        """Wait for the thread."""
        self._thread.shutdown(wait=True, cancel_futures=True)

    def _admit(self, request_id: str, adapter: Adapter) -> bool:
        """Keep an adapter's weights for a request, and read them; False if they have no room."""
        if not adapter.is_in_memory and adapter.reading is None:
            if not self._make_room(adapter.info.num_bytes):
                return False
            adapter.reading = self._thread.submit(self._loader.load_adapter, adapter.file)
        adapter.admitted[request_id] = None
        self._touch(adapter)
        return True

    # -- memory -------------------------------------------------------------------------------

    def _check_size(self, folder: str, num_bytes: int) -> None:
        if num_bytes > self._max_bytes:
            raise ConfigError(
                f"{folder}: its weights take {num_bytes >> 20} MiB, adapter_memory holds "
                f"{self._max_bytes >> 20} MiB; raise adapter_memory"
            )

    def _make_room(self, num_bytes: int) -> bool:
        """Drop the weights used least recently until so many bytes fit; False if they do not."""
        idle = [a for a in self._adapters.values() if a.is_in_memory and not a.admitted]
        idle.sort(key=lambda adapter: adapter.last_use)
        free = self._max_bytes - self.bytes_in_memory
        if free + sum(adapter.info.num_bytes for adapter in idle) < num_bytes:
            return False
        for adapter in idle:
            if free >= num_bytes:
                break
            self._evict(adapter)
            free += adapter.info.num_bytes
        return True

    def _place(self, adapter: Adapter, weights: PreparedAdapter) -> None:
        adapter.is_in_memory = True
        self._touch(adapter)
        self._loader.set_adapter(adapter.number, weights)

    def _evict(self, adapter: Adapter) -> None:
        if adapter.is_in_memory:
            adapter.is_in_memory = False
            self._loader.set_adapter(adapter.number, None)

    def _touch(self, adapter: Adapter) -> None:
        self._uses += 1
        adapter.last_use = self._uses


def last_occurrence(tokens: tuple[int, ...], prompt: list[int]) -> int | None:
    """Return where ``tokens`` begin in a prompt for the last time."""
    wanted, first = list(tokens), tokens[0]
    for start in range(len(prompt) - len(wanted), -1, -1):
        if prompt[start] == first and prompt[start : start + len(wanted)] == wanted:
            return start
    return None


def _reason(folder: str, error: Exception) -> str:
    """Why an adapter cannot be read; what nothing foresaw must not end the engine."""
    if isinstance(error, ConfigError):
        return str(error)
    logger.error("an adapter cannot be read", exc_info=error)
    return f"{folder}: cannot be read: {type(error).__name__}"


def _refused(command: LoadAdapter, reason: str) -> CommandReply:
    return CommandReply(command_id=command.command_id, error=reason)
