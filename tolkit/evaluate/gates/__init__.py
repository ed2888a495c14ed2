"""Conditions a bundle must meet to ship: how they are written, and what became of them."""

from tolkit.evaluate.gates.syntax import GATE_METRICS, Gate, load_gates, parse_gate
from tolkit.evaluate.gates.verdicts import (
    GateVerdict,
    check_gates,
    require_baseline,
    require_gate_partners,
    require_gates,
)

__all__ = [
    "GATE_METRICS",
    "Gate",
    "GateVerdict",
    "check_gates",
    "load_gates",
    "parse_gate",
    "require_baseline",
    "require_gate_partners",
    "require_gates",
]
