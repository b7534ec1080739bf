"""``chunkllama demo tenants`` against a running server, and with one of its own."""

from __future__ import annotations

import re
import socket

import pytest


def _saved(output: str) -> tuple[int, int]:
    sent, computed = re.search(r"([\d,]+) prompt tokens sent, ([\d,]+) computed", output).groups()
    return int(sent.replace(",", "")), int(computed.replace(",", ""))


def _unused_url() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{probe.getsockname()[1]}"


def test_a_running_server_is_used(chunkllama, served):
    done = chunkllama("demo", "tenants", "--url", served.url, "--requests", "3", COLUMNS="140")
    assert done.returncode == 0, done.stderr
    assert _saved(done.stdout)[0] > 0
    for name in ("Alder Bakery", "Hazel Hotel"):
        (row,) = (line for line in done.stdout.splitlines() if name in line)
        assert row.split("\u2502")[2].strip() == "3"


@pytest.mark.nightly
def test_a_server_is_started_where_none_runs(chunkllama, tiny_model):
    done = chunkllama(
        *("demo", "tenants", "--url", _unused_url(), "--requests", "3", "--model", tiny_model)
    )
    assert done.returncode == 0, done.stderr
    sent, computed = _saved(done.stdout)
    assert 0 < computed < sent / 2


def test_a_server_that_does_not_start_is_one_line(chunkllama):
    done = chunkllama("demo", "tenants", "--url", _unused_url(), "--model", "/nowhere")
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1
    assert "the server did not start" in done.stderr and "/nowhere" in done.stderr
