# SPDX-License-Identifier: Apache-2.0
"""Train a small image tokenizer on a folder of pictures.

    accelerate launch examples/train_tokenizer.py --config examples/configs/emoji_tokenizer.json \\
        --train_data_dir data/emoji --output_dir out/tokenizer

`--help` lists the settings. The same without a clone of the repository is
`accelerate launch -m mar_hf.training tokenizer`.

To change what a step is or what is measured, subclass `TokenizerTrainer` here and override the method.
"""

import sys

from mar_hf_settings import answer_training_early


if __name__ == "__main__":  # what is refused is refused before the imports below, which take seconds
    answer_training_early(["tokenizer", *sys.argv[1:]])

from mar_hf.training import TokenizerTrainer, latent_statistics, some_pictures  # noqa: F401
from mar_hf.training.programs import run_trainer


if __name__ == "__main__":
    run_trainer(TokenizerTrainer)
