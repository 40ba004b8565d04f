# SPDX-License-Identifier: Apache-2.0
"""scikit-learn's handwritten digits as an image folder, one sub-folder a class.

    python examples/prepare_digits.py data/digits --test_fraction 0.2

1,797 grey pictures of 8 x 8 pixels in 10 classes, 174 to 183 each; nothing is downloaded. Data: E. Alpaydin and C.
Kaynak, Optical Recognition of Handwritten Digits, UCI Machine Learning Repository (test set), CC BY 4.0.
"""

import argparse
import pathlib

from mar_hf_settings import Parser, check_counts, told_in_a_line


def parse_args() -> argparse.Namespace:
    """The options, checked."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output_dir", type=pathlib.Path)
    parser.add_argument("--test_fraction", type=float, default=0.0, help="share of each class kept in `test`")
    parser.add_argument("--max_per_class", type=int, metavar="N", help="the first N of each class; default: all")
    args = parser.parse_args()
    check_counts(args, max_per_class=1)
    if not 0 <= args.test_fraction < 1:
        raise ValueError(f"`--test_fraction` has to lie in [0, 1), got {args.test_fraction}.")
    return args


def main(args: argparse.Namespace) -> None:
    """Write the folder."""
    import numpy as np
    from PIL import Image
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    data = load_digits()
    chosen = np.arange(len(data.target))
    if args.max_per_class is not None:
        chosen = np.concatenate([np.flatnonzero(data.target == digit)[: args.max_per_class] for digit in range(10)])
    splits = {"train": chosen}
    if args.test_fraction:
        labels = data.target[chosen]
        parts = train_test_split(chosen, test_size=args.test_fraction, stratify=labels, random_state=0)
        splits = {"train": parts[0], "test": parts[1]}
    for split, indices in splits.items():
        for index in indices:
            folder = args.output_dir / split / str(data.target[index])
            folder.mkdir(parents=True, exist_ok=True)
            # Levels 0..16, white on black.
            picture = Image.fromarray((data.images[index] * 255 / 16).round().astype(np.uint8))
            picture.save(folder / f"{index:04d}.png")
        print(f"{len(indices)} pictures in {args.output_dir / split}")


if __name__ == "__main__":
    with told_in_a_line():
        main(parse_args())
