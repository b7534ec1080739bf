"""Start the engine of the settings: a process of its own, or replicas in a cluster."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

from chunkllama import __version__
from chunkllama.engine.supervisor import SupervisedEngineClient
from chunkllama.errors import ConfigError
from chunkllama.logger import init_logger
from chunkllama_server.config.settings import Settings, load_settings

logger = init_logger(__name__)

if TYPE_CHECKING:
    from ray.serve import Application

    from chunkllama.cluster.client import ClusterEngineClient
    from chunkllama.cluster.connect import ClusterPlan
    from chunkllama_server.api.common.context import ServerContext

    ServedEngine = SupervisedEngineClient | ClusterEngineClient


def check_cluster(settings: Settings) -> None:
    """Check the settings of a cluster; warn of those with which its front ends share no cache.

    Raises:
        ConfigError: Ray is not installed, or a setting does not go with a cluster.
    """
    if settings.cluster is None:
        if settings.replicas != Settings.model_fields["replicas"].default:
            raise ConfigError("replicas: needs cluster, such as --cluster auto")
        if not settings.cluster_deploy:
            raise ConfigError("cluster_deploy: needs cluster, such as --cluster ray://HOST")
        return
    if settings.standby:
        raise ConfigError("standby: a cluster replaces its replicas; leave it out with cluster")
    if settings.snapshot_dir is not None:
        raise ConfigError(
            "snapshot_dir: is for a server with one engine; leave it out with cluster"
        )
    if settings.kv_events_endpoint is not None:
        raise ConfigError(
            "kv_events_endpoint: the caches of a cluster are not published; leave it out with "
            "cluster"
        )
    from chunkllama.cluster.connect import check_ray

    check_ray()
    if (
        settings.keys_by_tenant()
        and settings.isolation != "off"
        and not settings.namespace_secret_file
    ):
        logger.warning(
            "namespace_secret_file: not set; with API keys, front ends without the same file share "
            "no cached prompts"
        )


def watch_cluster(context: ServerContext, engine: ServedEngine) -> None:
    """Show a cluster's replicas in metrics and dashboard data; share rates with its front ends."""
    from chunkllama.cluster.client import ClusterEngineClient
    from chunkllama_server.metrics.cluster_series import ClusterSeries, describe

    assert isinstance(engine, ClusterEngineClient)
    context.metrics.registry.register(ClusterSeries(engine))
    context.replicas = partial(describe, engine)
    context.failovers = engine.failovers
    engine.are_isolated = context.tenants.are_isolated
    engine.take_spent = context.tenants.take_spent
    engine.on_spent = context.tenants.charge_elsewhere


async def start_engine(settings: Settings) -> ServedEngine:
    """Start the engine and wait until it is ready.

    Raises:
        ConfigError: it could not start; the message is one line for the user.
    """
    if settings.cluster is None:
        return await SupervisedEngineClient.start(
            settings.engine(), settings.engine_hang_seconds, standby=settings.standby
        )
    from chunkllama.cluster.connect import start_cluster

    return await start_cluster(_cluster_plan(settings))


def _cluster_plan(settings: Settings) -> ClusterPlan:
    from chunkllama.cluster.connect import ClusterPlan

    low, high = settings.replica_range
    return ClusterPlan(
        address=settings.cluster or "auto",
        deploys=settings.cluster_deploy,
        version=__version__,
        config=settings.engine(),
        min_replicas=low,
        max_replicas=high,
        max_failovers=settings.max_failovers,
        spill_requests=settings.spill_requests,
        index_chunks=settings.router_index_chunks,
        hang_seconds=settings.engine_hang_seconds,
        drain_seconds=settings.drain_seconds,
    )


def replica_application(given: dict[str, Any]) -> Application:
    """Build the replicas of a cluster as an application of Ray Serve.

    For configurations of Serve, such as that of a RayService, as ``import_path``; their ``args``
    are settings by name.

    Raises:
        ConfigError: an unknown setting or a bad value.
    """
    from chunkllama.cluster.connect import make_application

    return make_application(_cluster_plan(load_settings(given, {}).settings))
