"""Faults of the files with K/V (F23 to F26), each from outside on a real server."""

from __future__ import annotations

import os
import resource
import signal
import threading
import time
from pathlib import Path

import httpx
import psutil
import pytest

TEXTS = [letter * 200 for letter in "abcdef"]
CHUNK = 64


def ask(served, text: str) -> tuple[int, str]:
    """Returns the cached tokens of the prompt, and the answer."""
    body = {"model": served.model, "prompt": text, "max_tokens": 8, "temperature": 0,
            "ignore_eos": True}  # fmt: skip
    answer = httpx.post(f"{served.url}/v1/completions", json=body, timeout=120)
    assert answer.status_code == 200, answer.text
    usage = answer.json()["usage"]
    return usage["prompt_tokens_details"]["cached_tokens"], answer.json()["choices"][0]["text"]


def wait_until(condition) -> None:
    deadline = time.monotonic() + 600
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.002)


def wait_read(served, times: int = 1) -> None:
    """Until the snapshot has been loaded or refused so often."""
    wait_until(lambda: served.log.read_text().count("pack snapshot.ckpack") >= times)


@pytest.fixture(scope="module")
def kept(start, tmp_path_factory) -> tuple[bytes, bytes, list[str]]:
    """A snapshot of ``TEXTS``, its secret, and the answers to them."""
    folder = tmp_path_factory.mktemp("kept")
    served = start("--snapshot-dir", folder, "--snapshot-seconds", 0)
    answers = [ask(served, text)[1] for text in TEXTS]
    assert served.stop() == 0
    snapshot = (folder / "snapshot.ckpack").read_bytes()
    return snapshot, (folder / "namespace.key").read_bytes(), answers


def restore(folder: Path, kept: tuple[bytes, bytes, list[str]], snapshot: bytes) -> None:
    (folder / "snapshot.ckpack").write_bytes(snapshot)
    (folder / "namespace.key").write_bytes(kept[1])


def test_f23_a_snapshot_that_cannot_be_written(start, tmp_path) -> None:
    """No file of the engine process may grow any more, as on a full disk."""
    served = start("--snapshot-dir", tmp_path, "--snapshot-seconds", 0.05, "--log-level", "warning")
    ask(served, TEXTS[0])
    snapshot = tmp_path / "snapshot.ckpack"
    wait_until(snapshot.exists)
    (engine,) = psutil.Process(served.process.pid).children()
    resource.prlimit(engine.pid, resource.RLIMIT_FSIZE, (1000, 1000))
    for text in TEXTS[1:]:
        assert ask(served, text)[0] == 0
    wait_until(lambda: "snapshots are off" in served.log.read_text())
    before = snapshot.read_bytes()
    for text in TEXTS:
        assert ask(served, text)[0] >= 3 * CHUNK
    assert served.log.read_text().count("snapshots are off") == 1
    assert served.stop() == 0
    assert snapshot.read_bytes() == before
    assert {path.name for path in tmp_path.iterdir()} == {
        "snapshot.ckpack",
        "namespace.key",
        "lock",
    }


def check_damaged(start, folder: Path, answers: list[str], most: int) -> None:
    """A server finds at most ``most`` chunks of a snapshot, and answers as without one."""
    served = start("--snapshot-dir", folder, "--snapshot-seconds", 0)
    wait_read(served)
    found = [ask(served, text) for text in TEXTS]
    assert [answer for _, answer in found] == answers
    assert sum(cached for cached, _ in found) // CHUNK <= most
    assert served.stop() == 0


@pytest.mark.nightly
def test_f24_a_damaged_snapshot(start, tmp_path, kept) -> None:
    damaged = bytearray(kept[0])
    damaged[-1] ^= 0xFF
    restore(tmp_path, kept, bytes(damaged))
    check_damaged(start, tmp_path, kept[2], 3 * len(TEXTS) - 1)


@pytest.mark.nightly
@pytest.mark.parametrize("seed", range(12))
def test_f24_snapshots_damaged_anywhere(start, tmp_path, kept, rng, seed) -> None:
    """A byte, or a part of the file, or what a version before this one could have written."""
    snapshot = bytearray(kept[0])
    at = int(rng.integers(len(snapshot)))
    if seed % 3 == 0:
        snapshot[at] ^= 1 << int(rng.integers(8))
    elif seed % 3 == 1:
        del snapshot[at:]
    else:
        start_of = snapshot.index(b"format")
        snapshot[start_of : start_of + 24] = b"x" * 24
    restore(tmp_path, kept, bytes(snapshot))
    check_damaged(start, tmp_path, kept[2], 3 * len(TEXTS))


def kill_while_writing(served, folder: Path) -> None:
    """SIGKILL as soon as a snapshot is being written, while requests change the tree."""
    over = threading.Event()

    def load() -> None:
        number = 0
        while not over.is_set():
            number += 1
            try:
                ask(served, f"{number:05d}" * 40)
            except httpx.TransportError:
                return

    loader = threading.Thread(target=load)
    loader.start()
    try:
        wait_until(lambda: list(folder.glob(".snapshot.ckpack.*.part")))
        os.kill(served.process.pid, signal.SIGKILL)
    finally:
        over.set()
        loader.join()


@pytest.mark.nightly
def test_f25_a_kill_while_a_snapshot_is_written(start, tmp_path, kept) -> None:
    """The file is the one before or the one after, and is loaded."""
    restore(tmp_path, kept, kept[0])
    for _ in range(10):
        served = start("--snapshot-dir", tmp_path, "--snapshot-seconds", 0.05)
        wait_read(served)
        engines = psutil.Process(served.process.pid).children()
        kill_while_writing(served, tmp_path)
        served.process.wait()
        psutil.wait_procs(engines, timeout=600)
        served = start("--snapshot-dir", tmp_path, "--snapshot-seconds", 0)
        wait_read(served)
        assert "is refused" not in served.log.read_text()
        assert not list(tmp_path.glob("*.part"))
        assert ask(served, TEXTS[0]) == (3 * CHUNK, kept[2][0])
        assert served.stop() == 0


@pytest.mark.nightly
def test_f26_two_servers_on_one_folder(start, tmp_path) -> None:
    snapshot = tmp_path / "snapshot.ckpack"
    first = start("--snapshot-dir", tmp_path, "--snapshot-seconds", 0)
    second = start("--snapshot-dir", tmp_path, "--snapshot-seconds", 0.05)
    assert second.log.read_text().count("snapshots are off: another server uses") == 1
    assert ask(second, TEXTS[0])[0] == 0
    assert second.stop() == 0 and not snapshot.exists()
    assert ask(first, TEXTS[0])[0] == 0
    assert first.stop() == 0 and snapshot.exists()
