"""The other ranks of a model that is split: child processes that do in each step what rank 0 does.

Rank 0 has the scheduler, samples, and sends what a step computes. A chunk of the pool lies in
pieces, one with each rank, under the same id.
"""

from __future__ import annotations

import os
import socket
import subprocess
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, InvalidStateError
from typing import Final

import msgspec
import numpy as np
import torch

from chunkllama.backends.adapter import AdapterRows
from chunkllama.backends.base import KVCache
from chunkllama.backends.kivi import Bytes, KiviCodec
from chunkllama.config import EngineConfig
from chunkllama.engine.child import FrameSocket, start_child
from chunkllama.engine.rank_group import RankGroup
from chunkllama.engine.step_model import StepModel
from chunkllama.errors import ConfigError, EngineDeadError
from chunkllama.scheduler.output import ScheduledSlice, SchedulerOutput

_MODULE: Final = "chunkllama.engine.rank_process"
_STOP_SECONDS: Final = 10.0


class Piece(msgspec.Struct, frozen=True, array_like=True):
    """A ``ScheduledSlice``; ids are the bytes of int32 arrays."""

    slot: int
    first_position: int
    token_ids: bytes
    chunk_ids: bytes
    shared: int


class RunStep(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """What a step computes and copies; nothing of sampling."""

    plan_version: int
    pieces: list[Piece]
    copies: list[tuple[int, int, int]]

    @classmethod
    def of(cls, output: SchedulerOutput) -> RunStep:
        pieces = [
            Piece(
                piece.slot,
                piece.first_position,
                np.asarray(piece.token_ids, np.int32).tobytes(),
                np.asarray(piece.chunk_ids, np.int32).tobytes(),
                piece.shared,
            )
            for piece in output.slices
        ]
        return cls(output.plan_version, pieces, output.copies)

    def output(self) -> SchedulerOutput:
        """The step, without anything to sample."""
        slices = [
            ScheduledSlice(
                piece.slot,
                piece.first_position,
                np.frombuffer(piece.token_ids, np.int32),
                np.frombuffer(piece.chunk_ids, np.int32),
                piece.shared,
                samples=False,
            )
            for piece in self.pieces
        ]
        return SchedulerOutput(0, slices, self.plan_version, copies=self.copies)


class CopyChunk(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """Asks for a rank's piece of a chunk; the reply is a frame of its bytes."""

    chunk_id: int


class WriteChunk(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """Stores a rank's piece of a chunk."""

    chunk_id: int
    data: bytes


class RankLoaded(msgspec.Struct, frozen=True, tag=True):
    """A rank has loaded its part of the model and joins the group, on a GPU after ``UsePool``.

    ``num_chunks`` fit its GPU; None on a CPU.
    """

    num_chunks: int | None


class UsePool(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """Gives a rank the number of chunks that all ranks have."""

    num_chunks: int


class RankFailed(msgspec.Struct, frozen=True, tag=True):
    """A rank cannot start; one line says why."""

    message: str


ToRank = RunStep | CopyChunk | WriteChunk | UsePool
encode: Final = msgspec.msgpack.Encoder().encode
_decode_start = msgspec.msgpack.Decoder(RankLoaded | RankFailed).decode


def chunk_bytes(chunk: torch.Tensor) -> bytes:
    """The bytes of a chunk as it lies in the pool."""
    return bytes(chunk.contiguous().view(torch.uint8).numpy().reshape(-1).data)


def chunk_of(data: bytes, kv: KVCache) -> torch.Tensor:
    """The chunk that ``chunk_bytes`` was made of."""
    flat = torch.frombuffer(bytearray(data), dtype=kv.stored_dtype)
    return flat.view(len(kv.layers), *kv.layers[0].shape[1:])


class Ranks:
    """The processes of ranks 1 and up, as rank 0 sees them.

    Start them from a thread that lives as long as they do: they end with it.

    Args:
        config: of the engine, with the folder of the model and the number of chunks.
        on_lost: called in a thread with the reason when a rank has ended, after which no step can
            be computed.
    """

    def __init__(self, config: EngineConfig, on_lost: Callable[[str], None]) -> None:
        self._on_lost = on_lost
        self._closing = threading.Event()
        self._lost = threading.Event()
        self._store = os.memfd_create("chunkllama-ranks", os.MFD_CLOEXEC)
        self._children: list[subprocess.Popen[bytes]] = []
        self._sockets: list[FrameSocket] = []
        payload = config.model_dump_json().encode()
        try:
            for rank in range(1, config.model.tensor_parallel_size):
                self._start(rank, payload)
        except BaseException:
            self.kill()
            raise

    def _start(self, rank: int, payload: bytes) -> None:
        ours, theirs = socket.socketpair()
        self._sockets.append(FrameSocket(ours))
        with theirs:
            descriptors = [theirs.fileno(), self._store]
            self._children.append(start_child(_MODULE, [*descriptors, rank], descriptors))
        self._send(rank, payload)

    def loaded(self) -> list[int | None]:
        """Wait until all ranks have loaded; returns the chunks that fit each.

        Raises:
            ConfigError: a rank could not start; the message is one line for the user.
        """
        fitting = []
        for rank, sock in enumerate(self._sockets, start=1):
            payload = sock.receive()
            if payload is None:
                code = self._children[rank - 1].wait()
                raise ConfigError(_ended_early(rank, code))
            reply = _decode_start(payload)
            if isinstance(reply, RankFailed):
                raise ConfigError(f"rank {rank}: {reply.message}")
            fitting.append(reply.num_chunks)
        return fitting

    def join(self, group: RankGroup) -> None:
        """Let rank 0 join the group of the ranks, which have loaded.

        Raises:
            ConfigError: a rank could not start; the message is one line for the user.
        """
        joined: Future[None] = Future()
        lost, on_lost = self._lost, self._on_lost

        def lose(reason: str) -> None:
            lost.set()
            on_lost(reason)
            group.abort()

        for rank, child in enumerate(self._children, start=1):
            arguments = (rank, child, self._closing, joined, lose)
            threading.Thread(target=_watch, args=arguments, daemon=True).start()
        try:
            group.join(self._store, joined)
        except RuntimeError as error:
            raise ConfigError(f"the ranks cannot connect: {error}") from error

    def check(self) -> None:
        """Check that all ranks run.

        Raises:
            EngineDeadError: one has ended.
        """
        if self._lost.is_set():
            raise EngineDeadError("a rank has ended")

    def tell(self, message: ToRank) -> None:
        """Send every rank the same message.

        Raises:
            EngineDeadError: a rank has ended.
        """
        payload = encode(message)
        for rank in range(1, len(self._sockets) + 1):
            self._send(rank, payload)

    def write(self, chunk_id: int, pieces: Sequence[torch.Tensor]) -> None:
        """Send each rank its piece of a chunk.

        Raises:
            EngineDeadError: a rank has ended.
        """
        for rank, piece in enumerate(pieces, start=1):
            self._send(rank, encode(WriteChunk(chunk_id, chunk_bytes(piece))))

    def replies(self) -> list[bytes]:
        """Wait for a frame of every rank.

        Raises:
            EngineDeadError: a rank has ended.
        """
        payloads = [sock.receive() for sock in self._sockets]
        found = [payload for payload in payloads if payload is not None]
        if len(found) < len(payloads):
            raise EngineDeadError("a rank has ended")
        return found

    def _send(self, rank: int, payload: bytes) -> None:
        try:
            self._sockets[rank - 1].send(payload)
        except OSError:  # a pipe that is broken, or was closed here
            raise EngineDeadError(f"rank {rank} has ended") from None

    def close(self) -> None:
        """Let the ranks end, which they do when their sockets are closed."""
        self._end()
        if self._store >= 0:
            os.close(self._store)
            self._store = -1

    def _end(self) -> None:
        self._closing.set()
        for sock in self._sockets:
            sock.close()
        for child in self._children:
            try:
                child.wait(_STOP_SECONDS)
            except subprocess.TimeoutExpired:
                child.kill()
                child.wait()

    def kill(self) -> None:
        """End the ranks at once: they may wait for each other."""
        self._closing.set()
        for child in self._children:
            child.kill()
        self._end()


def _watch(
    rank: int,
    child: subprocess.Popen[bytes],
    closing: threading.Event,
    joined: Future[None],
    on_lost: Callable[[str], None],
) -> None:
    """Wait for a rank's end; keeps nothing else of ``Ranks``, whose sockets close with it."""
    code = child.wait()
    if closing.is_set():
        return
    try:
        joined.set_exception(ConfigError(_ended_early(rank, code)))
    except InvalidStateError:  # they have joined
        on_lost(f"rank {rank} has ended (exit code {code})")


def _ended_early(rank: int, code: int) -> str:
    return f"rank {rank} ended while starting (exit code {code})"


class RankedModel(StepModel):
    """Rank 0's part of a model, and through it all of it.

    Args:
        own: rank 0's part.
        ranks: that have the others, and have joined the group.
    """

    def __init__(self, own: StepModel, ranks: Ranks) -> None:
        super().__init__(own.spec, own.model, own.attention)
        self._ranks = ranks
        self.num_ranks = own.spec.num_kv_heads // own.kv.num_kv_heads

    def run(self, output: SchedulerOutput, adapters: Sequence[AdapterRows] = ()) -> torch.Tensor:
        if not (output.slices or output.copies):
            return super().run(output, adapters)
        try:
            self._ranks.tell(RunStep.of(output))
            return super().run(output, adapters)
        except BaseException as error:
            self._ranks.kill()  # they wait for a sum that does not come
            if isinstance(error, RuntimeError):
                raise EngineDeadError(f"the ranks cannot compute a step: {error}") from error
            raise

    def check(self) -> None:
        self._ranks.check()

    def copy_chunk(self, chunk_id: int) -> torch.Tensor:
        """The pieces of a chunk [ranks, ...], each as it lies in its pool."""
        self._ranks.tell(CopyChunk(chunk_id))
        own = super().copy_chunk(chunk_id)
        return torch.stack([own, *(chunk_of(data, self.kv) for data in self._ranks.replies())])

    def write_chunk(self, chunk_id: int, arranged: torch.Tensor) -> None:
        own, *others = arranged.unbind()
        self._ranks.write(chunk_id, others)
        super().write_chunk(chunk_id, own)

    def restore_chunk(self, copied: torch.Tensor) -> torch.Tensor:
        restore = super().restore_chunk
        return torch.cat([restore(piece) for piece in copied], dim=2)  # heads

    def arrange_chunk(self, canonical: torch.Tensor) -> torch.Tensor:
        arrange = super().arrange_chunk
        pieces = canonical.chunk(self.num_ranks, dim=2)
        return torch.stack([arrange(piece.contiguous()) for piece in pieces])

    def widen_chunk(self, codec: KiviCodec, data: Bytes) -> torch.Tensor:
        return self.arrange_chunk(codec.decode(data))

    def close(self) -> None:
        super().close()
        self._ranks.close()
