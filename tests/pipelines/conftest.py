# SPDX-License-Identifier: Apache-2.0
"""Pipelines for the tests of this folder."""

import pytest

from tiny_pipelines import tiny_pipeline, tiny_text_pipeline


@pytest.fixture(params=["mar", "ar", "mar-null-text", "ar-null-text"])
def pipe(request):
    """A pipeline with either backbone; one that takes texts is asked for classes here, with the null text."""
    backbone, _, text = request.param.partition("-")
    return tiny_text_pipeline(backbone=backbone) if text else tiny_pipeline(backbone=backbone)
