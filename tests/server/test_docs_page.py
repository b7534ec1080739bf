"""/docs needs no network: the page and all it loads come from this server."""

from __future__ import annotations

import re
from urllib.parse import urljoin

import pytest


def test_the_page_loads_from_this_server_alone(server) -> None:
    with server.http() as http:
        page = http.get("/docs")
        assert page.headers["content-type"].startswith("text/html")
        assert "connect-src 'self'" in page.headers["content-security-policy"]
        assert "https://" not in page.text and "http://" not in page.text
        loaded = re.findall(r'(?:src|href)="([^"]+)"', page.text)
        assert len(loaded) == 3
        for name in loaded:
            file = http.get(urljoin(str(page.url), name))
            assert file.status_code == 200 and len(file.content) > 1000
            kind = {"css": "text/css", "js": "text/javascript", "png": "image/png"}
            assert file.headers["content-type"].startswith(kind[name.rpartition(".")[2]])
        document = re.search(r"url: '([^']+)'", page.text)
        assert http.get(urljoin(str(page.url), document[1])).json()["openapi"].startswith("3.")


@pytest.mark.parametrize("path", ["/redoc", "/docs/redoc.standalone.js", "/docs/..%2fapp.py"])
def test_nothing_else_is_served(server, path) -> None:
    with server.http() as http:
        assert http.get(path).status_code in (400, 404)


def test_a_server_with_keys_asks_for_one(start_server) -> None:
    guarded = start_server(api_keys={"a": "k"})
    with guarded.http() as http:
        assert http.get("/docs").status_code == 401
        assert http.get("/docs", headers={"x-api-key": "k"}).status_code == 200
