# SPDX-License-Identifier: Apache-2.0
"""Schedulers of the token heads."""

from .scheduling_token_ddpm import TokenDDPMScheduler, TokenDDPMSchedulerOutput


__all__ = ["TokenDDPMScheduler", "TokenDDPMSchedulerOutput"]
