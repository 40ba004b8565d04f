# SPDX-License-Identifier: Apache-2.0
"""Train or fine-tune a model of classes or texts on a folder of pictures or on cached latents.

    accelerate launch examples/train.py --config examples/configs/emoji.json --train_data_dir data/emoji \\
        --pretrained_tokenizer out/tokenizer --output_dir out/mar

`--help` lists the settings. The same without a clone of the repository is `accelerate launch -m mar_hf.training`.

To change what a step is, which pictures are drawn or what is saved, subclass `Trainer` here and override the method;
`BaseTrainer` has the loop, the order of examples, exact resume and checkpoints.
"""

import sys

from mar_hf_settings import answer_training_early


if __name__ == "__main__":  # what is refused is refused before the imports below, which take seconds
    answer_training_early(["model", *sys.argv[1:]])

from mar_hf.training import Trainer
from mar_hf.training.programs import run_trainer


if __name__ == "__main__":
    run_trainer(Trainer)
