"""Ask a server whether it is ready; container probes run it often, so it imports little."""

from __future__ import annotations

import http.client
import ssl
from collections.abc import Mapping, Sequence
from pathlib import Path

from chunkllama.errors import ConfigError
from chunkllama_server.transport.server_url import split_server_url

_KEYS = ("config", "host", "port", "ssl_certfile")
_LOCAL = {"": "127.0.0.1", "0.0.0.0": "127.0.0.1", "::": "[::1]"}


def server_url(arguments: Sequence[str], environ: Mapping[str, str]) -> str:
    """The address of the server that a command line and an environment configure.

    Args:
        arguments: of ``chunkllama serve``; empty: none are known.

    Raises:
        ConfigError: the YAML file cannot be read.
    """
    flags = _flags(arguments)
    variables = {key: environ.get(f"CHUNKLLAMA_{key.upper()}", "") for key in _KEYS}
    variables = {key: value for key, value in variables.items() if value}
    if variables.get("port", "").startswith("tcp://"):  # Kubernetes' own, for a Service's name
        del variables["port"]
    values = {**variables, **flags}
    if file := values.get("config"):
        from chunkllama_server.config.files import read_yaml

        values = {**read_yaml(Path(file)), **values}
    host = str(values.get("host", ""))
    host = _LOCAL.get(host, f"[{host}]" if ":" in host else host)
    scheme = "https" if values.get("ssl_certfile") else "http"
    return f"{scheme}://{host}:{values.get('port', 8000)}"


def container_arguments(process: Path = Path("/proc/1")) -> list[str]:
    """Arguments of ``chunkllama serve`` where it is a container's first process; else empty."""
    try:
        words = (process / "cmdline").read_bytes().decode(errors="replace").split("\0")
    except OSError:
        return []
    for index, word in enumerate(words[:-1]):
        is_program = Path(word).name == "chunkllama" or word == "chunkllama_server.cli"
        if is_program and words[index + 1] == "serve":
            return words[index + 2 :]
    return []


def _flags(arguments: Sequence[str]) -> dict[str, str]:
    """The flags that ``server_url`` reads, as ``--key value`` or ``--key=value``."""
    found = {}
    for word, following in zip(arguments, [*arguments[1:], ""], strict=False):
        name, is_joined, value = word.partition("=")
        key = name.removeprefix("--").replace("-", "_")
        if name.startswith("--") and key in _KEYS:
            found[key] = value if is_joined else following
    return found


def check_health(url: str, timeout: float) -> str:
    """Ask ``/health/ready``; returns "" when the server is ready, else what is wrong.

    Certificates are not verified: the question is whether it answers, not who it is.
    """
    try:
        parts = split_server_url(url)
        path = parts.path.rstrip("/") + "/health/ready"
        connection: http.client.HTTPConnection
        if parts.scheme == "https":
            context = ssl.create_default_context()
            context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
            connection = http.client.HTTPSConnection(
                parts.hostname or "", parts.port, timeout=timeout, context=context
            )
        else:
            connection = http.client.HTTPConnection(
                parts.hostname or "", parts.port, timeout=timeout
            )
        connection.request("GET", path)
        status = connection.getresponse().status
        connection.close()
    except ConfigError as error:
        return str(error)
    except (OSError, http.client.HTTPException, ValueError) as error:
        return f"{url} does not answer: {error}"
    return "" if status == 200 else f"{url} is not ready (status {status})"
