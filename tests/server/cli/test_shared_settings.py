"""What several servers share: the key of the namespaces."""

from __future__ import annotations

import os

import pytest

from chunkllama.errors import ConfigError
from chunkllama.models.config import read_spec
from chunkllama_server.config.settings import Settings
from chunkllama_server.process.http_server import Application
from chunkllama_server.process.text_files import read_text_files

KEYS = {"red": "key-red", "blue": "key-blue"}


@pytest.fixture
def namespaces(tiny_model):
    """The namespaces of two tenants in a server that is made, not started."""

    def make(is_pipe: bool = False, **settings: object) -> list[str]:
        made = Settings(model=str(tiny_model), **settings)
        spec = read_spec(tiny_model)
        files = read_text_files(made, tiny_model, spec)
        secret = made.namespace_secret()
        if is_pipe:  # it cannot be read again
            made.namespace_secret_file.unlink()
        server = Application(made, lambda: made, KEYS, {}, secret, files, tiny_model, spec)
        return [server._tenants.namespace(name, None) for name in KEYS]

    return make


def secret_file(folder, name: str, text: str, mode: int = 0o600):
    path = folder / name
    path.write_text(text)
    path.chmod(mode)
    return path


def test_servers_with_the_same_key_agree_on_namespaces(namespaces, tmp_path) -> None:
    first = secret_file(tmp_path, "first", "a" * 32 + "\n")
    copy = secret_file(tmp_path, "copy", "a" * 32, mode=0o640)
    other = secret_file(tmp_path, "other", "b" * 32)
    one = namespaces(namespace_secret_file=first)
    assert one == namespaces(namespace_secret_file=copy)
    assert one == namespaces(namespace_secret_file=first, snapshot_dir=tmp_path / "kept")
    assert not (tmp_path / "kept" / "namespace.key").exists()
    assert one == namespaces(is_pipe=True, namespace_secret_file=copy)
    assert len({*one, *namespaces(namespace_secret_file=other), *namespaces(), *namespaces()}) == 8


@pytest.mark.parametrize(
    ("text", "mode", "message"),
    [
        ("a" * 32, 0o644, "other users have access to .*0644.: chmod 600 it"),
        ("a" * 32, 0o620, "other users have access to .*0620.: chmod 600 it"),
        (" " + "a" * 31 + "\n", 0o600, "holds 31 bytes, fewer than 32: fill it with openssl rand"),
        ("a" * ((16 << 20) + 1), 0o600, "secret is larger than 16 MiB"),
    ],
)
def test_an_unusable_key_is_one_line(namespaces, tmp_path, text, mode, message) -> None:
    path = secret_file(tmp_path, "secret", text, mode)
    with pytest.raises(ConfigError, match=f"^namespace_secret_file: .*{message}") as caught:
        namespaces(namespace_secret_file=path)
    assert "\n" not in str(caught.value)


def test_a_missing_key_is_one_line(namespaces, tmp_path) -> None:
    with pytest.raises(ConfigError, match=r"^namespace_secret_file: cannot read .*none: No such"):
        namespaces(namespace_secret_file=tmp_path / "none")


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads every file")
def test_an_unreadable_key_is_one_line(namespaces, tmp_path) -> None:
    path = secret_file(tmp_path, "secret", "a" * 32, 0)
    with pytest.raises(ConfigError, match=r"cannot read .*Permission denied"):
        namespaces(namespace_secret_file=path)
