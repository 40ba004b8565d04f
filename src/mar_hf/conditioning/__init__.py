# SPDX-License-Identifier: Apache-2.0
"""What a picture is generated from besides its class."""

from .text import TextAligner, TextContext


__all__ = ["TextAligner", "TextContext"]
