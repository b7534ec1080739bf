"""Pins of one prompt by requests with and without adapters end, and are restored, one by one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from adapter_files import write_adapter

from chunkllama.adapter_messages import LoadAdapter
from chunkllama.cache_messages import CacheCommand
from chunkllama.engine.core import EngineCore
from chunkllama.engine.pin_records import PinRecords
from chunkllama.engine.replay import ReplayState
from chunkllama.messages import EngineRequest
from chunkllama.sampling_params import SamplingParams

MakeCore = Callable[..., EngineCore]
INVOCATION = [290, 7, 291]
PINNED = list(range(3, 103))


class Pinner:
    """An engine with a plain and an activated adapter, and the records of its pins."""

    def __init__(self, core: EngineCore, model: Path, folder: Path) -> None:
        self.core = core
        self.records = PinRecords(64)
        for name, fields in (
            ("plain", {}),
            ("activated", {"alora_invocation_tokens": INVOCATION}),
        ):
            write_adapter(folder / name, model, **fields)
            command = LoadAdapter(command_id=1, name=name, folder=str(folder / name))
            reply = core.load_adapter(command)
            while reply is None:
                core.step()
                reply = next(iter(core.adapter_replies()), None)
            assert not reply.error

    def run(self, request: EngineRequest) -> ReplayState:
        """Run a request; what it pins is recorded."""
        state = ReplayState(request)
        self.core.add(request)
        while self.core.has_work():
            for delta in self.core.step():
                state.record(delta)
        self.records.add(state)
        return state

    def pin(self, adapter: str, behind: list[int]) -> None:
        request = EngineRequest(
            request_id=f"{adapter}-{len(behind)}",
            prompt_token_ids=PINNED + behind,
            sampling=SamplingParams(temperature=0.0, seed=1, max_tokens=1),
            cache_until=len(PINNED),
            pin_seconds=600.0,
            adapter=adapter,
        )
        self.run(request)

    def pins(self) -> list[int]:
        """Chunks that pins end at."""
        reply = self.core.cache_command(CacheCommand(command_id=1, action="pins"))
        return [pin.chunk_id for pin in reply.pins]

    def drop(self, chunk_id: int) -> None:
        """End the pins at a chunk, as an operator does."""
        command = CacheCommand(command_id=2, action="drop_pin", chunk_id=chunk_id)
        reply = self.core.cache_command(command)
        assert reply.found
        for pin in reply.ended_pins:
            self.records.remove(pin)

    def kept(self) -> set[str]:
        """Adapters of the requests that another engine process gets."""
        return {request.adapter for request in self.records.requests()}


@pytest.fixture
def pinner(tiny_model: tuple[Path, torch.nn.Module], tiny_core: MakeCore, tmp_path: Path) -> Pinner:
    return Pinner(tiny_core(num_chunks=64), tiny_model[0], tmp_path)


def test_the_end_of_one_pin_leaves_that_of_another_adapter(pinner: Pinner) -> None:
    """Not active yet, the activated adapter pins the base model's chunks; the plain one its own."""
    pinner.pin("", [5, 6])
    (base,) = pinner.pins()
    pinner.pin("activated", [5, *INVOCATION, 6])
    assert pinner.pins() == [base]
    pinner.pin("plain", [5, 6])
    (plain,) = set(pinner.pins()) - {base}
    assert pinner.kept() == {"", "activated", "plain"}
    pinner.drop(base)
    assert pinner.kept() == {"plain"}
    pinner.pin("", [5, 6])
    pinner.drop(plain)
    assert pinner.kept() == {""}


def test_a_base_pin_ends_with_a_chunk_whose_end_is_under_an_adapter(pinner: Pinner) -> None:
    """The prompt of the base pin is inside a chunk that an activated adapter has filled."""
    request = EngineRequest(
        request_id="fills",
        prompt_token_ids=[*PINNED, *INVOCATION, *range(3, 30)],
        sampling=SamplingParams(temperature=0.0, seed=1, max_tokens=1),
        adapter="activated",
    )
    pinner.run(request)
    pinner.pin("", [])
    (chunk,) = pinner.pins()
    pinner.drop(chunk)
    assert pinner.kept() == set()


def test_a_restored_pin_is_where_the_first_one_was(pinner: Pinner) -> None:
    """The last invocation counts, which may be behind the pinned part or cross its end."""
    start = PINNED[:10] + INVOCATION + PINNED[10:]
    for prompt, behind in (
        (start, [*INVOCATION, 6]),
        (start + INVOCATION[:2], [*INVOCATION[2:], 6]),
        (start, [5]),
    ):
        request = EngineRequest(
            request_id=f"first-{behind}",
            prompt_token_ids=prompt + behind,
            sampling=SamplingParams(temperature=0.0, seed=1, max_tokens=1),
            cache_until=len(prompt),
            pin_seconds=600.0,
            adapter="activated",
        )
        pinner.run(request)
        pinned = set(pinner.pins())
        for again in pinner.records.requests():
            pinner.run(again)
        assert set(pinner.pins()) == pinned
