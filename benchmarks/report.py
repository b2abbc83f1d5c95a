"""How figures are printed: one JSON line each; percentiles over interleaved rounds."""

from __future__ import annotations

import json
import sys


def percentile(values: list[float], share: float) -> float:
    """Nearest rank."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def figure(name: str, value: float, unit: str, ratio_to: str | None = None, peer: float | None = None) -> None:
    ratio = None if ratio_to is None or not peer else round(value / peer, 3)
    print(json.dumps({"name": name, "value": round(value, 3), "unit": unit, "ratio_to": ratio_to, "ratio": ratio}), flush=True)


def percentiles(name: str, values: list[float], unit: str, ratio_to: str | None = None, peer: list[float] | None = None) -> None:
    """The p50 under the bare name, p95 and p99 with a suffix; of fewer than 20 values or 100 they are the largest."""
    for suffix, share in (("", 0.5), ("_p95", 0.95), ("_p99", 0.99)):
        figure(name + suffix, percentile(values, share), unit, ratio_to, percentile(peer, share) if peer else None)


def note(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
