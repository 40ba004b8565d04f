# SPDX-License-Identifier: Apache-2.0
"""Pipelines."""

from .pipeline_mar import GENERATION_DEFAULTS, MARPipeline


__all__ = ["GENERATION_DEFAULTS", "MARPipeline"]
