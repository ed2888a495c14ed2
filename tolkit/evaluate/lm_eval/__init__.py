"""Any task of lm-evaluation-harness, its results in tolkit's form."""

from tolkit.evaluate.lm_eval.result import HarnessResult
from tolkit.evaluate.lm_eval.run import run_lm_eval

__all__ = ["HarnessResult", "run_lm_eval"]
