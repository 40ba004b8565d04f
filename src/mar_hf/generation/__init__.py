# SPDX-License-Identifier: Apache-2.0
"""Which tokens appear when: orders, schedules, the plan of a call, training draws. Pure functions and tables."""

from ..utils import look_up
from .orders import (
    GENERATION_ORDERS,
    checkerboard_order,
    nearest_order,
    random_annealed_order,
    random_order,
    random_ratio,
    raster_order,
    spiral_order,
    subsampled_order,
    zigzag_order,
)
from .plan import (
    GENERATION_DEFAULTS,
    GenerationPlan,
    GenerationSettings,
    GenerationStep,
    build_settings,
    check_orders,
    plan_generation,
    plan_steps,
)
from .schedules import (
    GUIDANCE_SCHEDULES,
    HEAD_STEP_SCHEDULES,
    TOKEN_SCHEDULES,
    constant_guidance,
    constant_head_steps,
    constant_tokens_per_step,
    cosine_tokens_per_step,
    guidance_within,
    linear_guidance,
    linear_head_steps,
    settings_for_budget,
)
from .training_draws import (
    sample_mask,
    sample_num_masked,
    sample_tokens_per_step,
)


__all__ = [
    "GENERATION_DEFAULTS",
    "GENERATION_ORDERS",
    "GUIDANCE_SCHEDULES",
    "HEAD_STEP_SCHEDULES",
    "TOKEN_SCHEDULES",
    "GenerationPlan",
    "GenerationSettings",
    "GenerationStep",
    "build_settings",
    "check_orders",
    "checkerboard_order",
    "constant_guidance",
    "constant_head_steps",
    "constant_tokens_per_step",
    "cosine_tokens_per_step",
    "guidance_within",
    "linear_guidance",
    "linear_head_steps",
    "look_up",
    "nearest_order",
    "plan_generation",
    "plan_steps",
    "random_annealed_order",
    "random_order",
    "random_ratio",
    "raster_order",
    "sample_mask",
    "sample_num_masked",
    "sample_tokens_per_step",
    "settings_for_budget",
    "spiral_order",
    "subsampled_order",
    "zigzag_order",
]
