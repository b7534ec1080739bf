"""``chunkllama pack build`` without prompts: what the snapshot of a server holds."""

from __future__ import annotations

import hashlib
import hmac
import stat
from pathlib import Path

import pytest

from chunkllama.packs.document import FORMAT, ModelIdentity, PackDocument, PackedChunk, Scope
from chunkllama.packs.file import Pack, write_pack
from chunkllama_server.transport.auth import keyed_namespace

SECRET = b"s" * 32
MODEL = ModelIdentity("m", "w", "a", "{}", "auto", "float32", 1, 1, 2, 4)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The folder of a server with a snapshot of a public chunk and one of alice."""
    folder = tmp_path / "snapshots"
    folder.mkdir()
    (folder / "namespace.key").write_bytes(SECRET)
    _write(folder, b"isolated")
    return folder


def _write(folder: Path, mode: bytes) -> None:
    scopes = [Scope(), Scope("alice", keyed_namespace(SECRET, "alice", ""))]
    chunks = [PackedChunk(-1, 0, [1, 2, 3, 4], ""), PackedChunk(0, 1, [5, 6, 7, 8], "")]
    realm = hmac.new(SECRET, mode, hashlib.sha256).hexdigest()
    document = PackDocument(FORMAT, MODEL, "t", realm, scopes, [], chunks)
    write_pack(folder / "snapshot.ckpack", document, [bytes([i]) * 64 for i in range(2)])


def test_it_packs_what_is_public_and_the_tenants_that_are_named(in_process, folder) -> None:
    out = folder.parent / "new" / "hot.ckpack"
    done = in_process("pack", "build", "--snapshot-dir", folder, "--out", out)
    assert done.returncode == 0, done.stderr
    assert "1 chunks of 1 prompts" in done.stdout and "1 chunks of other tenants" in done.stdout
    with Pack(out) as pack:
        assert pack.document.scopes == [Scope()] and pack.document.realm == ""
        assert pack.read_chunk(0) == bytes(64)
    assert stat.S_IMODE(out.stat().st_mode) == 0o600
    named = ("--tenant", "alice")
    done = in_process("pack", "build", "--snapshot-dir", folder, "--out", out, *named)
    assert done.returncode == 0 and "left out" not in done.stdout
    with Pack(out) as pack:
        assert pack.document.scopes == [Scope(), Scope("alice", "alice")]
        assert pack.read_chunk(1) == bytes([1]) * 64


def test_one_cache_for_all_is_packed_only_if_that_is_said(in_process, folder: Path) -> None:
    _write(folder, b"shared")
    out = folder.parent / "hot.ckpack"
    given = ("pack", "build", "--snapshot-dir", folder, "--out", out)
    done = in_process(*given)
    assert done.returncode == 2 and "set isolation off" in done.stderr and not out.exists()
    assert in_process(*given, "--isolation", "off").returncode == 0
    with Pack(out) as pack:
        assert pack.document.scopes == [Scope()] and len(pack.document.chunks) == 1


def _other_key(folder: Path) -> None:
    (folder / "namespace.key").write_bytes(b"t" * 32)


def _no_file(folder: Path) -> None:
    (folder / "snapshot.ckpack").unlink()


def _no_key(folder: Path) -> None:
    (folder / "namespace.key").unlink()


def _damaged(folder: Path) -> None:
    path = folder / "snapshot.ckpack"
    path.write_bytes(path.read_bytes()[:-1] + b"x")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (_other_key, "namespace_secret_file: the snapshot was written with another key"),
        (_no_file, "snapshot.ckpack: cannot be read: No such file"),
        (_no_key, "namespace.key cannot be read: No such file"),
        (_damaged, "snapshot.ckpack: chunk 1 is damaged"),
    ],
    ids=["another key", "no snapshot", "no key", "damaged"],
)
def test_a_snapshot_that_cannot_be_packed_is_refused_in_one_line(
    in_process, folder: Path, change, reason: str
) -> None:
    change(folder)
    out = folder.parent / "hot.ckpack"
    done = in_process("pack", "build", "--snapshot-dir", folder, "--out", out, "--tenant", "alice")
    assert done.returncode == 2 and reason in done.stderr and not out.exists()
    assert len(done.stderr.strip().splitlines()) == 1


def test_flags_that_do_not_fit_are_refused(in_process, folder: Path, tmp_path: Path) -> None:
    out = ("--out", tmp_path / "hot.ckpack")
    done = in_process("pack", "build", *out)
    assert "prefixes: give a file of prompts, or the snapshot_dir" in done.stderr
    given = ("--prefixes", folder, "--tenant", "alice")
    assert "tenant: prefixes name" in in_process("pack", "build", *given, *out).stderr
