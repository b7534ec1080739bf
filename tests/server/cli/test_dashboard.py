"""The dashboard's data shows a caller its own part of the tree; its page draws it in a browser."""

from __future__ import annotations

import os
import re
import shutil
import subprocess

import httpx
import pytest

from chunkllama.cache_messages import TreeNodeInfo
from chunkllama_server.api.dashboard import _sharing

SYSTEM = "You are a helpful assistant that answers in one short sentence. " * 4
CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")


def ask(served, user: str, key: str = "none", system: str = SYSTEM) -> None:
    body = {
        "model": "tiny",
        "messages": [{"role": "system", "content": system}, {"role": "user", "content": user}],
        "max_tokens": 3,
    }
    headers = {"authorization": f"Bearer {key}"}
    url = f"{served.url}/v1/chat/completions"
    httpx.post(url, json=body, headers=headers, timeout=30).raise_for_status()


def test_data_tells_counts_and_no_tokens_or_paths(served, tiny_model):
    for user in ("one", "two"):
        ask(served, user * 40)
    response = served.get("/dashboard/data")
    data = response.json()
    assert data["models"] == ["tiny"]
    assert data["stats"]["chunks_total"] == data["info"]["num_chunks"] == 64
    latency = data["latency"]["time_to_first_token"]
    assert latency["count"] >= 2 and latency["sum"] > 0
    counts = [count for _, count in latency["buckets"]]
    assert counts == sorted(counts) and counts[-1] <= latency["count"]
    nodes = {node["chunk_id"]: node for node in data["tree"]}
    shared = [n for n in nodes.values() if n["parent_chunk_id"] not in nodes]
    leaves = [n for n in nodes.values() if n["depth"] > 3]
    assert shared and leaves
    assert all(0 < n["num_tokens"] <= 64 for n in nodes.values())
    assert "helpful" not in response.text
    assert str(tiny_model) not in response.text


def test_page_is_one_file_that_talks_to_nobody_else(served):
    page = served.get("/dashboard")
    assert page.headers["content-type"].startswith("text/html")
    assert "default-src 'none'" in page.headers["content-security-policy"]
    assert not re.search(r"(src|href)\s*=|@import|https?://(?!www\.w3\.org/2000/svg)", page.text)


def test_tenants_see_their_own_part_of_the_tree(start):
    server = start("--api-key", "a:key-a", "--api-key", "b:key-b")
    for key in ("key-a", "key-b"):
        ask(server, "hello", key)
    assert server.get("/dashboard").status_code == 200
    assert server.get("/dashboard/data").status_code == 401
    seen = {}
    for key in ("key-a", "key-b"):
        headers = {"authorization": f"Bearer {key}"}
        data = server.get("/dashboard/data", headers=headers).json()
        seen[key] = {node["chunk_id"] for node in data["tree"]}
        assert data["hidden_nodes"] == 0  # of its own; others are not counted
    assert seen["key-a"] and seen["key-b"]
    assert not seen["key-a"] & seen["key-b"]


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium on the PATH")
def test_a_browser_draws_the_tree(served, tmp_path):
    for user in ("one", "two", "three"):
        ask(served, user * 40)
    command = [
        CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=4000",
        f"--user-data-dir={tmp_path}", "--dump-dom", f"{served.url}/dashboard",
    ]  # fmt: skip
    environment = {**os.environ, "HOME": str(tmp_path)}
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=90, check=False, env=environment
    )
    dom = done.stdout
    assert '<span id="state">live</span>' in dom, done.stderr[-2000:]
    assert len(re.findall(r'<rect class="chain"', dom)) >= 3
    assert '<span id="model">tiny</span>' in dom
    assert re.search(r"\d+ chunks, widest path \d+ tokens", dom)
    assert re.search(r"read from the cache [1-9]", dom)
    assert re.search(r'<table id="tenants"><tr>.*<td title="\(no key\)">\(no key\)</td>', dom)
    assert re.search(r'<table id="requests"><tr>.*<td colspan="6">none</td>', dom)
    assert "median; 99 %:" in dom


def test_history_begins_the_curves(served):
    rows: list[dict] = []
    while not rows or rows[-1]["generation_tokens_total"] == 0:
        ask(served, f"history {len(rows)}")
        rows = served.get("/dashboard/history").json()["data"]
    assert rows[-1]["chunks_total"] == 64 and rows[-1]["generation_tokens_total"] > 0
    assert [row["age_seconds"] for row in rows] == sorted(
        (row["age_seconds"] for row in rows), reverse=True
    )


def test_what_sharing_saves_is_counted_in_chunks():
    def node(chunk_id: int, sequences: int) -> TreeNodeInfo:
        return TreeNodeInfo(
            chunk_id=chunk_id, parent_chunk_id=-1, depth=0, num_tokens=64, filled=64,
            num_sequences=sequences, state="referenced", namespace="",
        )  # fmt: skip

    nodes = [node(1, 8), node(2, 8), node(3, 1), node(4, 0)]
    assert _sharing(nodes) == {"chunks_in_use": 3, "chunks_without_sharing": 17}
