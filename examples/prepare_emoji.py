# SPDX-License-Identifier: Apache-2.0
"""Emoji pictures as an image folder, one sub-folder a class.

    python examples/prepare_emoji.py data/emoji --size 32 --classes face heart clock

Takes Noto Emoji from two pinned npm packages (`npm pack`, about 80 MB), or from an .npz that holds the arrays `image`,
`label`, `classes`, `code` and `toned`. Images: Noto Emoji v2.048, Copyright Google LLC, Apache License 2.0, taken from
emoji-datasource-google 16.0.0; composited on white, resized, duplicates and flags removed.
"""

import argparse
import io
import json
import pathlib
import subprocess
import tarfile
import tempfile

import numpy as np
from PIL import Image


PACKAGE = "emoji-datasource-google@16.0.0"
# Class name -> prefixes of "category/subcategory"; the first match wins.
CLASSES = {
    "face": ["Smileys & Emotion/face-"],
    "animal face": ["Smileys & Emotion/cat-face", "Smileys & Emotion/monkey-face"],
    "heart": ["Smileys & Emotion/heart"],
    "emotion mark": ["Smileys & Emotion/emotion"],
    "hand": ["People & Body/hand"],
    "body part": ["People & Body/body-parts"],
    "family": ["People & Body/family", "People & Body/person-symbol"],
    "sport person": ["People & Body/person-sport", "People & Body/person-resting"],
    "working person": ["People & Body/person-role"],
    "fantasy person": ["People & Body/person-fantasy"],
    "moving person": ["People & Body/person-activity"],
    "person": ["People & Body/"],
    "mammal": ["Animals & Nature/animal-mammal"],
    "bird": ["Animals & Nature/animal-bird"],
    "other animal": ["Animals & Nature/animal-"],
    "plant": ["Animals & Nature/plant-"],
    "fruit or vegetable": ["Food & Drink/food-fruit", "Food & Drink/food-vegetable"],
    "meal": ["Food & Drink/food-"],
    "drink": ["Food & Drink/"],
    "building": ["Travel & Places/place-", "Travel & Places/hotel"],
    "vehicle": ["Travel & Places/transport-"],
    "sky": ["Travel & Places/sky & weather"],
    "clock": ["Travel & Places/time"],
    "sport or game": ["Activities/sport", "Activities/game", "Activities/award-medal"],
    "celebration": ["Activities/"],
    "clothing": ["Objects/clothing"],
    "music or sound": ["Objects/music", "Objects/sound", "Objects/musical-instrument"],
    "device": ["Objects/computer", "Objects/phone", "Objects/light & video", "Objects/science", "Objects/medical"],
    "paper": ["Objects/book-paper", "Objects/mail", "Objects/office", "Objects/writing", "Objects/money"],
    "tool": ["Objects/tool", "Objects/lock"],
    "household": ["Objects/"],
    "arrow or button": ["Symbols/arrow", "Symbols/av-symbol"],
    "letter or number": [
        "Symbols/alphanum",
        "Symbols/keycap",
        "Symbols/math",
        "Symbols/punctuation",
        "Symbols/currency",
    ],
    "shape": ["Symbols/geometric"],
    "sign": ["Symbols/"],
}


def read_package() -> dict[str, bytes]:
    """The members of the npm package that hold the pictures and their table, by path."""
    with tempfile.TemporaryDirectory() as folder:
        command = ["npm", "pack", "--silent", PACKAGE]
        name = subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True).stdout.split()[-1]
        with tarfile.open(pathlib.Path(folder, name)) as archive:
            members = ((member, member.name.removeprefix("package/")) for member in archive)
            wanted = ("emoji.json", "img/google/64/")
            return {path: archive.extractfile(member).read() for member, path in members if path.startswith(wanted)}


def on_white(data: bytes) -> np.ndarray:
    """A PNG's bytes as an RGB array on a white background."""
    picture = Image.open(io.BytesIO(data)).convert("RGBA")
    return np.asarray(Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture).convert("RGB"))


def emoji_from_package() -> list[tuple[np.ndarray, str, str, bool]]:
    """(picture, class name, code points, has a skin tone) of every distinct emoji, in Unicode's order."""
    files = read_package()
    rows, seen = [], set()
    for entry in sorted(json.loads(files["emoji.json"]), key=lambda entry: entry["sort_order"]):
        if entry["category"] in ("Flags", "Component") or not entry["has_img_google"]:
            continue
        key = f"{entry['category']}/{entry['subcategory']}"
        label = next(name for name, prefixes in CLASSES.items() if key.startswith(tuple(prefixes)))
        for variant in [entry, *entry.get("skin_variations", {}).values()]:
            picture = on_white(files[f"img/google/64/{variant['image']}"])
            if picture.tobytes() not in seen:
                seen.add(picture.tobytes())
                rows.append((picture, label, variant["unified"], variant is not entry))
    return rows


def emoji_from_npz(path: str) -> list[tuple[np.ndarray, str, str, bool]]:
    """The same rows from an .npz file."""
    with np.load(path, allow_pickle=False) as arrays:
        names = arrays["classes"][arrays["label"]]
        return list(zip(arrays["image"], map(str, names), map(str, arrays["code"]), map(bool, arrays["toned"])))


def main() -> None:
    """Write the folder."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output_dir", type=pathlib.Path)
    parser.add_argument("--npz", help="take the pictures from this file instead of the npm package")
    parser.add_argument("--size", type=int, default=32, help="side in pixels (default 32)")
    parser.add_argument("--classes", nargs="+", choices=CLASSES, metavar="NAME", help="default: all 35 classes")
    parser.add_argument("--skin-tones", action="store_true", help="also the skin-tone variants")
    args = parser.parse_args()
    rows = emoji_from_npz(args.npz) if args.npz else emoji_from_package()
    count = 0
    for picture, label, code, toned in rows:
        if (toned and not args.skin_tones) or (args.classes and label not in args.classes):
            continue
        folder = args.output_dir / "train" / label
        folder.mkdir(parents=True, exist_ok=True)
        picture = Image.fromarray(picture).resize((args.size, args.size), Image.Resampling.LANCZOS)
        picture.save(folder / f"{code}.png")
        count += 1
    print(f"{count} pictures in {args.output_dir}")


if __name__ == "__main__":
    main()
