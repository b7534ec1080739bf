"""Several streams of one request are read together."""

from __future__ import annotations

import asyncio

import pytest

from chunkllama.text.output_processor import OutputDelta
from chunkllama_server.api.common.merged import MAX_AT_ONCE, Pieces, merged

STEPS = 3


class Steps:
    """Streams that each yield a piece when a step ends."""

    def __init__(self) -> None:
        self.ended = [asyncio.Event() for _ in range(STEPS)]

    async def stream(self, fails_at: int = STEPS) -> Pieces:
        for number, ended in enumerate(self.ended):
            await ended.wait()
            if number == fails_at:
                raise ValueError("a stream failed")
            yield [OutputDelta(0, text=str(number))]


def batches_of(num_streams: int, fails_at: int = STEPS) -> list[list[tuple[int, str]]]:
    """What is read after each step, as (stream, text)."""

    async def main() -> list[list[tuple[int, str]]]:
        steps, read = Steps(), []
        streams = [steps.stream(fails_at if not n else STEPS) for n in range(num_streams)]
        steps.ended[0].set()
        async for batch in merged(streams):
            read.append([(number, pieces[0].text) for number, pieces in batch])
            for ended in steps.ended:
                if not ended.is_set():
                    ended.set()
                    break
        return read

    return asyncio.run(main())


@pytest.mark.parametrize("num_streams", [1, 2, 7, MAX_AT_ONCE])
def test_what_one_step_brings_is_read_at_once(num_streams: int) -> None:
    read = batches_of(num_streams)
    assert [sorted(batch) for batch in read] == [
        [(stream, str(step)) for stream in range(num_streams)] for step in range(STEPS)
    ]


def test_more_streams_than_run_at_once_are_all_read() -> None:
    read = batches_of(2 * MAX_AT_ONCE + 5)
    assert sum(map(len, read)) == STEPS * (2 * MAX_AT_ONCE + 5)
    assert len(read) < STEPS * MAX_AT_ONCE


def test_one_streams_error_ends_all() -> None:
    with pytest.raises(ValueError, match="a stream failed"):
        batches_of(5, fails_at=1)
