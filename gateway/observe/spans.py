"""OpenTelemetry spans for holds and for launches, resumes and suspends, sent by OTLP over HTTP where a setting names an endpoint.

Spans are made of times that were measured anyway; without an endpoint nothing is made and nothing is imported.
"""

from __future__ import annotations

import atexit
import time
from typing import Any

from .steps import Steps

_SECOND = 1_000_000_000


class Spans:
    def __init__(self, endpoint: str, process: str) -> None:
        self._tracer: Any = None
        if not endpoint:
            return
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor

        provider = TracerProvider(resource=Resource.create({"service.name": f"torpor-{process}"}))
        provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(endpoint, timeout=5)))
        atexit.register(provider.shutdown)
        self._tracer = provider.get_tracer("torpor")

    @property
    def is_on(self) -> bool:
        return self._tracer is not None

    def hold(self, seconds: float, session: str, traceparent: str) -> None:
        """A request was held until now. Its own trace context (W3C Trace Context) is the span's parent."""
        if self._tracer is None:
            return
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        parent = TraceContextTextMapPropagator().extract({"traceparent": traceparent}) if traceparent else None
        end = time.time_ns()
        start = end - int(seconds * _SECOND)
        self._tracer.start_span("hold", context=parent, start_time=start, attributes={"torpor.session": session}).end(end)

    def steps(self, steps: Steps, session: str) -> None:
        """A launch, resume or suspend, with a span for each of its steps."""
        if self._tracer is None:
            return
        from opentelemetry.trace import set_span_in_context

        at = int(steps.started_at * _SECOND)
        whole = self._tracer.start_span(steps.work, start_time=at, attributes={"torpor.session": session})
        inside = set_span_in_context(whole)
        for step in steps.steps:
            end = at + int(step.took_ms * _SECOND / 1e3)
            self._tracer.start_span(step.what, context=inside, start_time=at).end(end)
            at = end
        whole.end(at)
