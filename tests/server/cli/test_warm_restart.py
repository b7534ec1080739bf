"""A server is killed, or drained, and started again: it finds what each tenant had cached."""

from __future__ import annotations

import os
import signal
import socket
import stat
import time

import httpx
import psutil
import pytest

TEXT = "what this tenant has written before the server was ended in some way or other " * 3
KEYS = {"red": "key-red", "blue": "key-blue"}


@pytest.fixture
def begin(start, tmp_path):
    """Start a server that keeps its cache in one folder."""
    (tmp_path / "keys").write_text("".join(f"{name}:{key}\n" for name, key in KEYS.items()))

    def make(*flags: object):
        keys = ("--api-key-file", tmp_path / "keys", "--snapshot-dir", tmp_path / "kept")
        return start(*keys, *flags)

    return make


def cached(served, tenant: str, prompt: str = TEXT, **fields: object) -> tuple[int, str]:
    """Ask something; returns the tokens of the prompt that were cached, and the answer."""
    answer = httpx.post(
        f"{served.url}/v1/completions",
        json={
            "model": served.model, "max_tokens": 8, "temperature": 0, "ignore_eos": True,
            "prompt": prompt, **fields,
        },
        headers={"authorization": f"Bearer {KEYS[tenant]}"},
        timeout=120,
    )  # fmt: skip
    assert answer.status_code == 200, answer.text
    body = answer.json()
    return body["usage"]["prompt_tokens_details"]["cached_tokens"], body["choices"][0]["text"]


def wait_until(condition) -> None:
    deadline = time.monotonic() + 600
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def has_loaded(served) -> bool:
    return "pack snapshot.ckpack:" in served.log.read_text()


@pytest.mark.nightly
def test_the_cache_outlives_a_kill_a_crash_and_a_drain(begin, tmp_path) -> None:
    kept = tmp_path / "kept"
    snapshot = kept / "snapshot.ckpack"
    served = begin("--snapshot-seconds", 0.2)
    none, answer = cached(served, "red")
    assert none == 0 and cached(served, "red", cache_salt="x")[0] == 0
    wait_until(snapshot.exists)
    first = snapshot.stat().st_mtime_ns
    cached(served, "red", "something else")  # and one after the last of red's chunks
    wait_until(lambda: snapshot.stat().st_mtime_ns != first)
    assert stat.S_IMODE(kept.stat().st_mode) == 0o700
    assert {stat.S_IMODE(path.stat().st_mode) for path in kept.iterdir()} == {0o600}

    engines = psutil.Process(served.process.pid).children()
    os.kill(served.process.pid, signal.SIGKILL)
    served.process.wait()
    psutil.wait_procs(engines, timeout=60)
    (kept / ".snapshot.ckpack.00000000.part").write_bytes(b"half of one")
    (kept / ".snapshot.ckpack.loading").touch()  # killed while it loaded its own
    served = begin("--snapshot-seconds", 0)
    wait_until(lambda: has_loaded(served))
    whole = len(TEXT) // 64 * 64
    assert cached(served, "blue")[0] == 0
    assert cached(served, "red") == (whole, answer)
    assert cached(served, "red", cache_salt="x")[0] == whole
    assert cached(served, "red", cache_salt="y")[0] == 0
    assert {path.name for path in kept.iterdir()} == {"snapshot.ckpack", "namespace.key", "lock"}

    (engine,) = psutil.Process(served.process.pid).children()
    os.kill(engine.pid, signal.SIGKILL)
    wait_until(lambda: served.log.read_text().count("pack snapshot.ckpack:") == 2)
    assert cached(served, "red") == (whole, answer)
    assert cached(served, "blue")[0] == 0  # of blue nothing was written yet

    assert served.stop() == 0  # writes what blue has computed, too
    served = begin("--snapshot-seconds", 0)
    wait_until(lambda: has_loaded(served))
    assert cached(served, "blue") == (whole, answer)
    assert served.stop() == 0

    served = begin("--isolation", "off")  # the public namespace now means another thing
    wait_until(lambda: "is refused: it is a snapshot of another server" in served.log.read_text())
    assert cached(served, "blue")[0] == 0
    served.stop()


def test_an_operator_drops_a_tenant_from_the_disk_too(begin, tmp_path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    served = begin("--snapshot-seconds", 0.2, "--admin-port", port, "--operator-key", "key-op")
    snapshot = tmp_path / "kept" / "snapshot.ckpack"
    cached(served, "red")
    cached(served, "blue", "blue " * 30)
    wait_until(lambda: snapshot.exists() and b'\\"red\\"' in snapshot.read_bytes())
    dropped = httpx.delete(
        f"http://127.0.0.1:{port}/admin/cache/tenants/red",
        headers={"authorization": "Bearer key-op"},
        timeout=60,
    )
    assert dropped.status_code == 200
    assert not snapshot.exists() or b'\\"red\\"' not in snapshot.read_bytes()
    assert served.stop() == 0
    assert b'\\"blue\\"' in snapshot.read_bytes() and b'\\"red\\"' not in snapshot.read_bytes()


def test_a_folder_that_cannot_be_used_is_one_warning(start, tmp_path) -> None:
    (tmp_path / "file").write_text("")
    served = start("--snapshot-dir", tmp_path / "file")
    assert served.log.read_text().count("snapshots are off: ") == 1
    assert served.chat("hello").status_code == 200
    assert served.stop() == 0
