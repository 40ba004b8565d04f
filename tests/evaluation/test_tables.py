# SPDX-License-Identifier: Apache-2.0
"""Tables of results."""

import pytest

from mar_hf.evaluation.tables import markdown_table, mean_and_deviation


def test_a_table_in_markdown():
    rows = [{"name": "a", "fid": "1.5"}, {"name": "b"}]
    assert markdown_table(rows) == "| name | fid |\n| --- | --- |\n| a | 1.5 |\n| b |  |\n"


def test_mean_and_deviation():
    assert mean_and_deviation([1.0, 2.0, 3.0]) == [2.0, pytest.approx(1.0)]
    assert mean_and_deviation([4.0]) == [4.0, None]
