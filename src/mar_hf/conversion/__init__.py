# SPDX-License-Identifier: Apache-2.0
"""Original MAR checkpoints and LDM-format KL autoencoders to `mar_hf` folders, and back."""

from .checkpoints import convert_checkpoint, export_checkpoint
from .configs import ORIGINAL_SCALING_FACTOR, infer_kl_config, infer_mar_config
from .names import convert_kl_state_dict, convert_mar_state_dict, export_kl_state_dict, export_mar_state_dict


__all__ = [
    "ORIGINAL_SCALING_FACTOR",
    "convert_checkpoint",
    "convert_kl_state_dict",
    "convert_mar_state_dict",
    "export_checkpoint",
    "export_kl_state_dict",
    "export_mar_state_dict",
    "infer_kl_config",
    "infer_mar_config",
]
