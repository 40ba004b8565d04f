# SPDX-License-Identifier: Apache-2.0
"""Train a small text encoder and its tokenizer from nothing but captions; no weights are downloaded.

    python examples/train_text_encoder.py --train_data_dir data/emoji_text --output_dir out/text

`--help` lists the settings. The same without a clone of the repository is
`accelerate launch -m mar_hf.training text_encoder`.

To change what a step is, subclass `TextEncoderTrainer` here and override the method.
"""

import sys

from mar_hf_settings import answer_training_early


if __name__ == "__main__":  # what is refused is refused before the imports below, which take seconds
    answer_training_early(["text_encoder", *sys.argv[1:]])

from mar_hf.training import TextEncoderTrainer
from mar_hf.training.programs import run_trainer


if __name__ == "__main__":
    run_trainer(TextEncoderTrainer)
