"""The step journal: what an engine process was computing when it ended.

Shared memory without a name, inherited by the engine process: it survives a SIGKILL, and no file
is left when both processes are gone.

    0   u64  turns of the step loop; one that stands still is a hang
    8   u64  steps committed
    16  u32  length of the payload; 0 while no step runs
    20  msgpack list of the ids of the requests in the running step
"""

from __future__ import annotations

import mmap
import os
import struct

import msgspec

_SIZE = 4 << 20  # 1,024 sequences with ids of 4 KiB; pages that are not written take no memory
_COUNTER = struct.Struct("<Q")
_LENGTH = struct.Struct("<I")
_TURNS, _STEPS, _PAYLOAD_LENGTH, _PAYLOAD = 0, 8, 16, 20
_ENCODER = msgspec.msgpack.Encoder()
_DECODER = msgspec.msgpack.Decoder(list[str])


class StepJournal:
    """One engine process writes it, its parent reads it.

    Args:
        descriptor: an inherited memory file; None makes one.
    """

    def __init__(self, descriptor: int | None = None) -> None:
        if descriptor is None:
            descriptor = os.memfd_create("chunkllama-journal", os.MFD_CLOEXEC)
            os.ftruncate(descriptor, _SIZE)
        self._descriptor = descriptor
        try:
            self._map = mmap.mmap(descriptor, _SIZE)  # which duplicates the descriptor
        except OSError:
            os.close(descriptor)
            raise
        self._written_turns, self._written_steps = self.turns, self.steps

    def fileno(self) -> int:
        return self._descriptor

    def close(self) -> None:
        self._map.close()
        os.close(self._descriptor)

    # -- written by the engine --------------------------------------------------------------

    def turn(self) -> None:
        """The step loop has come round."""
        self._written_turns += 1
        _COUNTER.pack_into(self._map, _TURNS, self._written_turns)

    def begin_step(self, request_ids: list[str]) -> None:
        """A step with these requests is about to be executed."""
        payload = _ENCODER.encode(request_ids)
        if len(payload) > _SIZE - _PAYLOAD:  # not written: a crash is then counted against none
            return
        self._map[_PAYLOAD : _PAYLOAD + len(payload)] = payload
        _LENGTH.pack_into(self._map, _PAYLOAD_LENGTH, len(payload))

    def end_step(self) -> None:
        """The step has been committed."""
        _LENGTH.pack_into(self._map, _PAYLOAD_LENGTH, 0)
        self._written_steps += 1
        _COUNTER.pack_into(self._map, _STEPS, self._written_steps)

    # -- read by its parent -----------------------------------------------------------------

    @property
    def turns(self) -> int:
        """Turns of the step loop so far."""
        return int(_COUNTER.unpack_from(self._map, _TURNS)[0])

    @property
    def steps(self) -> int:
        """Steps committed so far."""
        return int(_COUNTER.unpack_from(self._map, _STEPS)[0])

    def running_requests(self) -> list[str]:
        """Ids of the requests in the step that was begun and not committed."""
        (length,) = _LENGTH.unpack_from(self._map, _PAYLOAD_LENGTH)
        return _DECODER.decode(self._map[_PAYLOAD : _PAYLOAD + length]) if length else []
