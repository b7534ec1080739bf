"""Packs on a real server: the command, a warm start, tenants, signatures, the admin port."""

from __future__ import annotations

import os
import socket
import threading
import time

import httpx
import psutil
import pytest

SYSTEM = "you answer questions about the orders of a shop and nothing else at all " * 3
RED_TEXT = "the red tenant has a text of its own that is long enough " * 3
PREFIXES = f"""
- name: shop
  messages: [{{role: system, content: "{SYSTEM}"}}]
- name: red's own
  scope: tenant
  tenant: red
  text: "{RED_TEXT}"
"""
KEYS = {"red": "key-red", "blue": "key-blue"}


@pytest.fixture
def key_pair(tmp_path):
    """PEM files of a private and a public key."""
    from cryptography.hazmat.primitives import serialization as pem
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    key = Ed25519PrivateKey.generate()
    private, public = tmp_path / "private.pem", tmp_path / "public.pem"
    private.write_bytes(
        key.private_bytes(pem.Encoding.PEM, pem.PrivateFormat.PKCS8, pem.NoEncryption())
    )
    public.write_bytes(
        key.public_key().public_bytes(pem.Encoding.PEM, pem.PublicFormat.SubjectPublicKeyInfo)
    )
    return private, public


@pytest.fixture
def folder(tmp_path):
    path = tmp_path / "packs"
    path.mkdir()
    return path


@pytest.fixture
def build(chunkllama, tmp_path, tiny_model, folder):
    """Run ``chunkllama pack build`` with prompts from a pipe; returns the pack."""

    def make(name: str, *flags: object):
        model = ("--model", tiny_model, "--backend", "reference", "--num-chunks", 32)
        out, prompts = folder / name, tmp_path / f"{name}.pipe"
        os.mkfifo(prompts)
        threading.Thread(target=prompts.write_text, args=(PREFIXES,), daemon=True).start()
        done = chunkllama("pack", "build", *model, "--prefixes", prompts, "--out", out, *flags)
        assert done.returncode == 0, done.stderr
        return out

    return make


def cached(served, tenant: str, **fields: object) -> int:
    """Ask something; returns the tokens of the prompt that were cached."""
    path = "chat/completions" if "messages" in fields else "completions"
    answer = httpx.post(
        f"{served.url}/v1/{path}",
        json={"model": served.model, "max_tokens": 1, **fields},
        headers={"authorization": f"Bearer {KEYS[tenant]}"},
        timeout=120,
    )
    assert answer.status_code == 200, answer.text
    return answer.json()["usage"]["prompt_tokens_details"]["cached_tokens"]


def chat(question: str) -> dict[str, object]:
    roles = (("system", SYSTEM), ("user", question))
    return {"messages": [{"role": role, "content": content} for role, content in roles]}


def wait_for(admin: httpx.Client, names: set[str]) -> dict[str, dict]:
    """Wait until the packs are loaded or refused; returns what became of each."""
    deadline = time.monotonic() + 600
    while time.monotonic() < deadline:
        answer = admin.get("/v1/cache/packs")
        packs = {pack["name"]: pack for pack in answer.json().get("data", [])}
        if names <= {name for name, pack in packs.items() if pack["state"] != "loading"}:
            return packs
        time.sleep(0.05)
    raise AssertionError(answer.text)


@pytest.mark.nightly
def test_a_server_starts_warm_for_those_who_may_read_a_pack(
    chunkllama, build, start, folder, tiny_model, tmp_path, key_pair
) -> None:
    private, public = key_pair
    pack = build("signed.ckpack", "--sign-key", private)
    unsigned = build("unsigned.ckpack")
    shown = chunkllama("pack", "inspect", pack).stdout
    assert "red's own" in shown and "everyone" in shown
    model = ("--model", tiny_model, "--backend", "reference", "--num-chunks", 32)
    checked = chunkllama(
        "pack", "verify", pack, "--recompute", "all", "--pack-public-key", public, *model
    )
    assert checked.returncode == 0 and "are as they were written" in checked.stdout
    foreign = chunkllama("pack", "verify", pack, *model, "--dtype", "bfloat16")
    assert foreign.returncode == 1
    assert "it has dtype float32, this server has bfloat16" in foreign.stdout
    small = chunkllama("pack", "verify", unsigned, *model, "--max-model-len", 191)
    assert small.returncode == 1
    assert "a prompt has 3 chunks, and max_model_len leaves room for 2" in small.stdout

    (tmp_path / "keys").write_text("".join(f"{name}:{key}\n" for name, key in KEYS.items()))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    served = start(
        *("--packs", folder, "--pack-public-key", public, "--api-key-file", tmp_path / "keys"),
        *("--admin-port", port, "--operator-key", "key-op"),
    )
    admin = httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60)
    admin.headers["authorization"] = "Bearer key-op"
    packs = wait_for(admin, {"signed.ckpack", "unsigned.ckpack"})
    assert packs["unsigned.ckpack"]["state"] == "refused"
    assert "has no signature" in packs["unsigned.ckpack"]["reason"]
    loaded = packs["signed.ckpack"]
    assert loaded["is_signed"] and loaded["prefixes"] == ["shop", "red's own"]
    assert loaded["chunks"] == loaded["chunks_loaded"] == 3 + 2

    assert cached(served, "blue", **chat("hello")) == cached(served, "red", **chat("what")) == 192
    assert cached(served, "blue", prompt=RED_TEXT + "blue") == 0
    assert cached(served, "red", prompt=RED_TEXT + "red") == 128

    (engine,) = psutil.Process(served.process.pid).children()
    os.kill(engine.pid, 9)
    engine.wait()
    wait_for(admin, {"signed.ckpack"})
    assert cached(served, "red", prompt=RED_TEXT + "again") == 128
    assert cached(served, "blue", prompt=RED_TEXT + "again") == 0

    answer = admin.post("/v1/cache/packs", json={"name": "signed.ckpack"})
    assert answer.status_code == 202
    assert [pack["name"] for pack in answer.json()["data"]] == ["signed.ckpack"]
    assert wait_for(admin, {"signed.ckpack"})["signed.ckpack"]["chunks_present"] >= 4
    missing = admin.post("/v1/cache/packs", json={"name": "../signed.ckpack"})
    assert missing.status_code == 404
    assert "admin" not in httpx.get(f"{served.url}/v1/cache/packs").text
