# SPDX-License-Identifier: Apache-2.0
"""Backbones. A new one is a pair of files and a pair of lines here."""

from transformers import AutoConfig, AutoModel

from .configuration_mar import PRESETS, MARConfig
from .modeling_mar import MARForImageGeneration, MARModel, MARPreTrainedModel
from .modeling_outputs import BackboneOutput


AutoConfig.register(MARConfig.model_type, MARConfig, exist_ok=True)
AutoModel.register(MARConfig, MARModel, exist_ok=True)

__all__ = ["PRESETS", "BackboneOutput", "MARConfig", "MARForImageGeneration", "MARModel", "MARPreTrainedModel"]
