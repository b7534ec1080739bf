"""From an address to replicas: joins a Ray cluster, deploys the replicas, keeps channels to them.

Front ends call the hosts' actors directly; Serve keeps as many as are wanted.
"""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import hashlib
import logging
import os
import re
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar, cast

from chunkllama.cluster.channel import RayChannel
from chunkllama.cluster.client import ClusterEngineClient
from chunkllama.cluster.host import BEAT_SECONDS
from chunkllama.cluster.routing import PrefixRouting
from chunkllama.config import EngineConfig
from chunkllama.engine.client import seed_source
from chunkllama.errors import ChunkLlamaError, ConfigError
from chunkllama.logger import init_logger

if TYPE_CHECKING:
    from ray.serve import Application

logger = init_logger(__name__)
T = TypeVar("T")

APPLICATION = "chunkllama"
_DISCOVERY_SECONDS = 1.0
_LEAVE_SECONDS = 10.0
_RETRY_SECONDS = 5.0
_PORT = 6379  # of a head node
_WAIT_SECONDS = 0.25
_REPORT_SECONDS = 30.0
_AUTH_MODE = "RAY_AUTH_MODE"


@dataclass(frozen=True, kw_only=True)
class ClusterPlan:
    """What a cluster is to run.

    Attributes:
        address: "auto", or ray://HOST[:PORT] of the head node.
        deploys: this front end deploys the replicas; False: something else does.
        version: of the program; another one, or another configuration, replaces the replicas.
        min_replicas, max_replicas: equal: a fixed number.
        hang_seconds: a replica that sends nothing for this many seconds is lost.
        drain_seconds: for requests of a replica that is removed; the rest continues on others.
    """

    address: str
    deploys: bool
    version: str
    config: EngineConfig
    min_replicas: int
    max_replicas: int
    max_failovers: int
    spill_requests: int
    index_chunks: int
    hang_seconds: float
    drain_seconds: float


def first_line(error: Exception) -> str:
    """What one of Ray's errors, which have many lines, says first."""
    return str(error).strip().partition("\n")[0]


async def in_thread(call: Callable[..., T], *args: object) -> T:
    """Run a call to Ray in a thread that does not keep this process from ending.

    Without a head node such a call may not return.
    """
    loop = asyncio.get_running_loop()
    future: asyncio.Future[T] = loop.create_future()

    def end(result: T | None, error: Exception | None) -> None:
        if future.done():
            return
        if error is None:
            future.set_result(cast(T, result))
        else:
            future.set_exception(error)

    def run() -> None:
        result: T | None = None
        error: Exception | None = None
        try:
            result = call(*args)
        except Exception as raised:  # the caller's
            error = raised
        with contextlib.suppress(RuntimeError):  # the loop is closed
            loop.call_soon_threadsafe(end, result, error)

    threading.Thread(target=run, name="ray-call", daemon=True).start()
    return await future


def check_ray() -> None:
    """Check that Ray can be imported.

    Raises:
        ConfigError: it is not installed.
    """
    os.environ.setdefault(_AUTH_MODE, "token")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # Without a head node a front end goes on; Ray would end its process after a minute.
    os.environ.setdefault("RAY_gcs_rpc_server_reconnect_timeout_s", "86400")
    try:
        import ray.serve  # noqa: F401
    except ImportError:
        raise ConfigError(
            "cluster: Ray Serve is not installed; pip install 'chunkllama[ray]'"
        ) from None


def _join(address: str) -> None:
    """Connect to Ray.

    Raises:
        ConfigError: there is no cluster at the address.
    """
    import ray

    options: dict[str, Any] = {
        "namespace": APPLICATION,
        "log_to_driver": False,
        "logging_level": logging.ERROR,
    }
    try:
        if address == "auto":
            with contextlib.suppress(ConnectionError):
                ray.init("auto", **options)
                return
            ray.init(include_dashboard=False, **options)
            logger.info(
                "cluster: no Ray runs on this machine; started one, which ends with this server"
            )
            return
        head = address.removeprefix("ray://")
        head = head if re.search(r":[0-9]+$", head) else f"{head}:{_PORT}"
        ray.init(head, **options)
    except Exception as error:  # Ray's are of many types
        hint = "" if address == "auto" else f"; run ray start --address={head} here first"
        raise ConfigError(f"cluster: cannot join {address}: {first_line(error)}{hint}") from None


async def _leave() -> None:
    """End the connection to Ray, and Ray itself where it was started here."""
    import ray

    try:
        async with asyncio.timeout(_LEAVE_SECONDS):
            await in_thread(ray.shutdown)
    except TimeoutError:
        logger.warning("cluster: Ray does not answer: left without it")
        atexit.unregister(ray.shutdown)


def make_application(plan: ClusterPlan) -> Application:
    """Return the replicas as an application of Ray Serve."""
    from ray import serve

    from chunkllama.cluster.replica import EngineReplica
    from chunkllama.cluster.scaling import scale

    config = plan.config.model_dump_json()
    version = hashlib.sha256(f"{plan.version} {config}".encode()).hexdigest()[:16]
    model = plan.config.model
    scaling: dict[str, Any] = {"num_replicas": plan.min_replicas}
    if plan.max_replicas != plan.min_replicas:
        scaling = {
            "autoscaling_config": {
                "min_replicas": plan.min_replicas,
                "max_replicas": plan.max_replicas,
                "policy": {"policy_function": scale},
            }
        }
    deployment = serve.deployment(EngineReplica).options(
        name="engine",
        version=version,  # Serve's own is random, and would replace all replicas at every start
        _internal=True,
        ray_actor_options={
            "num_cpus": model.threads or 1,
            "num_gpus": model.tensor_parallel_size if model.device.startswith("cuda") else 0,
        },
        health_check_period_s=BEAT_SECONDS,
        health_check_timeout_s=max(plan.hang_seconds, BEAT_SECONDS),
        graceful_shutdown_timeout_s=plan.drain_seconds + 5,
        graceful_shutdown_wait_loop_s=0.1,
        **scaling,
    )
    return deployment.bind(config, plan.hang_seconds)


def _deploy(plan: ClusterPlan) -> None:
    """Run the replicas; those of the same settings and version that run already stay."""
    from ray import serve

    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    serve.start(proxy_location="Disabled")
    serve.run_many(
        [serve.RunTarget(make_application(plan), name=APPLICATION, route_prefix=None)],
        wait_for_applications_running=False,
    )


async def start_cluster(plan: ClusterPlan) -> ClusterEngineClient:
    """Join a cluster, deploy the replicas if the plan says so, and wait for the first one.

    Raises:
        ConfigError: Ray is not installed, there is no cluster, or no replica could start.
    """
    check_ray()
    # Ray's processes end with the thread that has started them: this one stays.
    await asyncio.to_thread(_join, plan.address)
    try:
        if plan.deploys:
            await in_thread(_deploy, plan)
    except BaseException as error:
        await _leave()
        if isinstance(error, Exception):  # Ray's are of many types
            raise ConfigError(f"cluster: cannot deploy replicas: {first_line(error)}") from None
        raise
    routing = PrefixRouting(spill=plan.spill_requests, index_chunks=plan.index_chunks)
    client = ClusterEngineClient(routing, plan.max_failovers)
    client.draw_seed = seed_source(plan.config.model.seed)
    discovery = Discovery(client, plan)
    client.on_close = discovery.close
    waited = 0.0
    try:
        while not client.replicas:
            state = await in_thread(_check_deployment)
            await asyncio.sleep(_WAIT_SECONDS)
            waited += _WAIT_SECONDS
            if waited % _REPORT_SECONDS == 0:
                logger.warning("cluster: no replica is ready after %g s: %s", waited, state)
    except BaseException:
        await client.close()
        raise
    return client


def _check_deployment() -> str:
    """Return what Serve says of the replicas.

    Raises:
        ConfigError: none can start.
    """
    from ray import serve

    found = serve.status().applications.get(APPLICATION)
    if found is None:
        return "not deployed"
    messages = [deployment.message for deployment in found.deployments.values()]
    lines = " ".join(messages or [found.message]).strip().splitlines()
    said = lines[-1] if lines else str(found.status)
    if found.status == "DEPLOY_FAILED":
        raise ConfigError(f"cluster: no replica could start: {said}")
    return said


class Discovery:
    """Looks for replicas and opens channels to them, until it is closed.

    Args:
        client: gets the replicas of the plan's model; while it is replaced, others run, too.
    """

    def __init__(self, client: ClusterEngineClient, plan: ClusterPlan) -> None:
        self._client = client
        self._plan = plan
        self._channels: dict[str, asyncio.Task[None]] = {}
        self._task = asyncio.create_task(self._run())

    async def close(self) -> None:
        """Close all channels and leave the cluster."""
        tasks = [self._task, *self._channels.values()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await _leave()

    async def _run(self) -> None:
        from chunkllama.cluster.replica import NAMESPACE, host_prefix

        prefix = host_prefix(APPLICATION)
        while True:
            try:
                actors = await in_thread(_named_actors, NAMESPACE)
            except Exception as error:  # of Ray's, which does not say which; the next may succeed
                logger.warning("cluster: replicas cannot be listed: %s", first_line(error))
                actors = list(self._channels)
            names = {name for name in actors if name.startswith(prefix)}
            self._channels = {n: task for n, task in self._channels.items() if not task.done()}
            for name in names - self._channels.keys():
                self._channels[name] = asyncio.create_task(self._use(name, NAMESPACE))
            await asyncio.sleep(_DISCOVERY_SECONDS)

    async def _use(self, name: str, namespace: str) -> None:
        """Use a replica from when it is ready until it ends."""
        import ray

        try:
            actor = await in_thread(ray.get_actor, name, namespace)
            channel = await RayChannel.open(name, actor)
            self._check_model(channel)
            await self._client.prepare(channel)
        except (ValueError, ChunkLlamaError, ray.exceptions.RayError) as error:
            logger.info("replica %s cannot be used: %s", name, first_line(error))
            await asyncio.sleep(_RETRY_SECONDS)
            return
        self._client.join(channel)
        await channel.run(self._client, self._plan.hang_seconds)

    def _check_model(self, channel: RayChannel) -> None:
        """Check that the replica serves what this front end does.

        Raises:
            ConfigError: it has another model.
        """
        info, config = channel.info, self._plan.config
        if (info.model_name, info.chunk_size) != (config.model.model, config.cache.chunk_size):
            raise ConfigError(f"it serves {info.model_name}, this front end {config.model.model}")


def _named_actors(namespace: str) -> list[str]:
    import ray

    actors = ray.util.list_named_actors(all_namespaces=True)
    return [actor["name"] for actor in actors if actor["namespace"] == namespace]
