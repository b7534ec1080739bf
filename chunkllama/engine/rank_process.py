"""Entry point of a rank other than 0: loads its part of a model and computes what rank 0 sends."""

from __future__ import annotations

import socket
import sys
from concurrent.futures import Future
from typing import NoReturn

import msgspec
import torch

from chunkllama.config import EngineConfig
from chunkllama.engine.build import load_rank
from chunkllama.engine.child import FrameSocket, begin_child, end_process
from chunkllama.engine.ranks import (
    CopyChunk,
    RankFailed,
    RankLoaded,
    RunStep,
    ToRank,
    UsePool,
    WriteChunk,
    chunk_bytes,
    chunk_of,
    encode,
)
from chunkllama.engine.step_model import StepModel
from chunkllama.errors import ChunkLlamaError
from chunkllama.logger import configure_logging, init_logger
from chunkllama.resources import freeze_heap

logger = init_logger(__name__)

_decode = msgspec.msgpack.Decoder(ToRank).decode


def main() -> NoReturn:
    """Serve rank 0; the arguments are SOCKET_FD PARENT_PID STORE_FD RANK."""
    code = 1
    try:
        code = _run()
    except (SystemExit, BrokenPipeError):  # rank 0 has gone
        code = 0
    except BaseException:
        logger.exception("a rank has failed")
    end_process(code)


def _run() -> int:
    """Load, and serve until rank 0 closes the socket; returns the exit code."""
    descriptor, parent_pid, store, rank = map(int, sys.argv[1:])
    begin_child(parent_pid)
    sock = FrameSocket(socket.socket(fileno=descriptor))
    payload = sock.receive()
    if payload is None:
        return 0
    config = EngineConfig.model_validate_json(payload)
    # Rank 0 says what they have in common.
    level = "error" if config.log.log_level == "error" else "warning"
    configure_logging(level, config.log.log_format)
    try:
        model, group, fitting = load_rank(config, rank)
    except ChunkLlamaError as error:
        sock.send(encode(RankFailed(str(error))))
        return 2
    sock.send(encode(RankLoaded(fitting)))
    if fitting is not None:
        if (payload := sock.receive()) is None:
            return 0
        _use_pool(model, _decode(payload))
    group.join(store, Future())
    freeze_heap()
    _serve(sock, model)
    model.close()
    return 0


def _use_pool(model: StepModel, message: ToRank) -> None:
    assert isinstance(message, UsePool)
    model.replace_pool(message.num_chunks)


@torch.inference_mode()
def _serve(sock: FrameSocket, model: StepModel) -> None:
    while (payload := sock.receive()) is not None:
        message = _decode(payload)
        match message:
            case RunStep():
                model.run(message.output())
            case CopyChunk():
                sock.send(chunk_bytes(model.copy_chunk(message.chunk_id)))
            case WriteChunk():
                model.write_chunk(message.chunk_id, chunk_of(message.data, model.kv))


if __name__ == "__main__":
    main()
