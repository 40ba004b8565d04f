# SPDX-License-Identifier: Apache-2.0
"""Encode a folder of pictures once, to train from it without the autoencoder.

    accelerate launch examples/cache_latents.py --train_data_dir data/emoji --pretrained_tokenizer out/tokenizer \\
        --resolution 32 --output_dir data/emoji_latents

`--help` lists the settings. The same without a clone of the repository is
`accelerate launch -m mar_hf.training latents`.
"""

import sys

from mar_hf_settings import answer_training_early


if __name__ == "__main__":  # what is refused is refused before the imports below, which take seconds
    answer_training_early(["latents", *sys.argv[1:]])

from mar_hf.training.programs import run_cache


if __name__ == "__main__":
    run_cache()
