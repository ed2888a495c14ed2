"""Table rows while a model runs: stored, compressed, on the device, on the host or on disk."""

from tolkit.runtime.rows import TABLE_PLACES, TableRows, open_table_rows
from tolkit.runtime.statistics import TableStatistics

__all__ = ["TABLE_PLACES", "TableRows", "TableStatistics", "open_table_rows"]
