"""The dashboard's page drawn by a browser from fixed data: a cluster, colours, narrow windows."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import matplotlib.image
import pytest

from chunkllama.messages import EngineStats
from chunkllama_server.api.dashboard import _PAGE

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
in_a_browser = pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium on the PATH")
LOOKS = {"light": (1280, 1), "dark": (1280, 0), "phone": (390, 1)}  # width, Blink's colour scheme
MEASURE = """<script>setInterval(() => { document.body.dataset.overflow =
  document.documentElement.scrollWidth - document.documentElement.clientWidth; }, 200);</script>"""

NODE = {"num_tokens": 64, "filled": 64, "namespace": "", "state": "referenced"}
LATENCY = {"sum": 0.5, "count": 10, "buckets": [[0.01, 2], [0.1, 9], [1.0, 10]]}
REPLICA = {
    "name": "replica-a", "state": "running", "requests_running": 3, "requests_waiting": 1,
    "chunks_referenced": 20, "chunks_private": 5, "chunks_cached": 10, "chunks_total": 100,
    "pinned_chunks": 2,
}  # fmt: skip
DATA = {
    "models": ["m"],
    "info": {"device": "cpu", "backend": "cpu", "chunk_size": 64, "num_chunks": 200},
    "view": "server",
    "stats": {
        **{name: 0 for name in EngineStats.__struct_fields__ if name not in ("tree", "tenants")},
        "chunks_total": 200, "chunks_free": 150, "chunks_referenced": 40, "chunks_cached": 10,
        "prefix_tokens_queried_total": 1000, "prefix_tokens_hit_total": 800, "engine_restarts": 2,
    },
    "latency": dict.fromkeys(("time_to_first_token", "inter_token_latency"), LATENCY),
    "sharing": {"chunks_in_use": 40, "chunks_without_sharing": 120},
    "hidden_nodes": 0,
    "tree": [
        {**NODE, "chunk_id": 1, "parent_chunk_id": -1, "depth": 0, "num_sequences": 2},
        {**NODE, "chunk_id": 2, "parent_chunk_id": 1, "depth": 1, "num_sequences": 1},
        {**NODE, "chunk_id": 3, "parent_chunk_id": 1, "depth": 1, "num_sequences": 1},
    ],
    "replicas": [REPLICA, {**REPLICA, "name": "replica-b", "state": "draining"}],
    "failovers": {"death": 4, "drain": 1},
}  # fmt: skip
EMPTY = {"data": [], "may_abort": False, "hidden": 0}


def growing(name: str) -> dict[str, object]:
    """Data of a later poll: ten more first tokens, all within the second bucket."""
    more = {"sum": 1.0, "count": 20, "buckets": [[0.01, 2], [0.1, 19], [1.0, 20]]}
    return {**DATA, "latency": {**DATA["latency"], name: more}}


@pytest.fixture
def url(request: pytest.FixtureRequest) -> Iterator[str]:
    """A server of the page and of fixed data, without the policy that forbids ``MEASURE``."""
    changes = getattr(request, "param", {})
    answers = {
        "/dashboard": (_PAGE + MEASURE).encode(),
        "/dashboard/data": json.dumps({**DATA, **changes}).encode(),
    }

    polls: list[str] = []
    later = json.dumps({**growing("time_to_first_token"), **changes}).encode()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            body = answers.get(self.path, json.dumps(EMPTY).encode())
            if self.path == "/dashboard/data":
                polls.append(self.path)
                body = later if len(polls) > 1 else body
            kind = "text/html" if self.path == "/dashboard" else "application/json"
            self.send_response(200)
            self.send_header("content-type", kind)
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/dashboard"
    server.shutdown()
    server.server_close()


def browse(url: str, folder: Path, *flags: str) -> str:
    command = [
        CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars",
        "--virtual-time-budget=3000", f"--user-data-dir={folder / 'profile'}", *flags, url,
    ]  # fmt: skip
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=90, check=True,
        env={**os.environ, "HOME": str(folder)},
    )  # fmt: skip
    return done.stdout


def cells(dom: str, table: str) -> list[list[str]]:
    (body,) = re.findall(rf'<table id="{table}">(.*?)</table>', dom)
    rows = re.findall(r"<tr>(.*?)</tr>", body)
    return [re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row) for row in rows]


@in_a_browser
def test_a_cluster_s_replicas_and_failovers_are_drawn(url: str, tmp_path: Path) -> None:
    dom = browse(url, tmp_path, "--dump-dom")
    assert '<span id="state">live</span>' in dom
    _, first, second = cells(dom, "replicas")
    assert first == ["replica-a", "running", "3", "1", "25", "10", "2", "25 %"]
    assert second[:2] == ["replica-b", "draining"]
    assert "4 after theirs ended, 0 after it hung, 1 while it drained" in dom
    assert "0 preemptions, 2 engine restarts" in dom


@in_a_browser
def test_percentiles_of_first_tokens_are_drawn_over_time(url: str, tmp_path: Path) -> None:
    dom = browse(url, tmp_path, "--dump-dom")
    (chart,) = re.findall(r'<svg id="latency".*?</svg>', dom)
    high, low = re.findall(r'<polyline points="([^"]*)"', chart)
    (top,) = {point.split(",")[1] for point in high.split()}
    (middle,) = {point.split(",")[1] for point in low.split()}
    assert float(top) == pytest.approx(6)  # the highest value drawn
    # 50 ms and 99 of 100 ms: the share of the second bucket, which begins at 10 ms
    assert (118 - float(middle)) / 112 == pytest.approx((0.01 + 0.09 * 0.5) / (0.01 + 0.09 * 0.99))
    assert '<span id="latency-note"></span>' in dom


@pytest.mark.nightly
@in_a_browser
@pytest.mark.parametrize("url", [{"replicas": None}], ids=["one-engine"], indirect=True)
def test_without_a_cluster_there_is_no_table_of_replicas(url: str, tmp_path: Path) -> None:
    dom = browse(url, tmp_path, "--dump-dom")
    assert '<span id="state">live</span>' in dom
    assert '<section class="full" id="cluster" hidden="">' in dom


@pytest.mark.nightly
@in_a_browser
@pytest.mark.parametrize("look", LOOKS)
def test_the_page_fits_light_dark_and_on_a_phone(look: str, url: str, tmp_path: Path) -> None:
    width, scheme = LOOKS[look]
    picture = tmp_path / "picture.png"
    flags = (f"--window-size={width},1600", f"--blink-settings=preferredColorScheme={scheme}")
    dom = browse(url, tmp_path, *flags, "--dump-dom")
    assert 'data-overflow="0"' in dom, "wider than the window"
    browse(url, tmp_path, *flags, f"--screenshot={picture}")
    pixels = matplotlib.image.imread(picture)
    assert pixels.shape[1] == width
    drawn = [round(255 * value) for value in pixels[2, 2, :3]]
    assert drawn == _rgb(_colours("dark" if look == "dark" else "light")["page"])
    assert len({tuple(row) for row in pixels[:, :, :3].reshape(-1, 3)[::97]}) > 10


def _colours(scheme: str) -> dict[str, str]:
    found = {}
    for name, value in re.findall(r"--(\w+): (light-dark\([^)]*\)|#\w+)", _PAGE):
        pair = re.findall(r"#\w+", value)
        found[name] = pair[-1 if scheme == "dark" else 0]
    return found


def _rgb(colour: str) -> list[int]:
    digits = colour[1:] if len(colour) == 7 else "".join(2 * c for c in colour[1:])
    return [int(digits[i : i + 2], 16) for i in (0, 2, 4)]


def _contrast(one: str, other: str) -> float:
    """The contrast ratio of two colours, by WCAG 2.1."""

    def luminance(colour: str) -> float:
        parts = [value / 255 for value in _rgb(colour)]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
        return sum(w * c for w, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))

    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_texts_have_the_contrast_of_level_aa(scheme: str) -> None:
    assert _contrast("#000", "#fff") == pytest.approx(21)
    colours = _colours(scheme)
    for text in ("ink", "dim"):
        for ground in ("page", "card"):
            assert _contrast(colours[text], colours[ground]) >= 4.5, (text, ground)
    for bar in ("referenced", "private", "cached"):
        assert _contrast("#fff", colours[bar]) >= 4.5, bar
        assert _contrast(colours["card"], colours[bar]) >= 3, bar
