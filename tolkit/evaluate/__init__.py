"""Is the compressed model still as good? Windows of text, metrics with errors, gates, reports."""

from tolkit.evaluate.baseline import Baseline, load_baseline, planned_setting, setting_of
from tolkit.evaluate.evaluate import evaluate, without_text
from tolkit.evaluate.gates import (
    GATE_METRICS,
    Gate,
    GateVerdict,
    check_gates,
    load_gates,
    parse_gate,
    require_baseline,
    require_gate_partners,
    require_gates,
)
from tolkit.evaluate.junit import to_junit
from tolkit.evaluate.quality import append_quality, quality_record
from tolkit.evaluate.reports import append_step_summary, to_json, to_markdown
from tolkit.evaluate.result import (
    METRIC_NAMES,
    Conditions,
    EvalResult,
    Metric,
    TaskItems,
    WindowSums,
)
from tolkit.evaluate.runnable import Adjust, Runnable
from tolkit.evaluate.windows import Window, Windows, windows_of

__all__ = [
    "GATE_METRICS",
    "METRIC_NAMES",
    "Adjust",
    "Baseline",
    "Conditions",
    "EvalResult",
    "Gate",
    "GateVerdict",
    "Metric",
    "Runnable",
    "TaskItems",
    "Window",
    "WindowSums",
    "Windows",
    "append_quality",
    "append_step_summary",
    "check_gates",
    "evaluate",
    "load_baseline",
    "load_gates",
    "parse_gate",
    "planned_setting",
    "quality_record",
    "require_baseline",
    "require_gates",
    "require_gate_partners",
    "setting_of",
    "to_json",
    "to_junit",
    "to_markdown",
    "windows_of",
    "without_text",
]
