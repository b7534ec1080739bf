"""Asks a server whether it is ready, with the standard library alone: container probes run it
often."""

from __future__ import annotations

import http.client
import ssl
from urllib.parse import urlsplit


def check_health(url: str, timeout: float) -> str:
    """Ask ``/health/ready``; returns "" when the server is ready, else what is wrong.

    Certificates are not verified: the question is whether it answers, not who it is.
    """
    try:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            return f"not an http or https URL: {url}"
        path = parts.path.rstrip("/") + "/health/ready"
        connection: http.client.HTTPConnection
        if parts.scheme == "https":
            context = ssl.create_default_context()
            context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
            connection = http.client.HTTPSConnection(
                parts.hostname, parts.port, timeout=timeout, context=context
            )
        else:
            connection = http.client.HTTPConnection(parts.hostname, parts.port, timeout=timeout)
        connection.request("GET", path)
        status = connection.getresponse().status
        connection.close()
    except (OSError, http.client.HTTPException, ValueError) as error:
        return f"{url} does not answer: {error}"
    return "" if status == 200 else f"{url} is not ready (status {status})"
