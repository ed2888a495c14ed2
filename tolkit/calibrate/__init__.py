"""How much an error of each table matters: the local Fisher metric (`tol calibrate`)."""

from tolkit.calibrate.measure import CalibrationSpec, Measured, calibrate
from tolkit.calibrate.metric_file import Calibration, load_metric, save_metric

__all__ = [
    "Calibration",
    "CalibrationSpec",
    "Measured",
    "calibrate",
    "load_metric",
    "save_metric",
]
