"""What looking up table rows has cost: the counts every source of rows keeps.

They are those of the bundle format, whose numpy reader keeps them too.
"""

from __future__ import annotations

from tolkit_formats.row_statistics import TableStatistics

__all__ = ["TableStatistics"]
