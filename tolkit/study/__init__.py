"""The paper's study for a checkpoint of one's own: one command a table or figure.

A new study is one file with a class like the others, and one line in `registry.py`.
"""

from tolkit.study.registry import STUDIES
from tolkit.study.report import StudyReport
from tolkit.study.run import run_study
from tolkit.study.spec import StudySpec
from tolkit.study.study import Study

__all__ = ["STUDIES", "Study", "StudyReport", "StudySpec", "run_study"]
