"""The endpoint that docs/contributing/endpoint.md adds, as the page writes it."""

from __future__ import annotations

import re
import sys
import textwrap
from pathlib import Path
from types import ModuleType

import pytest

from chunkllama_server.transport.paths import add_routes

PAGE = Path(__file__).parents[2] / "docs/contributing/endpoint.md"
FILES = re.compile(r"`(api/[\w/]+)\.py`(?:(?!```).)*```python\n(.*?)```", re.DOTALL)


@pytest.fixture
def counting(server, monkeypatch):
    """A server with the page's two new files."""
    for name, code in FILES.findall(PAGE.read_text()):
        module = ModuleType("chunkllama_server." + name.replace("/", "."))
        monkeypatch.setitem(sys.modules, module.__name__, module)
        exec(textwrap.dedent(code), module.__dict__)
    routes = list(server.app.router.routes)
    add_routes(server.app, sys.modules["chunkllama_server.api.count"].router)
    yield server
    server.app.router.routes[:] = routes


def test_it_answers_and_refuses(counting) -> None:
    answer = counting.post("/v1/count", {"text": "four"})
    assert (answer.status_code, answer.json()) == (200, {"count": 4})
    for body, param in (({}, "text"), ({"text": "x" * 65537}, "text"), ({"text": 4}, "text")):
        refused = counting.post("/v1/count", body)
        assert (refused.status_code, refused.json()["error"]["param"]) == (400, param)
    other = counting.post("/v1/count", {"text": "x", "model": "unknown"})
    assert (other.status_code, other.json()["error"]["code"]) == (404, "model_not_found")
