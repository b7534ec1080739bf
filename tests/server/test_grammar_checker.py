"""Grammars are compiled beside the event loop, and one tenant's do not hold up another's."""

from __future__ import annotations

import asyncio
import threading

from chunkllama.logger import tenant_context
from chunkllama.sampling_params import GrammarSpec
from chunkllama_server.api.common.structured_outputs import GrammarChecker
from chunkllama_server.config.limits import LimitsConfig
from chunkllama_server.transport.errors import ApiError


def test_one_tenants_grammars_do_not_hold_up_anothers() -> None:
    order: list[str] = []
    has_begun, may_go_on = threading.Event(), threading.Event()

    def validate(spec: GrammarSpec) -> None:
        order.append(spec.text)
        if spec.text == "a0":
            has_begun.set()
            assert may_go_on.wait(60)

    async def main() -> None:
        limits = LimitsConfig(grammar_seconds=60, grammar_wait_seconds=60)
        checker = GrammarChecker(lambda: validate, limits)

        async def check(tenant: str, text: str) -> None:
            tenant_context.set(tenant)
            await checker.check(GrammarSpec(kind="regex", text=text), "x")

        await asyncio.create_task(check("a", "first"))
        tasks = [asyncio.create_task(check("a", f"a{i}")) for i in range(5)]
        await asyncio.to_thread(has_begun.wait, 60)
        gone = asyncio.create_task(check("b", "gone"))
        tasks.append(asyncio.create_task(check("b", "b0")))
        async with asyncio.timeout(60):
            while len(checker._pool._queues.get("b", ())) < 2:
                await asyncio.sleep(0)
        gone.cancel()
        await asyncio.wait([gone])
        may_go_on.set()
        await asyncio.gather(*tasks)
        checker.close()

    asyncio.run(main())
    assert order == ["first", "a0", "b0", "a1", "a2", "a3", "a4"]


class HeldGrammars:
    """A checker whose grammars called "slow" end when ``may_go_on`` is set."""

    def __init__(self, grammar_wait_seconds: float) -> None:
        self.may_go_on = threading.Event()
        self.num_held = 0
        limits = LimitsConfig(grammar_seconds=0.5, grammar_wait_seconds=grammar_wait_seconds)
        self.checker = GrammarChecker(lambda: self._validate, limits)

    def _validate(self, spec: GrammarSpec) -> None:
        if spec.text.startswith("slow"):
            self.num_held += 1
            assert self.may_go_on.wait(60)

    def begin(self, tenant: str, text: str) -> asyncio.Task[str]:
        """Check a grammar; gives "compiled", or the error's code and message."""

        async def check() -> str:
            tenant_context.set(tenant)
            try:
                await self.checker.check(GrammarSpec(kind="regex", text=text), "x")
            except ApiError as error:
                return f"{error.code}: {error.message}"
            return "compiled"

        return asyncio.create_task(check())

    async def wait_held(self, count: int) -> None:
        async with asyncio.timeout(60):
            while self.num_held < count:
                await asyncio.sleep(0.001)

    async def wait_overdue(self, count: int) -> None:
        async with asyncio.timeout(60):
            while self.checker.num_overdue() != count:
                await asyncio.sleep(0.001)


LATE = "grammar_too_complex: Compiling takes longer than 0.5 s"


def test_a_grammar_without_an_end_holds_up_its_own_tenant_alone() -> None:
    async def main() -> None:
        held = HeldGrammars(grammar_wait_seconds=60)
        first = held.begin("a", "slow")
        waiting = [held.begin("a", text) for text in ("slow 2", "next")]
        assert await first == LATE
        for tenant, text, answer in (
            ("b", "b", "compiled"),
            ("c", "slow", LATE),
            ("b", "c", "compiled"),
        ):
            assert await held.begin(tenant, text) == answer
        assert held.checker.num_overdue() == 2, "one of each tenant"
        assert not any(task.done() for task in waiting)
        held.may_go_on.set()
        assert await asyncio.gather(*waiting) == ["compiled"] * 2
        await held.wait_overdue(0)
        held.checker.close()

    asyncio.run(main())


def test_overdue_grammars_are_bounded_and_named_in_refusals() -> None:
    async def main() -> None:
        held = HeldGrammars(grammar_wait_seconds=1.0)
        for number, tenant in enumerate("abc", start=1):
            left = held.begin(tenant, "slow")
            await held.wait_held(number)
            left.cancel()  # its client leaves, its thread goes on
            await held.wait_overdue(number)
        busy = "grammar_compiler_busy: The grammar compiler is busy with "
        answers = await asyncio.gather(held.begin("a", "a"), held.begin("d", "d"))
        own = "an earlier grammar of yours that takes too long"
        assert answers == [f"{busy}{own}", f"{busy}others"]
        assert held.checker.num_overdue() == 3
        held.may_go_on.set()
        await held.wait_overdue(0)
        assert await held.begin("a", "a") == await held.begin("d", "d") == "compiled"
        held.checker.close()

    asyncio.run(main())
