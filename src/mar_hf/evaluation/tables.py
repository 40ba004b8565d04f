# SPDX-License-Identifier: Apache-2.0
"""Results as tables."""

import statistics
from collections.abc import Sequence


def markdown_table(rows: Sequence[dict[str, str]]) -> str:
    """A table in Markdown.

    Args:
        rows (`Sequence[dict[str, str]]`): title of the column -> text; the first row has all columns.

    Returns:
        `str`: lines, the last one ended.
    """
    titles = list(rows[0])
    written = [titles, ["---"] * len(titles), *([row.get(title, "") for title in titles] for row in rows)]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in written)


def mean_and_deviation(values: Sequence[float]) -> list[float | None]:
    """Mean and sample deviation.

    Args:
        values (`Sequence[float]`): one or more.

    Returns:
        `list`: both; None instead of the deviation of a single value.
    """
    return [statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None]
