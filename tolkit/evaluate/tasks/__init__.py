"""The paper's evaluation tasks, from local files, equal to lm-evaluation-harness'.

A new task is one new file and one line in `registry`.
"""

from tolkit.evaluate.tasks.base import Item, Page, Task, TaskItem
from tolkit.evaluate.tasks.measures import METRICS, change_metrics, task_metrics
from tolkit.evaluate.tasks.outcomes import Outcome
from tolkit.evaluate.tasks.registry import TASKS, TaskData, find_tasks, load_task
from tolkit.evaluate.tasks.result import TaskConditions, TaskResult
from tolkit.evaluate.tasks.run import evaluate_tasks

__all__ = [
    "METRICS",
    "TASKS",
    "Item",
    "Outcome",
    "Page",
    "Task",
    "TaskConditions",
    "TaskData",
    "TaskItem",
    "TaskResult",
    "change_metrics",
    "evaluate_tasks",
    "find_tasks",
    "load_task",
    "task_metrics",
]
