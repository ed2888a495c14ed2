"""Is the compressed model still as good? Windows of text, metrics with errors, gates, reports."""

from tolkit.evaluate.evaluate import evaluate
from tolkit.evaluate.gates import (
    GATE_METRICS,
    Gate,
    GateVerdict,
    check_gates,
    load_gates,
    parse_gate,
    require_gates,
)
from tolkit.evaluate.quality import append_quality, quality_record
from tolkit.evaluate.reports import append_step_summary, to_json, to_junit, to_markdown
from tolkit.evaluate.result import METRIC_NAMES, Conditions, EvalResult, Metric
from tolkit.evaluate.runnable import Adjust, Runnable
from tolkit.evaluate.windows import Window, Windows, windows_of

__all__ = [
    "GATE_METRICS",
    "METRIC_NAMES",
    "Adjust",
    "Conditions",
    "EvalResult",
    "Gate",
    "GateVerdict",
    "Metric",
    "Runnable",
    "Window",
    "Windows",
    "append_quality",
    "append_step_summary",
    "check_gates",
    "evaluate",
    "load_gates",
    "parse_gate",
    "quality_record",
    "require_gates",
    "to_json",
    "to_junit",
    "to_markdown",
    "windows_of",
]
