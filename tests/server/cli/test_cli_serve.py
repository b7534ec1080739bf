"""One server process on a tiny random model: it answers, drains, and leaves nothing behind."""

from __future__ import annotations

import contextlib
import json
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import httpx
import psutil
import pytest


def test_answers_and_reports_itself(served):
    answer = served.chat(max_tokens=4, temperature=0).json()
    assert answer["usage"]["completion_tokens"] <= 4
    assert served.get("/v1/models").json()["data"][0]["id"] == "tiny"
    assert "chunkllama_kv_chunks{" in served.get("/metrics").text
    (line,) = [each for each in served.log.read_text().splitlines() if "chat template: " in each]
    assert "; can: " in line and "; cannot: " in line and "TemplateCapabilities" not in line


def test_the_log_names_requests_and_no_prompt(served):
    answer = served.chat("my secret canary", max_tokens=2)
    bad = httpx.post(
        served.url + "/v1/chat/completions?key=canary%1b%0a",
        content=b"{",
        headers={"x-request-id": "mine-1", "content-type": "application/json"},
        timeout=120,
    )
    assert bad.status_code == 400
    last = "[mine-1]: POST /v1/chat/completions 400"  # written after the answer is sent
    deadline = time.monotonic() + 60
    while last not in (log := served.log.read_text()):
        assert time.monotonic() < deadline, log
        time.sleep(0.05)
    assert answer.headers["x-request-id"] in log
    assert "canary" not in log
    assert "\x1b" not in log


def test_health_command_follows_the_server(served, chunkllama):
    assert chunkllama("health", "--url", served.url).returncode == 0
    port = served.url.rpartition(":")[2]
    assert chunkllama("health", CHUNKLLAMA_PORT=port).returncode == 0
    silent = chunkllama("health", "--url", "http://127.0.0.1:9")
    assert silent.returncode == 1
    assert "does not answer" in silent.stderr
    for url in ("ftp://x", "http://[::1"):
        refused = chunkllama("health", "--url", url)
        assert refused.returncode == 1
        assert len(refused.stderr.splitlines()) == 1


def test_api_process_has_no_torch(served):
    maps = Path(f"/proc/{served.process.pid}/maps").read_text()
    assert "libtorch" not in maps
    children = psutil.Process(served.process.pid).children()
    assert len(children) == 1
    assert "libtorch" in Path(f"/proc/{children[0].pid}/maps").read_text()


def test_a_live_stream_finishes_while_new_work_is_refused(start_stopping):
    server = start_stopping("--drain-seconds", 3600)
    child = psutil.Process(server.process.pid).children()[0]
    events: list[str] = []
    first = threading.Event()

    def read() -> None:
        body = {
            "model": "tiny",
            "messages": [{"role": "user", "content": "go on"}],
            "max_tokens": 600,
            "ignore_eos": True,
            "stream": True,
        }
        url = f"{server.url}/v1/chat/completions"
        with httpx.stream("POST", url, json=body, timeout=600) as response:
            for line in response.iter_lines():
                events.append(line)
                first.set()

    reader = threading.Thread(target=read)
    reader.start()
    first.wait()
    server.process.send_signal(signal.SIGTERM)
    while server.get("/health/ready").status_code != 503:
        time.sleep(0.01)
    assert server.get("/health/live").status_code == 200
    assert server.chat().status_code == 503
    server.resume_engine()
    reader.join()
    assert [line for line in events if line][-1] == "data: [DONE]"
    assert server.process.wait(600) == 0
    assert not psutil.pid_exists(child.pid)


@pytest.mark.nightly
def test_a_stream_beyond_the_drain_limit_ends_with_an_error_event(start_stopping):
    server = start_stopping("--drain-seconds", 0.3)
    engine = psutil.Process(server.process.pid).children()[0]
    body = {
        "model": "tiny",
        "messages": [{"role": "user", "content": "go on"}],
        "max_tokens": 900,
        "ignore_eos": True,
        "stream": True,
    }
    url = f"{server.url}/v1/chat/completions"
    with httpx.stream("POST", url, json=body, timeout=600) as response:
        lines = response.iter_lines()
        next(lines)
        server.process.send_signal(signal.SIGTERM)
        rest = [line for line in lines if line.startswith("data: ")]
    assert "error" in json.loads(rest[-1].removeprefix("data: "))
    with contextlib.suppress(psutil.NoSuchProcess):
        engine.resume()
    assert server.process.wait(600) == 0


def test_a_grammar_that_does_not_end_holds_up_no_exit(start):
    server = start("--max-joined-texts", 1000, "--grammar-seconds", 0.5)
    schema = {"allOf": [{"type": "string", "pattern": f"a{{{i}}}"} for i in range(60)]}
    form = {"type": "json_schema", "json_schema": {"name": "s", "schema": schema}}
    refused = server.chat(response_format=form)
    assert (refused.status_code, refused.json()["error"]["code"]) == (400, "grammar_too_complex")
    assert server.stop() == 0


@pytest.mark.parametrize("sig", [signal.SIGINT, signal.SIGTERM])
def test_an_idle_server_stops_at_once_and_leaves_nothing(start, sig, tmp_path):
    """A supervisor such as systemd hears of its start and its end."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as supervisor:
        supervisor.bind(str(tmp_path / "notify"))
        supervisor.settimeout(600)
        server = start(NOTIFY_SOCKET=str(tmp_path / "notify"))
        assert supervisor.recv(100) == b"READY=1"
        child = psutil.Process(server.process.pid).children()[0]
        assert server.stop(sig) == 0
        assert supervisor.recv(100) == b"STOPPING=1"
    assert not psutil.pid_exists(child.pid)
    with pytest.raises(httpx.TransportError):
        server.get("/health")


@pytest.mark.parametrize(
    ("sig", "code"),
    [
        (signal.SIGTERM, 0),
        pytest.param(signal.SIGINT, 130, marks=pytest.mark.nightly),
        pytest.param(signal.SIGHUP, 0, marks=pytest.mark.nightly),
    ],
)
def test_a_start_can_be_stopped(tiny_model, sig, code):
    command = [sys.executable, "-m", "chunkllama_server.cli", "serve", "--model", str(tiny_model)]
    with subprocess.Popen([*command, "--port", "0"], stderr=subprocess.PIPE, text=True) as process:
        while not (children := psutil.Process(process.pid).children()):
            time.sleep(0.01)
        process.send_signal(sig)
        _, log = process.communicate(timeout=600)
    assert process.returncode == code, log
    assert "Traceback" not in log and "ready at" not in log
    assert not psutil.wait_procs(children, timeout=600)[1]


def test_a_second_signal_stops_a_drain(start_stopping):
    server = start_stopping("--drain-seconds", 3600)
    engine = psutil.Process(server.process.pid).children()[0]
    body = {
        "model": "tiny",
        "messages": [{"role": "user", "content": "go on"}],
        "max_tokens": 900,
        "ignore_eos": True,
        "stream": True,
    }
    url = f"{server.url}/v1/chat/completions"

    def ask() -> None:
        with contextlib.suppress(httpx.TransportError):
            httpx.post(url, json={**body, "stream": False}, timeout=600)

    whole = threading.Thread(target=ask)
    with httpx.stream("POST", url, json=body, timeout=600) as response:
        lines = response.iter_lines()  # dropping it would close the connection
        next(lines)
        whole.start()
        while "requests_live 2" not in server.get("/metrics").text:
            time.sleep(0.01)
        server.process.send_signal(signal.SIGTERM)
        while server.get("/health/ready").status_code != 503:
            time.sleep(0.01)
        server.process.send_signal(signal.SIGINT)
        with contextlib.suppress(psutil.NoSuchProcess):
            engine.resume()
        assert server.process.wait(600) == 0
    whole.join()
    assert "Traceback" not in server.log.read_text()


def test_serves_https(start, chunkllama, tmp_path):
    key, certificate = tmp_path / "key.pem", tmp_path / "cert.pem"
    command = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256"]
    command += ["-nodes", "-keyout", str(key), "-out", str(certificate), "-days", "1"]
    subprocess.run([*command, "-subj", "/CN=127.0.0.1"], check=True, capture_output=True)
    server = start("--ssl-certfile", certificate, "--ssl-keyfile", key, scheme="https")
    assert server.get("/v1/models", verify=False).json()["data"][0]["id"] == "tiny"
    assert chunkllama("health", "--url", server.url).returncode == 0
    assert chunkllama("health", "--url", server.url.replace("https", "http")).returncode == 1
    assert server.stop() == 0


def test_admin_port_json_logs_and_public_prefixes(start, tmp_path):
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        admin = sock.getsockname()[1]
    prompt = "You are a helpful assistant. " * 8
    (tmp_path / "prefixes.yaml").write_text(json.dumps([prompt]))
    server = start(
        "--admin-port", admin, "--log-format", "json", "--public-prefixes",
        tmp_path / "prefixes.yaml", "--api-key", "a:key-a", "--api-key", "b:key-b",
    )  # fmt: skip
    assert server.get("/metrics", headers={"authorization": "Bearer key-a"}).status_code == 404
    metrics = httpx.get(f"http://127.0.0.1:{admin}/metrics", timeout=120).text
    assert "chunkllama_kv_chunks_pinned" in metrics
    for key in ("key-a", "key-b"):
        body = {
            "model": "tiny",
            "messages": [
                {"role": "system", "content": prompt},
                {"role": "user", "content": f"hello from {key}"},
            ],
            "max_tokens": 2,
        }
        headers = {"authorization": f"Bearer {key}"}
        url = f"{server.url}/v1/chat/completions"
        usage = httpx.post(url, json=body, headers=headers, timeout=120).json()["usage"]
        assert usage["prompt_tokens_details"]["cached_tokens"] >= len(prompt)
    assert server.stop() == 0
    records = [json.loads(line) for line in server.log.read_text().splitlines()]
    assert any(record.get("request_id") for record in records)
    assert "key-a" not in server.log.read_text()
