"""Running a model: its table rows, stored compressed on the device, the host or disk, and text."""

from tolkit.runtime.generation import Generation, GenerationStatistics
from tolkit.runtime.rows import TABLE_PLACES, TableRows, open_table_rows
from tolkit.runtime.sampling import GenerateSpec
from tolkit.runtime.session import Session, load_session
from tolkit.runtime.statistics import TableStatistics

__all__ = [
    "TABLE_PLACES",
    "GenerateSpec",
    "Generation",
    "GenerationStatistics",
    "Session",
    "TableRows",
    "TableStatistics",
    "load_session",
    "open_table_rows",
]
