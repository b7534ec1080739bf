"""Prompts whose match is to be explained, one between two steps, the tenants in turn."""

from __future__ import annotations

from collections import deque

from chunkllama.messages import ExplainPrompt


class PendingExplanations:
    """Questions in the order in which they are answered.

    A long prompt takes as long as a part of a step, and no request waits for more than one of them.
    """

    def __init__(self) -> None:
        self._by_tenant: dict[str, deque[ExplainPrompt]] = {}  # the next tenant first

    def __bool__(self) -> bool:
        return bool(self._by_tenant)

    def add(self, command: ExplainPrompt) -> None:
        """Note a question."""
        self._by_tenant.setdefault(command.tenant, deque()).append(command)

    def take(self) -> list[ExplainPrompt]:
        """Return the first question of the tenant whose turn it is; [] if there is none."""
        if not self._by_tenant:
            return []
        tenant = next(iter(self._by_tenant))
        own = self._by_tenant.pop(tenant)
        command = own.popleft()
        if own:
            self._by_tenant[tenant] = own  # behind the others
        return [command]
