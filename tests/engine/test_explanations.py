"""Questions about the cache, beside requests: one between two steps, the tenants in turn."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

from chunkllama.engine.core import EngineCore
from chunkllama.engine.loop import run_engine_loop
from chunkllama.messages import (
    CommandReply,
    EngineRequest,
    ExplainPrompt,
    FromEngine,
    Shutdown,
    ToEngine,
    TokenDelta,
)
from chunkllama.sampling_params import SamplingParams

PROMPT = [5, 6, 7, 8]


class Inbox:
    """A channel whose messages come in the loop's first call; it ends when all is answered."""

    def __init__(self, messages: list[ToEngine], num_answers: int) -> None:
        self.messages, self.num_answers = messages, num_answers
        self.sent: list[list[FromEngine]] = []

    def receive(self, seconds: float | None) -> list[ToEngine]:
        messages, self.messages = self.messages, []
        answers = [each for turn in self.sent for each in turn if isinstance(each, CommandReply)]
        is_over = len(answers) == self.num_answers
        assert messages or is_over or seconds == 0.0, "it waits though questions are left"
        return [Shutdown()] if is_over else messages

    def send(self, messages: list[FromEngine]) -> None:
        self.sent.append(messages)


def questions(tenant: str, first: int, count: int) -> list[ToEngine]:
    return [
        ExplainPrompt(command_id=first + i, prompt_token_ids=PROMPT, tenant=tenant)
        for i in range(count)
    ]


def test_a_flood_of_questions_delays_no_token_and_no_other_tenants_question(
    tiny_core: Callable[..., EngineCore],
) -> None:
    core = tiny_core(num_chunks=8)
    sampling = SamplingParams(max_tokens=5, ignore_eos=True, seed=1)
    request = EngineRequest(request_id="r", prompt_token_ids=PROMPT, sampling=sampling)
    inbox = Inbox([*questions("a", 0, 40), *questions("b", 100, 2), request], 42)
    run_engine_loop(core, inbox)
    _, *turns = inbox.sent
    tokens = [sum(isinstance(each, TokenDelta) for each in turn) for turn in turns]
    assert tokens[:6] == [1, 1, 1, 1, 1, 0], "a token in each turn"
    answers = [[e.command_id for e in turn if isinstance(e, CommandReply)] for turn in turns]
    assert set(map(len, answers)) == {1}
    assert [each[0] for each in answers[:6]] == [0, 100, 1, 101, 2, 3]
    assert Counter(each for turn in answers for each in turn) == Counter([*range(40), 100, 101])
    core.close()
