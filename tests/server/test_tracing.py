"""A request's trace: the caller's context, the phases and what they hold, none of it a prompt."""

from __future__ import annotations

import itertools
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from fake_engine import DURATIONS, MODEL

from chunkllama.errors import RequestFailedError
from chunkllama_server.metrics import tracing as tracing_module
from chunkllama_server.metrics.tracing import Tracing, make_tracing

pytest.importorskip("opentelemetry.sdk", reason="the extra chunkllama[otel] is not installed")

TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"


@pytest.fixture
def traced(start_server):
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import SimpleSpanProcessor
    from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

    exporter = InMemorySpanExporter()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    server = start_server(tracing=Tracing(provider, MODEL))
    return server, exporter


def spans_of(exporter, requests: int = 1) -> dict:
    """The spans by name, once those of so many requests have ended: a client may read its answer
    before.
    """
    for _ in range(3000):
        spans = exporter.get_finished_spans()
        if sum(span.name.startswith(("POST ", "GET ")) for span in spans) >= requests:
            break
        time.sleep(0.01)
    return {span.name: span for span in spans}


@pytest.mark.parametrize("stream", [False, True])
def test_phases_of_a_request_under_the_callers_span(traced, stream) -> None:
    server, exporter = traced
    body = {"model": MODEL, "messages": [{"role": "user", "content": "say(SECRET)yas"}]}
    headers = {"traceparent": f"00-{TRACE}-{PARENT}-01"}
    answer = server.post("/v1/chat/completions", {**body, "stream": stream}, **headers)
    version, trace, span_id, flags = answer.headers["traceparent"].split("-")
    assert (version, trace, flags) == ("00", TRACE, "01") and span_id != PARENT
    spans = spans_of(exporter)
    request = spans["POST /v1/chat/completions"]
    assert f"{request.context.trace_id:032x}" == TRACE
    assert f"{request.context.span_id:016x}" == span_id
    assert f"{request.parent.span_id:016x}" == PARENT
    assert request.attributes["http.response.status_code"] == 200
    generation = spans[f"generate {MODEL}"]
    assert generation.parent.span_id == request.context.span_id
    assert generation.attributes["gen_ai.usage.output_tokens"] == 7
    assert generation.attributes["gen_ai.response.finish_reasons"] == ("stop",)
    phases = [spans[name] for name in ("queue", "match", "prefill", "decode")]
    assert {span.parent.span_id for span in phases} == {generation.context.span_id}
    assert phases[1].attributes["chunkllama.cached_tokens"] == 0
    for before, after in itertools.pairwise(phases):
        assert before.end_time == after.start_time
    assert all(span.start_time <= span.end_time <= generation.end_time for span in phases)
    shown = str([(s.name, dict(s.attributes)) for s in exporter.get_finished_spans()])
    assert "SECRET" not in shown and "say" not in shown


def test_a_request_without_a_context_begins_a_trace(traced) -> None:
    server, exporter = traced
    first, second = (server.chat().headers["traceparent"] for _ in range(2))
    assert first.split("-")[1] != second.split("-")[1]
    bad = server.post("/v1/completions", {"model": MODEL}, traceparent="00-zz-11-01")
    assert bad.headers["traceparent"].split("-")[1] not in ("zz", first.split("-")[1])
    assert spans_of(exporter, requests=3)["POST /v1/completions"].parent is None
    with server.http() as http:
        assert "traceparent" not in http.get("/health").headers


def test_a_failure_is_told(traced) -> None:
    server, exporter = traced
    server.engine.fail_with = RequestFailedError("boom", "model_nan")
    assert server.chat().status_code == 500
    spans = spans_of(exporter)
    assert not spans["POST /v1/chat/completions"].status.is_ok
    assert spans[f"generate {MODEL}"].attributes["gen_ai.response.finish_reasons"] == ("error",)
    assert set(spans) == {"POST /v1/chat/completions", f"generate {MODEL}", "queue"}


def test_each_prompt_has_a_generation(traced) -> None:
    server, exporter = traced
    server.post("/v1/completions", {"model": MODEL, "prompt": ["a", "b"]})
    names = [span.name for span in exporter.get_finished_spans()]
    assert names.count(f"generate {MODEL}") == names.count("prefill") == 2
    assert DURATIONS[0] > 0


def test_spans_are_sent_to_the_endpoint(start_server) -> None:
    received = []

    class Collector(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            received.append((self.path, self.rfile.read(int(self.headers["content-length"]))))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Collector) as collector:
        threading.Thread(target=collector.serve_forever, daemon=True).start()
        tracing = make_tracing(f"http://127.0.0.1:{collector.server_port}/v1/traces", MODEL)
        server = start_server(tracing=tracing)
        assert server.chat().status_code == 200
        server.stop()  # sends what is left
        collector.shutdown()
    ((path, body),) = received
    assert path == "/v1/traces"
    assert b"chunkllama" in body and b"prefill" in body


def test_a_collector_that_does_not_answer_keeps_no_server(start_server, monkeypatch) -> None:
    from opentelemetry.sdk.trace import SpanProcessor, TracerProvider

    answered, ended = threading.Event(), threading.Event()

    class Waiting(SpanProcessor):
        """Sends the last spans again and again, as the SDK's own does."""

        def shutdown(self) -> None:
            answered.wait(60)
            ended.set()

    monkeypatch.setattr(tracing_module, "_CLOSE_SECONDS", 0.01)
    provider = TracerProvider(shutdown_on_exit=False)
    provider.add_span_processor(Waiting())
    server = start_server(tracing=Tracing(provider, MODEL))
    server.stop()
    assert not ended.is_set()
    answered.set()
    assert ended.wait(60)
