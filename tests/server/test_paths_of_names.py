"""Paths that end with a tenant's name: its slashes count, those before it do not."""

from __future__ import annotations

import pytest

from chunkllama_server.transport.paths import canonical_path


@pytest.mark.parametrize("name", ["a", "a/", "/a", "a//b", "/", "//", "v1/models/"])
@pytest.mark.parametrize("before", ["/admin/cache/tenants/", "//admin/cache//tenants/"])
def test_a_name_stays_as_it_is(before: str, name: str) -> None:
    assert canonical_path(before + name, "") == "/admin/cache/tenants/" + name
    whole = canonical_path("/root" + before + name, "/root", keep_root=False)
    assert whole == "/admin/cache/tenants/" + name
