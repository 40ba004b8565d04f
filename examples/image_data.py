# SPDX-License-Identifier: Apache-2.0
"""Names of `mar_hf.training` under their old place."""

from mar_hf.training import ImageTransform, center_crop, load_image_dataset  # noqa: F401
