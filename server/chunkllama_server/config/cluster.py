"""Settings of a cluster of replicas."""

from __future__ import annotations

import re
from typing import Annotated

from pydantic import BeforeValidator, Field, field_validator, model_validator

from chunkllama.config import ConfigGroup

_ADDRESS = re.compile(
    r"auto|ray://[A-Za-z0-9.\-]+(:[0-9]{1,5})?|ray://\[[0-9A-Fa-f:]+\](:[0-9]{1,5})?"
)
_RANGE = re.compile(r"([0-9]{1,4})(?:\.\.([0-9]{1,4}))?")


class ClusterConfig(ConfigGroup):
    """Several engines, on this machine or on others, behind one server or several."""

    cluster: str | None = Field(
        default=None,
        description="Run engines as replicas on Ray Serve: auto is the Ray cluster of this "
        "machine, or one that this server starts and ends; ray://HOST[:PORT] is the cluster of "
        "that head node. Needs the extra chunkllama[ray]. Default: one engine, without Ray.",
    )
    replicas: Annotated[str, BeforeValidator(str)] = Field(  # a number in YAML
        default="2",
        description="Engines of the cluster: a number, or LOW..HIGH, within which their number "
        "follows the load.",
    )
    cluster_deploy: bool = Field(
        default=True,
        description="Deploy the replicas; off: wait for those that something else deploys, such as "
        "a RayService of Kubernetes.",
    )
    spill_requests: int = Field(
        default=8,
        ge=1,
        description="Requests that a replica may have more than the idlest one; beyond that, it "
        "gets no more of those whose prefix it has cached.",
    )
    max_failovers: int = Field(
        default=2,
        ge=0,
        le=10,
        description="Replicas that may end under one request, which continues on another; one "
        "more fails it.",
    )
    router_index_chunks: int = Field(
        default=262_144,
        ge=1024,
        description="Prefixes that a server of a cluster remembers the replicas of.",
    )

    @field_validator("cluster")
    @classmethod
    def _check_address(cls, value: str | None) -> str | None:
        if value is not None and not _ADDRESS.fullmatch(value):
            raise ValueError("write auto, or ray://HOST or ray://HOST:PORT of the head node")
        return value

    @model_validator(mode="after")
    def _check_replicas(self) -> ClusterConfig:
        low, high = self.replica_range
        if not 1 <= low <= high <= 1000:
            raise ValueError(
                f"replicas must be a number or LOW..HIGH in 1..1000, got {self.replicas}"
            )
        return self

    @property
    def replica_range(self) -> tuple[int, int]:
        """Least and highest number of replicas; (0, 0) if they cannot be read."""
        match = _RANGE.fullmatch(self.replicas)
        if match is None:
            return 0, 0
        return int(match[1]), int(match[2] or match[1])

    @property
    def max_engines(self) -> int:
        """Engines behind this server at most."""
        return 1 if self.cluster is None else self.replica_range[1]
