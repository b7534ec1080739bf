"""``chunkllama batch``: run a file of requests on a server and write the file of answers."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from chunkllama.errors import ChunkLlamaError
from chunkllama_server.transport.server_url import authorization, split_server_url

_ENDED = frozenset(("completed", "failed", "expired", "cancelled"))
_BLOCK = 1 << 20
_TIMEOUT = 60.0
_STATE = ".batch"
_PATIENCE_SECONDS = 600.0  # for which a server that restarts or is busy is asked again
_RETRY_SECONDS = 2.0


class _RefusedError(ChunkLlamaError):
    """The server answered with an error; ``code`` is that of its body."""

    def __init__(self, message: str, status: int, code: str | None) -> None:
        super().__init__(message)
        self.status = status
        self.code = code


class _UnreachableError(ChunkLlamaError):
    """The server does not answer."""


@contextlib.contextmanager
def _using(path: Path) -> Iterator[None]:
    """Name a file of this machine that cannot be used."""
    try:
        yield
    except OSError as error:
        raise ChunkLlamaError(f"{path}: {error.strerror}") from None


class _Server:
    """A server's files and batches.

    Raises (in its methods):
        _UnreachableError, _RefusedError: the server does not answer, or refuses.
        ChunkLlamaError: the answer is not that of such a server, or a file of this machine cannot
            be used.
    """

    def __init__(self, url: str, key: str) -> None:
        self._url = url
        self._parts = split_server_url(url)
        self._headers = {"authorization": authorization(key)} if key else {}

    @contextlib.contextmanager
    def _answer(
        self, method: str, path: str, body: Any = None, headers: dict[str, str] | None = None
    ) -> Iterator[http.client.HTTPResponse]:
        secure = self._parts.scheme == "https"
        kind = http.client.HTTPSConnection if secure else http.client.HTTPConnection
        connection = kind(self._parts.hostname or "", self._parts.port, timeout=_TIMEOUT)
        try:
            target = self._parts.path.rstrip("/") + path
            broken: OSError | None = None
            try:
                connection.request(method, target, body, {**self._headers, **(headers or {})})
            except OSError as error:
                if connection.sock is None:  # it was never connected
                    raise
                broken = error
            response = self._response(connection, broken)
            if response.status >= 400:
                raise _refusal(self._url, response)
            yield response
        except (OSError, http.client.HTTPException) as error:
            raise _UnreachableError(
                f"{self._url} does not answer: {error}; start one with: chunkllama serve"
            ) from None
        finally:
            connection.close()

    def _response(
        self, connection: http.client.HTTPConnection, broken: OSError | None
    ) -> http.client.HTTPResponse:
        """The answer; a server that refuses a body ends the connection while it is sent.

        Args:
            broken: how sending the body has ended, if not well.
        """
        try:
            return connection.getresponse()
        except (OSError, http.client.HTTPException):
            if broken is None:
                raise
            raise _UnreachableError(
                f"{self._url}: the connection broke while the request was sent: {broken}"
            ) from None

    def _read(self, response: http.client.HTTPResponse) -> Any:
        """The object in an answer."""
        content = response.read()
        with contextlib.suppress(ValueError):
            if isinstance(value := json.loads(content), dict):
                return value
        raise ChunkLlamaError(f"{self._url} is not a ChunkLlama server: its answer is no JSON")

    def get(self, path: str) -> Any:
        with self._answer("GET", path) as response:
            return self._read(response)

    def post(self, path: str, body: Any) -> Any:
        content = json.dumps(body).encode()
        headers = {"content-type": "application/json"}
        with self._answer("POST", path, content, headers) as response:
            return self._read(response)

    def upload(self, path: Path) -> str:
        """Store a file and return its id."""
        boundary = uuid.uuid4().hex
        field = f"--{boundary}\r\ncontent-disposition: form-data; name="
        head = (
            f'{field}"purpose"\r\n\r\nbatch\r\n{field}"file"; filename="in.jsonl"\r\n\r\n'.encode()
        )
        tail = f"\r\n--{boundary}--\r\n".encode()

        def content() -> Iterator[bytes]:
            yield head
            with _using(path), path.open("rb") as file:
                while block := file.read(_BLOCK):
                    yield block
            yield tail

        with _using(path):
            size = path.stat().st_size
        headers = {
            "content-type": f"multipart/form-data; boundary={boundary}",
            "content-length": str(len(head) + size + len(tail)),
        }
        with self._answer("POST", "/v1/files", content(), headers) as response:
            return str(self._read(response)["id"])

    def delete(self, file_id: str) -> None:
        """Remove a stored file."""
        with self._answer("DELETE", f"/v1/files/{file_id}") as response:
            response.read()

    def download(self, file_id: str, path: Path) -> None:
        """Write a stored file to ``path``, whole or not at all."""
        partial = path.with_name(f"{path.name}.part")
        try:
            with self._answer("GET", f"/v1/files/{file_id}/content") as response:
                with _using(partial):
                    partial.write_bytes(b"")
                while block := response.read(_BLOCK):
                    with _using(partial), partial.open("ab") as file:
                        file.write(block)
                if response.length:  # http.client takes an early end for the end
                    raise _UnreachableError(
                        f"{self._url}: the connection broke while {file_id} was received; run the "
                        "command again"
                    )
            with _using(path):
                os.replace(partial, path)
        finally:
            with contextlib.suppress(OSError):
                partial.unlink(missing_ok=True)


def _refusal(url: str, response: http.client.HTTPResponse) -> _RefusedError:
    message, code = f"status {response.status}", None
    with contextlib.suppress(ValueError, KeyError, TypeError):
        error = json.load(response)["error"]
        message, code = str(error["message"]), error.get("code")
    return _RefusedError(f"{url}: {message}", response.status, code)


def batch(
    requests: Annotated[Path, typer.Argument(help="File with one request per line.")],
    answers: Annotated[Path, typer.Argument(help="File to write, one answer per line.")],
    url: Annotated[str, typer.Option(help="Server that runs them.")] = "http://127.0.0.1:8000",
    api_key: Annotated[
        str, typer.Option(envvar="OPENAI_API_KEY", help="API key of the server.")
    ] = "",
    window: Annotated[
        str, typer.Option(help="Time after which what has not run expires, e.g. 24h.")
    ] = "24h",
) -> int:
    """Run a file of requests as a batch.

    They run in the gaps of the server's other requests.

    Lines have the form of OpenAI's batches: custom_id, method, url and body. If it is
    interrupted, the same command follows the batch again. The batch's files are removed from the
    server once their content is here. Exit code 1 if a line failed.
    """
    console = Console(stderr=True)
    server = _Server(url, api_key)
    _check_place(requests, answers)
    state = answers.with_name(answers.name + _STATE)
    batch_id = _begin(server, requests, state, window, console)
    value = _follow(server, batch_id, console)
    return _finish(server, value, answers, state, console)


def _check_place(requests: Path, answers: Path) -> None:
    """Refuse a file of answers that cannot be written, before anything is uploaded.

    Raises:
        ChunkLlamaError: it is a folder, in none that can be written, or the file of requests.
    """
    if answers.is_dir() or not answers.name:
        raise ChunkLlamaError(f"{answers}: is a folder; name a file in it")
    if not os.access(answers.parent, os.W_OK | os.X_OK):
        raise ChunkLlamaError(f"{answers}: its folder does not exist or cannot be written")
    if answers.exists() and requests.exists() and answers.samefile(requests):
        raise ChunkLlamaError(f"{answers}: is the file of requests; name another one for answers")


def _begin(server: _Server, requests: Path, state: Path, window: str, console: Console) -> str:
    """Start a batch, or find the one that an earlier command has started.

    The state file names the uploaded file before the batch is asked for, then the batch: however
    the command ends, the next one finds what it has begun.
    """
    if state.exists():
        with _using(state):
            name = state.read_text(errors="replace").strip()
        batch_id = _find(server, name)
        if batch_id is not None:
            return batch_id
        console.print("the batch of the earlier command is gone; its lines run again")
    endpoint = _endpoint(requests)
    file_id = server.upload(requests)
    with _using(state):
        state.write_text(file_id)
    body = {"input_file_id": file_id, "endpoint": endpoint, "completion_window": window}
    batch_id = str(server.post("/v1/batches", body)["id"])
    with _using(state):
        state.write_text(batch_id)
    return batch_id


def _endpoint(requests: Path) -> str:
    """The url of the first line that is not blank.

    Raises:
        ChunkLlamaError: there is none, or the file cannot be read.
    """
    number = 0
    try:
        with _using(requests), requests.open("rb") as file:
            for line in file:
                number += 1
                if line.strip():
                    return str(json.loads(line)["url"])
    except (ValueError, KeyError, TypeError, RecursionError):
        raise ChunkLlamaError(
            f"{requests}: line {number} must be a JSON object with a url"
        ) from None
    raise ChunkLlamaError(f"{requests}: the file has no line")


def _find(server: _Server, name: str) -> str | None:
    """The batch of an earlier command; None only where the server says that there is none.

    Args:
        name: the batch's id, or that of its file if the command ended before it knew the batch.
    """
    if name.startswith("batch_"):
        try:
            return str(server.get(f"/v1/batches/{name}")["id"])
        except _RefusedError as error:
            if (error.status, error.code) == (404, "batch_not_found"):
                return None
            raise
    after = ""
    while True:
        page = server.get(f"/v1/batches?limit=100{after}")
        for each in page["data"]:
            if each["input_file_id"] == name:
                return str(each["id"])
        if not page["has_more"]:
            return None
        after = f"&after={page['last_id']}"


def _ask_again(server: _Server, path: str, console: Console) -> Any:
    """GET a path; a server that restarts or is busy is asked again for a while."""
    deadline = time.monotonic() + _PATIENCE_SECONDS
    is_said = False
    while True:
        try:
            return server.get(path)
        except (_UnreachableError, _RefusedError) as error:
            status = error.status if isinstance(error, _RefusedError) else 503
            if (status < 500 and status not in (408, 429)) or time.monotonic() > deadline:
                raise
            if not is_said:
                console.print(f"{error}; trying again", markup=False, highlight=False)
                is_said = True
            time.sleep(_RETRY_SECONDS)


def _follow(server: _Server, batch_id: str, console: Console) -> Any:
    """Show the progress until the batch has ended."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as progress:
        task = progress.add_task(batch_id)
        while True:
            value = _ask_again(server, f"/v1/batches/{batch_id}", console)
            counts = value["request_counts"]
            progress.update(
                task,
                description=value["status"],
                completed=counts["completed"] + counts["failed"],
                total=counts["total"] or None,
            )
            if value["status"] in _ENDED:
                return value
            time.sleep(0.5)


def _finish(server: _Server, value: Any, answers: Path, state: Path, console: Console) -> int:
    """Write the answers and report what sharing prefixes saved."""
    for problem in (value["errors"] or {"data": []})["data"]:
        where = f"line {problem['line']}: " if problem["line"] else ""
        console.print(f"{where}{problem['message']}", markup=False, highlight=False)
    failed = answers.with_name(f"{answers.stem}.errors{answers.suffix}")
    for name, path in (("output_file_id", answers), ("error_file_id", failed)):
        if value[name]:
            server.download(value[name], path)
        else:
            with _using(path):
                path.unlink(missing_ok=True)  # of an earlier batch
    if value["error_file_id"]:
        console.print(f"lines without an answer: {failed}", markup=False, highlight=False)
    with _using(state):
        state.unlink(missing_ok=True)
    _delete_files(server, value, console)
    counts, usage = value["request_counts"], value["usage"]
    prompt, cached = usage["input_tokens"], usage["input_tokens_details"]["cached_tokens"]
    share = cached / max(prompt, 1)
    console.print(
        f"{value['status']}: {counts['completed']} of {counts['total']} lines answered; "
        f"{prompt:,} prompt tokens, of which {cached:,} ({share:.0%}) were shared and not "
        f"computed; {usage['output_tokens']:,} output tokens",
        markup=False,
        highlight=False,
    )
    is_whole = value["status"] == "completed" and not counts["failed"]
    return 0 if is_whole else 1


def _delete_files(server: _Server, value: Any, console: Console) -> None:
    """Remove the batch's files from the server; what is not removed expires there."""
    for name in ("input_file_id", "output_file_id", "error_file_id"):
        try:
            if value[name]:
                server.delete(value[name])
        except (_UnreachableError, _RefusedError) as error:
            missing = isinstance(error, _RefusedError) and error.status == 404
            if not missing:
                text = f"{value[name]} stays on the server until it expires: {error}"
                console.print(text, markup=False, highlight=False)
