"""Odd values in every protocol's requests to a real server: refused by name or answered."""

from __future__ import annotations

import httpx
import pytest
from odd_requests import odd_requests


@pytest.mark.parametrize("every", [11, pytest.param(1, marks=pytest.mark.nightly)])
def test_S34_odd_requests_are_refused_or_answered(tiny_server, every: int) -> None:
    chosen = list(odd_requests())[::every]
    assert len(chosen) > 300 / every
    headers = {"content-type": "application/json"}
    before = (tiny_server.folder / "log").stat().st_size
    with httpx.Client(base_url=tiny_server.url, timeout=120, headers=headers) as http:
        for path, body in chosen:
            answer = http.post(path, content=body)
            assert answer.status_code < 500, (path, body[:300], answer.text)
            assert not any(leak in answer.text for leak in ("Traceback", "site-packages", "0x7f"))
        assert http.get("/health/ready").status_code == 200
    log = (tiny_server.folder / "log").read_bytes()[before:]
    assert b"Traceback" not in log, log[log.index(b"Traceback") :][:3000].decode()
