"""``chunkllama health`` finds the server by its flags, the environment and the YAML file."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from chunkllama_server.process.health_check import container_arguments, server_url

YAML = "port: 9100\nhost: 0.0.0.0\n"


@pytest.mark.parametrize(
    ("arguments", "environ", "expected"),
    [
        ([], {}, "http://127.0.0.1:8000"),
        (["--port", "9000"], {"CHUNKLLAMA_PORT": "1"}, "http://127.0.0.1:9000"),
        (["--port=9000", "--num-chunks", "4"], {}, "http://127.0.0.1:9000"),
        ([], {"CHUNKLLAMA_PORT": "9001"}, "http://127.0.0.1:9001"),
        ([], {"CHUNKLLAMA_PORT": "tcp://10.0.0.1:80"}, "http://127.0.0.1:8000"),
        (["--host", "::"], {}, "http://[::1]:8000"),
        (["--host", "fe80::1"], {}, "http://[fe80::1]:8000"),
        (["--host", "10.0.0.7"], {}, "http://10.0.0.7:8000"),
        (["--ssl-certfile", "x.pem"], {}, "https://127.0.0.1:8000"),
        ([], {"CHUNKLLAMA_SSL_CERTFILE": "x.pem"}, "https://127.0.0.1:8000"),
        (["--config", "FILE"], {}, "http://127.0.0.1:9100"),
        ([], {"CHUNKLLAMA_CONFIG": "FILE"}, "http://127.0.0.1:9100"),
        (["--port", "7"], {"CHUNKLLAMA_CONFIG": "FILE"}, "http://127.0.0.1:7"),
    ],
)
def test_the_address_follows_flags_environment_and_file(arguments, environ, expected, tmp_path):
    file = tmp_path / "server.yaml"
    file.write_text(YAML)
    filled = [word.replace("FILE", str(file)) for word in arguments]
    variables = {key: value.replace("FILE", str(file)) for key, value in environ.items()}
    assert server_url(filled, variables) == expected


@pytest.mark.parametrize(
    ("command", "expected"),
    [
        ("/opt/venv/bin/python /opt/app/bin/chunkllama serve --port 1", ["--port", "1"]),
        ("/sbin/tini -- chunkllama serve --port 2", ["--port", "2"]),
        ("python -m chunkllama_server.cli serve --port 3", ["--port", "3"]),
        ("/lib/systemd/systemd --system", []),
        ("chunkllama health", []),
    ],
)
def test_the_flags_of_a_containers_first_process(command, expected, tmp_path: Path):
    (tmp_path / "cmdline").write_bytes(command.replace(" ", "\0").encode() + b"\0")
    assert [word for word in container_arguments(tmp_path) if word] == expected
    assert container_arguments(tmp_path / "nothing") == []


def test_a_server_with_tls_and_a_file_is_found(start, chunkllama, tmp_path):
    certificate, key = tmp_path / "c.pem", tmp_path / "k.pem"
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-subj", "/CN=localhost",
         "-keyout", key, "-out", certificate],
        check=True, capture_output=True,
    )  # fmt: skip
    file = tmp_path / "server.yaml"
    file.write_text(f"ssl_certfile: {certificate}\nssl_keyfile: {key}\n")
    served = start("--config", file, scheme="https")
    port = served.url.rpartition(":")[2]
    found = chunkllama("health", "--config", file, CHUNKLLAMA_PORT=port)
    assert (found.returncode, found.stderr) == (0, "")
    served.stop()
    gone = chunkllama("health", "--config", file, CHUNKLLAMA_PORT=port)
    assert gone.returncode == 1 and f"https://127.0.0.1:{port} does not answer" in gone.stderr
    wrong = chunkllama("health", "--config", tmp_path / "nothing.yaml")
    assert wrong.returncode == 1 and "config: cannot read" in wrong.stderr
