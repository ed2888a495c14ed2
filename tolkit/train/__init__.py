"""Training: memory, flex and dense models on text, with exact resume; healing around tables."""

from tolkit.train.loop import train
from tolkit.train.plan import TrainPlan, plan_run
from tolkit.train.report import HeldOut, TrainReport
from tolkit.train.spec import HEALING, RECIPES, TUNING, Recipe, TrainSpec

__all__ = [
    "HEALING",
    "RECIPES",
    "TUNING",
    "HeldOut",
    "Recipe",
    "TrainPlan",
    "TrainReport",
    "TrainSpec",
    "plan_run",
    "train",
]
