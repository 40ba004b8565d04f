# SPDX-License-Identifier: Apache-2.0
"""Pipelines."""

from ..generation import GENERATION_DEFAULTS
from .pipeline_mar import MARPipeline


__all__ = ["GENERATION_DEFAULTS", "MARPipeline"]
