# SPDX-License-Identifier: Apache-2.0
"""What a picture is generated from besides its class."""

from .text import TextAligner, TextContext, check_text_encoder, encode_texts, load_text_encoder


__all__ = ["TextAligner", "TextContext", "check_text_encoder", "encode_texts", "load_text_encoder"]
