"""Run requests on a core whose chunks move to and from files, and wait until all are moved."""

from __future__ import annotations

from chunkllama.engine.core import EngineCore
from chunkllama.messages import EngineRequest


def settle(core: EngineCore) -> None:
    """Wait until what was evicted is written, and check the invariants."""
    while core.is_moving_chunks():
        core.move_chunks()
    core.check_idle()
    assert core.stats().invariant_violations == 0


def run_alone(core: EngineCore, request: EngineRequest) -> tuple[list[int], int]:
    """The answer to a request alone, and how many tokens of its prompt were cached."""
    core.add(request)
    output, cached = [], -1
    while core.has_work():
        for delta in core.step():
            cached = delta.num_cached_tokens
            output += [token for choice in delta.choices for token in choice.token_ids]
    settle(core)
    return output, cached
