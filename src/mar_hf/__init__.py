# SPDX-License-Identifier: Apache-2.0
"""Image generation with autoregressive models over continuous tokens.

Importing the package registers its classes with diffusers and with the Auto classes of transformers, so that
checkpoints that name them load from a folder and from the hub.
"""

import sys

from mar_hf_settings import answer_training_early


# `python -m` imports the package before the program in it. Until that runs, its words stand behind "-m".
if sys.argv[:1] == ["-m"] and sys.orig_argv[-len(sys.argv)] == "mar_hf.training":
    answer_training_early()

from diffusers import SchedulerMixin
from diffusers.pipelines.pipeline_loading_utils import LOADABLE_CLASSES
from transformers import PreTrainedModel

from . import conversion, generation
from .demo import demo_checkpoint, demo_text_encoder
from .heads import (
    TOKEN_HEADS,
    CategoricalHead,
    DiffusionHead,
    EnergyHead,
    FlowMatchingHead,
    MixtureHead,
    ShortcutHead,
    TokenHead,
)
from .hub import build_model_card
from .models import (
    ARConfig,
    ARForImageGeneration,
    ARModel,
    BackboneOutput,
    MARConfig,
    MARForImageGeneration,
    MARModel,
)
from .pipelines import MARPipeline
from .schedulers import TokenDDPMScheduler, TokenFlowScheduler
from .tokenizers import ImageTokenizer, ImageTokenizerConfig


__version__ = "0.1.0"

# diffusers looks up the base class by name in the library that model_index.json names: this package.
_LOADING_METHODS = ["save_pretrained", "from_pretrained"]
LOADABLE_CLASSES.setdefault(
    __name__, {PreTrainedModel.__name__: _LOADING_METHODS, SchedulerMixin.__name__: _LOADING_METHODS}
)


__all__ = [
    "TOKEN_HEADS",
    "ARConfig",
    "ARForImageGeneration",
    "ARModel",
    "BackboneOutput",
    "CategoricalHead",
    "DiffusionHead",
    "EnergyHead",
    "FlowMatchingHead",
    "ImageTokenizer",
    "ImageTokenizerConfig",
    "MARConfig",
    "MARForImageGeneration",
    "MARModel",
    "MARPipeline",
    "MixtureHead",
    "ShortcutHead",
    "TokenDDPMScheduler",
    "TokenFlowScheduler",
    "TokenHead",
    "build_model_card",
    "conversion",
    "demo_checkpoint",
    "demo_text_encoder",
    "generation",
]
