"""Replicas that a configuration of Ray Serve deploys, as a RayService of Kubernetes does."""

from __future__ import annotations

import importlib.util
import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import httpx
import psutil
import pytest
import yaml
from tiny_model import write_tiny_model

pytestmark = [
    pytest.mark.ray,
    pytest.mark.nightly,
    pytest.mark.skipif(
        importlib.util.find_spec("ray") is None,
        reason="Ray is not installed: pip install 'chunkllama[ray]'",
    ),
]

MANIFEST = Path(__file__).resolve().parents[2] / "deploy/kubernetes/ray.yaml"
DEPLOY = """
import json, sys, time
import ray
from ray import serve
from ray.serve.context import _get_global_client
from ray.serve.schema import ServeDeploySchema

config = ServeDeploySchema.model_validate(json.load(sys.stdin))
while not ray.is_initialized():
    try:
        ray.init("auto", log_to_driver=False)
    except ConnectionError:
        time.sleep(0.2)
serve.start(proxy_location=config.proxy_location)
_get_global_client().deploy_apps(config)
"""


def test_a_front_end_serves_with_replicas_that_the_manifest_deploys(start_server, tmp_path) -> None:
    """Of the manifest only the model and its sizes are others."""
    write_tiny_model(tmp_path, 2048)
    documents = yaml.safe_load_all(MANIFEST.read_text())
    (service,) = [each for each in documents if each["kind"] == "RayService"]
    serve = yaml.safe_load(service["spec"]["serveConfigV2"])
    model = {"model": str(tmp_path), "dtype": "float32"}
    serve["applications"][0]["args"] |= {**model, "replicas": "1", "threads": 1}
    env = {
        "RAY_TMPDIR": f"/tmp/cl-{secrets.token_hex(4)}",  # its sockets need a short path
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
    }
    server = start_server(
        *("--cluster", "auto", "--no-cluster-deploy", "--replicas", "1", "--no-batches"),
        *("--served-model-name", "tiny", "--model", str(tmp_path), "--dtype", "float32"),
        env=env,
        ready=False,
    )
    subprocess.run(
        [sys.executable, "-c", DEPLOY],
        input=json.dumps(serve),
        text=True,
        check=True,
        env={**os.environ, **env},
    )
    server.wait_ready()
    body = {"model": "tiny", "prompt": [5, 6, 7, 8], "max_tokens": 3, "ignore_eos": True}
    answer = httpx.post(f"{server.url}/v1/completions", json=body, timeout=60)
    assert answer.json()["usage"]["completion_tokens"] == 3
    assert server.metric('chunkllama_replicas{state="running"}') == 1
    below = server.descendants()
    assert server.stop(signal.SIGTERM) == 0
    _, alive = psutil.wait_procs(below, timeout=180)
    assert not alive, "processes are left"
    shutil.rmtree(env["RAY_TMPDIR"])
