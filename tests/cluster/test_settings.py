"""Settings of a cluster: what is refused, each in one line and before any engine starts."""

from __future__ import annotations

import sys

import pytest

from chunkllama.errors import ConfigError
from chunkllama_server.config.settings import load_settings
from chunkllama_server.process.engines import check_cluster, logger


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"cluster": "10.0.0.1"}, "write auto, or ray://HOST"),
        ({"cluster": "ray://a/b"}, "write auto, or ray://HOST"),
        ({"cluster": "auto", "replicas": "8..2"}, "replicas must be a number or LOW..HIGH"),
        ({"cluster": "auto", "replicas": "0"}, "replicas must be a number or LOW..HIGH"),
        ({"cluster": "auto", "replicas": "two"}, "replicas must be a number or LOW..HIGH"),
        ({"replicas": "3"}, "replicas: needs cluster, such as --cluster auto"),
        ({"cluster": "auto", "standby": "true"}, "standby: a cluster replaces its replicas"),
        ({"cluster": "auto", "snapshot_dir": "/x"}, "snapshot_dir: is for a server with one"),
        (
            {"cluster": "auto", "kv_events_endpoint": "tcp://127.0.0.1:5557"},
            "kv_events_endpoint: the caches of a cluster are not published",
        ),
    ],
)
def test_settings_that_do_not_go_with_a_cluster_are_refused(
    flags: dict[str, str], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        check_cluster(load_settings(flags, {}).settings)


def test_without_ray_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    monkeypatch.setitem(sys.modules, "ray.serve", None)
    for name in ("RAY_AUTH_MODE", "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "RAY_USAGE_STATS_ENABLED"):
        monkeypatch.setenv(name, "")
    with pytest.raises(ConfigError, match=r"pip install 'chunkllama\[ray\]'"):
        check_cluster(load_settings({"cluster": "auto"}, {}).settings)


@pytest.mark.parametrize(
    ("flags", "warns"),
    [
        ({}, False),
        ({"api_key": "a:k"}, True),
        ({"api_key": "a:k", "isolation": "off"}, False),
        ({"api_key": "a:k", "namespace_secret_file": "/run/secret"}, False),
    ],
)
def test_keys_without_a_shared_secret_are_a_warning(
    flags: dict[str, str],
    warns: bool,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr("chunkllama.cluster.connect.check_ray", lambda: None)
    caplog.set_level("WARNING", logger=logger.name)  # an engine's host may have raised it
    check_cluster(load_settings({"cluster": "auto", **flags}, {}).settings)
    assert ["namespace_secret_file" in line for line in caplog.messages] == [True] * warns


def test_limits_of_a_front_end_are_those_of_all_replicas() -> None:
    assert load_settings({}, {}).settings.max_engines == 1
    assert load_settings({"replicas": "4"}, {}).settings.max_engines == 1
    assert load_settings({"cluster": "auto", "replicas": "2..8"}, {}).settings.max_engines == 8
    # a number in YAML
    assert load_settings({"cluster": "auto", "replicas": 3}, {}).settings.replica_range == (3, 3)
