# SPDX-License-Identifier: Apache-2.0
"""Image tokenizers."""

from transformers import AutoConfig, AutoModel

from .configuration_image_tokenizer import ImageTokenizerConfig
from .modeling_image_tokenizer import AUTOENCODERS, ImageTokenizer, ImageTokenizerOutput
from .normalizers import NORMALIZERS


AutoConfig.register(ImageTokenizerConfig.model_type, ImageTokenizerConfig, exist_ok=True)
AutoModel.register(ImageTokenizerConfig, ImageTokenizer, exist_ok=True)

__all__ = ["AUTOENCODERS", "ImageTokenizer", "ImageTokenizerConfig", "ImageTokenizerOutput", "NORMALIZERS"]
