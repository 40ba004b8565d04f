# SPDX-License-Identifier: Apache-2.0
"""Schedulers of the token heads."""

from .scheduling_token_base import TokenScheduler, TokenSchedulerOutput
from .scheduling_token_ddpm import TokenDDPMScheduler
from .scheduling_token_flow import TokenFlowScheduler


__all__ = ["TokenDDPMScheduler", "TokenFlowScheduler", "TokenScheduler", "TokenSchedulerOutput"]
