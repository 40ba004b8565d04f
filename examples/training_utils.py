# SPDX-License-Identifier: Apache-2.0
"""Names of `mar_hf.training` under their old place."""

from mar_hf.training import make_accelerator, parse_arguments  # noqa: F401
