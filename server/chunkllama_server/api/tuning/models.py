"""Models that jobs have made: whose they are, and whether the engine serves them."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from typing import Final

from chunkllama.engine.commands import TuningClient
from chunkllama.errors import ConfigError, EngineDeadError, InvalidRequestError
from chunkllama.logger import init_logger
from chunkllama_server.api.tuning.jobs import Job

logger = init_logger(__name__)

_RETRY_SECONDS: Final = 0.5  # while the engine restarts, or requests use a model that is withdrawn
_WITHDRAWN: Final = "\0"  # owner of a model that no key may use; no key has this name


class TunedModels:
    """Trained models of an engine.

    A name keeps an owner for as long as the process runs: the engine may answer a load after its
    model was deleted, and an adapter without an owner is one that every key may use.
    """

    def __init__(self, engine: TuningClient) -> None:
        self._engine = engine
        self._owners: dict[str, str] = {}

    def owner(self, name: str) -> str | None:
        """The tenant that a model belongs to; None: no job has made it."""
        return self._owners.get(name)

    def own(self, name: str, tenant: str) -> None:
        """Give a model to a tenant, before it is loaded."""
        self._owners[name] = tenant

    async def load(self, job: Job, name: str) -> None:
        """Load the adapter of a job, which has an owner; waits while the engine restarts.

        Raises:
            ConfigError: the adapter is refused; the line is for its owner to read.
        """
        folder = str(job.adapter.absolute())
        while True:
            try:
                await self._engine.load_adapter(name, folder)
                return
            except ConfigError as error:
                why = str(error).removeprefix(f"{folder}: ")  # owners must not learn the path
                raise ConfigError(why) from None
            except EngineDeadError:
                await asyncio.sleep(_RETRY_SECONDS)

    async def load_all(self, jobs: Iterable[Job]) -> None:
        """Load what jobs have made, after a start of the server."""
        for job in jobs:
            name = job.model
            if job.value["status"] == "succeeded" and name and name not in self._engine.adapters:
                try:
                    await self.load(job, name)
                except ConfigError as error:
                    logger.error("job %s: its model is not served: %s", job.id, error)
                if job.model is None:  # it was deleted meanwhile
                    await self.withdraw(name)

    async def unload(self, name: str) -> None:
        """Unload a model.

        Raises:
            InvalidRequestError: requests use it.
            EngineDeadError: the engine is being restarted.
        """
        if name in self._engine.adapters:
            await self._engine.unload_adapter(name)

    def disown(self, name: str) -> None:
        """Let no key use a model from now on."""
        self._owners[name] = _WITHDRAWN

    async def withdraw(self, name: str) -> None:
        """Let no key use a model from now on, and unload it behind the requests that use it."""
        self.disown(name)
        while True:
            try:
                await self.unload(name)
                return
            except (InvalidRequestError, EngineDeadError):
                await asyncio.sleep(_RETRY_SECONDS)
