"""Figures of a server in Prometheus' text format. No jax here."""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter

_SECONDS = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0)


class Histogram:
    """A histogram of durations in seconds."""

    def __init__(self):
        self._counts = [0] * (len(_SECONDS) + 1)
        self._sum = 0.0

    def add(self, seconds: float) -> None:
        """Count one more."""
        self._counts[bisect_left(_SECONDS, seconds)] += 1
        self._sum += seconds

    def lines(self, name: str) -> list[str]:
        """The series of one histogram."""
        total, lines = 0, []
        for bound, count in zip((*map(str, _SECONDS), "+Inf"), self._counts, strict=True):
            total += count
            lines.append(f'{name}_bucket{{le="{bound}"}} {total}')
        return [*lines, f"{name}_sum {self._sum:.6f}", f"{name}_count {total}"]


class Metrics:
    """Counters of a server."""

    def __init__(self):
        self.answers: Counter[tuple[str, int]] = Counter()
        self.first_token, self.answer = Histogram(), Histogram()

    def text(self, *, gauges: dict[str, tuple[str, float]], counters: dict[str, tuple[str, int]]) -> str:
        """All series; `gauges` and `counters` are `{name: (meaning, value)}`."""
        lines = _head("ctllm_http_answers_total", "counter", "answers by path and HTTP status")
        lines += [f'ctllm_http_answers_total{{path="{path}",status="{status}"}} {count}'
                  for (path, status), count in sorted(self.answers.items())]
        for kind, series in (("gauge", gauges), ("counter", counters)):
            for name, (meaning, value) in series.items():
                lines += [*_head(f"ctllm_{name}", kind, meaning), f"ctllm_{name} {value}"]
        for name, meaning, histogram in (
                ("ctllm_first_token_seconds", "from a request's arrival to its first token", self.first_token),
                ("ctllm_answer_seconds", "from a request's arrival to the end of its answer", self.answer)):
            lines += [*_head(name, "histogram", meaning), *histogram.lines(name)]
        return "\n".join(lines) + "\n"


def _head(name: str, kind: str, meaning: str) -> list[str]:
    return [f"# HELP {name} {meaning}", f"# TYPE {name} {kind}"]
