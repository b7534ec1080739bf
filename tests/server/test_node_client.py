"""openai-node as its users call it; nightly, since npm fetches it."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
from fake_engine import MODEL

SCRIPT = Path(__file__).with_name("node_client.mjs")
NUM_STEPS = SCRIPT.read_text().count("await step(")
# The last that runs on node 20.
VERSION = "6"


@pytest.mark.nightly
@pytest.mark.skipif(shutil.which("npm") is None, reason="needs node and npm")
def test_openai_node(server, tmp_path):
    install = ["npm", "install", "--no-audit", "--no-fund", "--ignore-scripts", f"openai@{VERSION}"]
    subprocess.run(install, cwd=tmp_path, check=True, capture_output=True, timeout=300)
    script = shutil.copy(SCRIPT, tmp_path)
    ran = subprocess.run(
        ["node", script, f"{server.url}/v1", MODEL],
        cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert ran.stdout.count("ok ") == NUM_STEPS
