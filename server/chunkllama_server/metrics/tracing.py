"""OpenTelemetry traces: one span a request, and under it where its time went.

Needs the extra ``chunkllama[otel]``; without ``otlp_endpoint`` nothing is imported. No span holds a
prompt, an answer or a key. Names follow OpenTelemetry's conventions for generative AI.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from chunkllama.logger import init_logger

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.trace import Span

logger = init_logger(__name__)

_CLOSE_SECONDS = 2.0  # for the last spans
_NANOSECONDS = 1_000_000_000
_CONTEXT_HEADERS = ("traceparent", "tracestate")


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationTimes:
    """One generation, for its spans; durations in seconds.

    Attributes:
        total: from acceptance to the end.
        queue, prefill, decode: its phases, by the engine's clock; None if it never began.
        reason: why it ended.
    """

    total: float
    queue: float | None
    prefill: float
    decode: float
    reason: str
    num_prompt_tokens: int
    num_cached_tokens: int
    num_output_tokens: int


class Tracing:
    """Makes spans with a provider of the OpenTelemetry SDK.

    Args:
        provider: exports the spans; shut down by ``close``.
        model: name that clients request.
    """

    def __init__(self, provider: TracerProvider, model: str) -> None:
        from opentelemetry import trace
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        self._trace = trace
        self._provider = provider
        self._tracer = provider.get_tracer("chunkllama")
        self._propagator = TraceContextTextMapPropagator()
        self._model = model

    def begin_request(self, method: str, path: str, headers: Mapping[str, str]) -> Span:
        """Start the span of an HTTP request, as a child of the caller's if it sent a context."""
        return self._tracer.start_span(
            f"{method} {path}",
            context=self._propagator.extract(headers),
            kind=self._trace.SpanKind.SERVER,
            attributes={"http.request.method": method, "url.path": path},
        )

    def context_of(self, span: Span) -> dict[str, str]:
        """The headers that name a span to the caller."""
        carrier: dict[str, str] = {}
        self._propagator.inject(carrier, self._trace.set_span_in_context(span))
        return carrier

    def record(self, times: GenerationTimes) -> None:
        """Export the spans of a generation that has just ended, under the request's span."""
        end = time.time_ns()
        start = end - int(times.total * _NANOSECONDS)
        generation = self._tracer.start_span(
            f"generate {self._model}",
            start_time=start,
            attributes={
                "gen_ai.operation.name": "generate_content",
                "gen_ai.request.model": self._model,
                "gen_ai.response.finish_reasons": (times.reason,),
                "gen_ai.usage.input_tokens": times.num_prompt_tokens,
                "gen_ai.usage.output_tokens": times.num_output_tokens,
            },
        )
        under = self._trace.set_span_in_context(generation)
        at = start
        waited = times.total if times.queue is None else times.queue
        phases = [("queue", waited)]
        if times.queue is not None:
            phases += [("match", 0.0), ("prefill", times.prefill), ("decode", times.decode)]
        for name, seconds in phases:
            span = self._tracer.start_span(name, context=under, start_time=at)
            if name == "match":  # takes no time of its own: it is part of a scheduling decision
                span.set_attribute("chunkllama.cached_tokens", times.num_cached_tokens)
            at = min(at + int(seconds * _NANOSECONDS), end)
            span.end(at)
        generation.end(end)

    async def close(self) -> None:
        """Export what is left, for two seconds at most: the collector may not answer."""
        # A daemon thread, of whose end the process does not wait: the SDK tries again for longer.
        thread = threading.Thread(target=self._provider.shutdown, daemon=True)
        thread.start()
        await asyncio.to_thread(thread.join, _CLOSE_SECONDS)
        if thread.is_alive():
            logger.warning("otlp_endpoint: does not answer; the last spans are not sent")


class TracingMiddleware:
    """Puts each request to ``/v1`` into a span and returns its W3C context."""

    def __init__(self, app: ASGIApp, tracing: Tracing) -> None:
        self._app = app
        self._tracing = tracing

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or "/v1/" not in scope["path"]:
            await self._app(scope, receive, send)
            return
        from opentelemetry.trace import Status, StatusCode, use_span

        given = {
            name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]
        }
        headers = {name: given[name] for name in _CONTEXT_HEADERS if name in given}
        span = self._tracing.begin_request(scope["method"], scope["path"], headers)

        async def send_with_context(message: Message) -> None:
            if message["type"] == "http.response.start":
                span.set_attribute("http.response.status_code", message["status"])
                if message["status"] >= 500:
                    span.set_status(Status(StatusCode.ERROR))
                returned = self._tracing.context_of(span).items()
                message["headers"] = [
                    *message.get("headers", []),
                    *((name.encode(), value.encode()) for name, value in returned),
                ]
            await send(message)

        with use_span(span, end_on_exit=True, record_exception=False):
            await self._app(scope, receive, send_with_context)


def make_tracing(endpoint: str, model: str) -> Tracing:
    """Traces that are sent to an OTLP/HTTP endpoint."""
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor

    provider = TracerProvider(
        resource=Resource.create({"service.name": "chunkllama"}),
        shutdown_on_exit=False,  # ``Tracing.close`` does it, in bounded time
    )
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(endpoint=endpoint)))
    return Tracing(provider, model)
