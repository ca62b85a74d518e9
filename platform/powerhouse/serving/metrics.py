"""The metrics of a replica, under vLLM's names with our prefix. [Ray]

Ray exports them to Prometheus as `ray_powerhouse_...`, tagged with application, deployment and replica.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from ray.serve import metrics

from powerhouse.telemetry import Gauge

_SECONDS = [0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60]
_GAUGES = {
    "num_requests_running": "Requests that have blocks of the cache.",
    "num_requests_waiting": "Requests that wait for room.",
    "kv_cache_usage_perc": "Share of the cache's blocks in use, 0 to 1.",
    "num_preemptions": "Requests that gave up their blocks to older ones, since the start.",
    "prefix_cache_queries": "Tokens looked up in the prefix cache, since the start.",
    "prefix_cache_hits": "Tokens of these that were found.",
}
_COUNTERS = {
    "prompt_tokens_total": "Prompt tokens of requests that got a first token.",
    "generation_tokens_total": "Tokens generated.",
    "request_success_total": "Requests that came to their end.",
}
_HISTOGRAMS = {
    "time_to_first_token_seconds": "From the request's arrival to its first token.",
    "inter_token_latency_seconds": "Between two outputs of a request.",
    "e2e_request_latency_seconds": "From the request's arrival to its end.",
}


def make_recorder(num_stages: int) -> Gauge:
    """Make the function that takes a metric's name and a number: to set, to add or to observe, by the metric's kind."""
    actions: dict[str, Callable[[float], None]] = {}
    for name, text in _GAUGES.items():
        actions[name] = metrics.Gauge(f"powerhouse_{name}", text).set
    bubble = metrics.Gauge("powerhouse_pipeline_bubble", "Share of time a stage waits for others, 0 to 1.", tag_keys=("stage",))
    for stage in range(num_stages):
        actions[f"pipeline_bubble_{stage}"] = partial(bubble.set, tags={"stage": str(stage)})
    for name, text in _COUNTERS.items():
        actions[name] = metrics.Counter(f"powerhouse_{name}", text).inc
    for name, text in _HISTOGRAMS.items():
        actions[name] = metrics.Histogram(f"powerhouse_{name}", text, boundaries=_SECONDS).observe

    def record(name: str, value: float) -> None:
        actions[name](value)

    return record
