"""Write a collector's metrics as text, with labels under their former names too."""

from __future__ import annotations

import re

from prometheus_client.exposition import generate_latest
from prometheus_client.registry import Collector

# The former name of a label is sent beside the new one, first, so that a query or a parser of
# either reads it and sums stay right: a second series would count everything twice.
_FORMER_LABEL = re.compile(rb'^(chunkllama_rejected_total\{)reason="(\d+)"\}', re.MULTILINE)
_BOTH_LABELS = rb'\1why="\2",reason="\2"}'


def metrics_text(source: Collector) -> bytes:
    """Return what the collector shows in the Prometheus text format."""
    return _FORMER_LABEL.sub(_BOTH_LABELS, generate_latest(source))
