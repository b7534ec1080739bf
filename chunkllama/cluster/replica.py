"""A replica on Ray Serve, which places it, watches it, replaces it and scales their number.

Serve calls the deployment; front ends call the host actor, which the deployment starts on its own
node. No request passes through Serve's proxy or its handles.
"""

from __future__ import annotations

import asyncio
import os
import signal

import ray
from ray import serve
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from chunkllama.cluster.host import BEAT_SECONDS, EngineHost
from chunkllama.logger import init_logger

logger = init_logger(__name__)

NAMESPACE = "chunkllama"
# What Ray gives an actor that asks for no processor or GPU; the engine has those of the replica.
_GPU_VARIABLE = "CUDA_VISIBLE_DEVICES"


def host_name(application: str, replica: str) -> str:
    """Name of a replica's host actor."""
    return f"{host_prefix(application)}{replica}"


def host_prefix(application: str) -> str:
    """What the names of all hosts of an application begin with."""
    return f"{application}/"


class EngineReplica:
    """A deployment of Ray Serve: starts a host, and ends with it.

    Args:
        config: of the engine, as JSON.
        hang_seconds: as in ``EngineHost``; a host that does not answer for so long is killed.
    """

    async def __init__(  # type: ignore[misc]  # Serve awaits it
        self, config: str, hang_seconds: float
    ) -> None:
        context = serve.get_replica_context()
        self._hang_seconds = hang_seconds
        visible = os.environ.get(_GPU_VARIABLE)
        node = ray.get_runtime_context().get_node_id()
        self._host = (
            ray.remote(EngineHost)
            .options(
                name=host_name(context.app_name, context.replica_id.unique_id),
                namespace=NAMESPACE,
                num_cpus=0,
                max_concurrency=1000,
                scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False),
            )
            .remote(config, hang_seconds, {} if visible is None else {_GPU_VARIABLE: visible})
        )
        self._pid: int = await self._host.pid.remote()
        await self._host.start.remote()
        self._tasks = [asyncio.create_task(self._follow()), asyncio.create_task(self._watch())]

    async def check_health(self) -> None:
        """Serve asks; the two tasks end this process when the host ends or hangs."""

    async def record_autoscaling_stats(self) -> dict[str, float]:
        """What ``scale`` reads."""
        return await self._host.load.remote()  # type: ignore[no-any-return]

    async def __del__(self) -> None:
        """Serve scales in, or replaces the replica: let its requests finish."""
        for task in self._tasks:
            task.cancel()
        await self._host.drain.remote()
        await self._host.close.remote()

    async def _follow(self) -> None:
        """End this process with the engine: Serve then starts another replica."""
        try:
            reason = await self._host.wait_end.remote()
        except Exception as error:  # Ray's many errors of an actor that has ended
            reason = type(error).__name__
        logger.error("the replica ends: %s", reason)
        await asyncio.sleep(BEAT_SECONDS / 2)  # the host's last items are on their way
        os._exit(1)

    async def _watch(self) -> None:
        """Kill a host that does not answer, also one that a signal has stopped."""
        while True:
            try:
                async with asyncio.timeout(self._hang_seconds):
                    await self._host.pid.remote()
            except TimeoutError:
                logger.error("the host did not answer for %g s: killed", self._hang_seconds)
                os.kill(self._pid, signal.SIGKILL)
                return
            await asyncio.sleep(BEAT_SECONDS)
