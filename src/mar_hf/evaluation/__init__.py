# SPDX-License-Identifier: Apache-2.0
"""Evaluation: many pictures, reproducibly, and how near they are to real ones.

Metrics and plots need `pip install "mar_hf[eval]"`. Libraries of that extra are imported when they are needed.
"""

from .classes import choose_classes, class_folders, class_name, class_names, safe_name
from .features import FEATURES, extract
from .folders import claim_folder
from .judge import Judge
from .machine import describe_machine, describe_versions
from .metrics import (
    Classifier,
    diversity,
    frechet_distance,
    inception_score,
    kernel_distance,
    psnr,
    read_statistics,
    statistics,
    write_statistics,
)
from .neighbours import memorised, nearest_neighbours, precision_recall
from .pictures import Pictures
from .sampling import (
    generate,
    generate_batch,
    image_generator,
    load_pipeline,
    use_scheduler,
    use_text_encoder,
    weights_digest,
)
from .speed import median_seconds


__all__ = [
    "FEATURES",
    "Classifier",
    "Judge",
    "Pictures",
    "choose_classes",
    "claim_folder",
    "class_folders",
    "class_name",
    "class_names",
    "describe_machine",
    "describe_versions",
    "diversity",
    "extract",
    "frechet_distance",
    "generate",
    "generate_batch",
    "image_generator",
    "inception_score",
    "kernel_distance",
    "load_pipeline",
    "median_seconds",
    "memorised",
    "nearest_neighbours",
    "precision_recall",
    "psnr",
    "read_statistics",
    "safe_name",
    "statistics",
    "use_scheduler",
    "use_text_encoder",
    "weights_digest",
    "write_statistics",
]
