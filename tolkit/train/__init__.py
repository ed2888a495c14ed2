"""Training: memory, flex and dense models on text, with exact resume."""

from tolkit.train.loop import train
from tolkit.train.report import HeldOut, TrainReport
from tolkit.train.spec import RECIPES, Recipe, TrainSpec

__all__ = ["RECIPES", "HeldOut", "Recipe", "TrainReport", "TrainSpec", "train"]
