# SPDX-License-Identifier: Apache-2.0
"""Backbones. A new one is a pair of files and a line in `BACKBONES`."""

from transformers import AutoConfig, AutoModel

from .configuration_ar import ARConfig
from .configuration_backbone import BackboneConfig
from .configuration_mar import MARConfig
from .modeling_ar import ARForImageGeneration, ARModel, ARPreTrainedModel
from .modeling_backbone import BackbonePreTrainedModel, add_context_noise
from .modeling_mar import MARForImageGeneration, MARModel, MARPreTrainedModel
from .modeling_outputs import BackboneOutput
from .text_context import TextAligner, TextContext, check_text_encoder, encode_texts, load_text_encoder


# `model_type` of a configuration -> configuration, backbone, backbone with its head.
BACKBONES: dict[str, tuple[type[BackboneConfig], type[BackbonePreTrainedModel], type[BackbonePreTrainedModel]]] = {
    MARConfig.model_type: (MARConfig, MARModel, MARForImageGeneration),
    ARConfig.model_type: (ARConfig, ARModel, ARForImageGeneration),
}

for _name, (_config, _model, _) in BACKBONES.items():
    AutoConfig.register(_name, _config, exist_ok=True)
    AutoModel.register(_config, _model, exist_ok=True)

__all__ = [
    "BACKBONES",
    "ARConfig",
    "ARForImageGeneration",
    "ARModel",
    "ARPreTrainedModel",
    "BackboneConfig",
    "BackboneOutput",
    "BackbonePreTrainedModel",
    "MARConfig",
    "MARForImageGeneration",
    "MARModel",
    "MARPreTrainedModel",
    "TextAligner",
    "TextContext",
    "add_context_noise",
    "check_text_encoder",
    "encode_texts",
    "load_text_encoder",
]
