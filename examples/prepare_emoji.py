# SPDX-License-Identifier: Apache-2.0
"""Emoji pictures as an image folder, one sub-folder a class, with captions if asked for.

    python examples/prepare_emoji.py data/emoji --size 32 --classes face heart clock
    python examples/prepare_emoji.py data/emoji_text --skin-tones --captions --hold-out 0.05
    python examples/prepare_emoji.py data/emoji_split --test-fraction 0.2

Takes Noto Emoji from a pinned npm package (`npm pack`, about 80 MB), and their names and keywords from a second one;
or all of it from an .npz that holds the arrays `image`, `label`, `classes`, `code`, `toned` and, for captions, `name`
and `tags`. With `--captions` every split gets a `metadata.jsonl`, as `datasets` reads it: `file_name`, `text` (several
captions), `label` (the class) and, where a person's name is made of the three, `role`, `gender` and `tone`. Some of
these combinations can be held out: `--hold-out` puts them into a `test` split. `--test-fraction` puts a share of each
class there instead.

Images: Noto Emoji v2.048, Copyright Google LLC, Apache License 2.0, taken from emoji-datasource-google 16.0.0;
composited on white, resized, duplicates and flags removed. Names and keywords: Unicode CLDR (Unicode License v3),
taken from emojibase-data 17.0.0 (MIT, Copyright Miles Johnson).
"""

import argparse
import collections
import io
import itertools
import json
import pathlib
import re
import subprocess
import tarfile
import tempfile
from dataclasses import dataclass, field

import numpy as np
from PIL import Image

from mar_hf_settings import Parser, told_in_a_line


PICTURES = "emoji-datasource-google@16.0.0"
NAMES = "emojibase-data@17.0.0"
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
GENDERS = ("man", "woman", "person")
TONES = ("light", "medium-light", "medium", "medium-dark", "dark")
# "woman cook: dark skin tone", "man: light skin tone, red hair"; whoever has no gender is a person.
TONED_NAME = re.compile(rf"(?:({'|'.join(GENDERS)})\b ?)?([^:]*): ({'|'.join(TONES)}) skin tone(, .+)?")
MIRRORED = ", facing right"


@dataclass
class Emoji:
    """A picture and what is known of it.

    Args:
        picture (`np.ndarray` of shape `(height, width, 3)`): on white.
        label (`str`): its class.
        code (`str`): its code points.
        toned (`bool`): whether it is the variant of another in some skin tone.
        name (`str`, *optional*, defaults to `""`): in words, without captions empty.
        tags (`list[str]`, *optional*, defaults to `[]`): keywords.
    """

    picture: np.ndarray
    label: str
    code: str
    toned: bool
    name: str = ""
    tags: list[str] = field(default_factory=list)


def read_package(package: str, *wanted: str) -> dict[str, bytes]:
    """The members of an npm package whose paths begin in one of the wanted ways, by path."""
    with tempfile.TemporaryDirectory() as folder:
        command = ["npm", "pack", "--silent", package]
        name = subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True).stdout.split()[-1]
        with tarfile.open(pathlib.Path(folder, name)) as archive:
            members = ((member, member.name.removeprefix("package/")) for member in archive)
            return {path: archive.extractfile(member).read() for member, path in members if path.startswith(wanted)}


def on_white(data: bytes) -> np.ndarray:
    """A PNG's bytes as an RGB array on a white background."""
    picture = Image.open(io.BytesIO(data)).convert("RGBA")
    return np.asarray(Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture).convert("RGB"))


def read_names() -> dict[str, tuple[str, list[str]]]:
    """Code points without variation selectors -> name and keywords."""
    names = {}
    for entry in json.loads(read_package(NAMES, "en/data.json")["en/data.json"]):
        for variant in [entry, *entry.get("skins", [])]:
            names[variant["hexcode"].replace("-FE0F", "")] = (variant["label"], entry.get("tags", []))
    return names


def emoji_from_packages(captions: bool) -> list[Emoji]:
    """Every distinct emoji, in Unicode's order."""
    names = read_names() if captions else collections.defaultdict(lambda: ("", []))
    files = read_package(PICTURES, "emoji.json", "img/google/64/")
    emoji, seen = [], set()
    for entry in sorted(json.loads(files["emoji.json"]), key=lambda entry: entry["sort_order"]):
        if entry["category"] in ("Flags", "Component") or not entry["has_img_google"]:
            continue
        key = f"{entry['category']}/{entry['subcategory']}"
        label = next(name for name, prefixes in CLASSES.items() if key.startswith(tuple(prefixes)))
        for variant in [entry, *entry.get("skin_variations", {}).values()]:
            picture, code = on_white(files[f"img/google/64/{variant['image']}"]), variant["unified"]
            if picture.tobytes() not in seen:
                seen.add(picture.tobytes())
                emoji.append(Emoji(picture, label, code, variant is not entry, *names[code.replace("-FE0F", "")]))
    return emoji


def emoji_from_npz(path: str, captions: bool) -> list[Emoji]:
    """The same from an .npz file."""
    with np.load(path, allow_pickle=False) as arrays:
        missing = {"image", "label", "classes", "code", "toned", *(("name", "tags") if captions else ())} - {*arrays}
        if missing:
            raise ValueError(f"`--npz` {path!r} lacks the arrays {sorted(missing)}.")
        columns = [arrays["image"], arrays["classes"][arrays["label"]].tolist()]
        columns += [arrays["code"].tolist(), arrays["toned"].tolist()]
        if captions:
            tags = [[tag for tag in row.split("|") if tag] for row in arrays["tags"].tolist()]
            columns += [arrays["name"].tolist(), tags]
    return [Emoji(*row) for row in zip(*columns, strict=True)]


def captions_of(emoji: Emoji) -> list[str]:
    """The name; the same as a phrase, if it ends in a skin tone; the name and up to three pairs of keywords.

    Apostrophes are straight, as people type them.
    """
    captions = [emoji.name]
    if TONED_NAME.fullmatch(emoji.name):
        captions.append(emoji.name.replace(": ", " with "))
    # Keywords call some women men.
    known = {*re.findall(r"\w+", emoji.name.lower()), *GENDERS}
    tags = [tag for tag in emoji.tags if not known.issuperset(re.findall(r"\w+", tag.lower()))][:6]
    captions += [", ".join([emoji.name, *tags[i : i + 2]]) for i in range(0, len(tags), 2)]
    return [caption.replace("\u2019", "'") for caption in captions]


def find_people(emoji: list[Emoji]) -> dict[str, tuple[str, str, str]]:
    """Code points -> (role, gender, tone), for roles that are there in all genders and tones."""
    people = {}
    for one in emoji:
        found = TONED_NAME.fullmatch(one.name)
        role = ((found[2] or "") + (found[4] or "")).removeprefix(", ") if found else ""
        if role:
            people[one.code] = (role, found[1] or "person", found[3])
    complete = collections.Counter(role for role, _, _ in set(people.values()))
    return {code: person for code, person in people.items() if complete[person[0]] == len(GENDERS) * len(TONES)}


def choose_held_out(people: dict[str, tuple[str, str, str]], fraction: float) -> set[str]:
    """Code points of the people to hold out, always the same; each tone and gender of a role stays elsewhere.

    A role goes with its mirror image, or the picture held out would be there in the other direction. Roles take turns
    in a random order. Each walks diagonally through its 3 x 5 combinations, which meets every one of them once, and in
    the first half no tone in all its genders.
    """
    generator = np.random.default_rng(0)
    roles = generator.permutation(sorted({role.removesuffix(MIRRORED) for role, _, _ in people.values()})).tolist()
    starts = generator.integers(15, size=len(roles)).tolist()
    walk = ((role, start + turn) for turn in range(15) for role, start in zip(roles, starts, strict=True))
    chosen = itertools.islice(walk, round(fraction * 15 * len(roles)))
    triples = {(role, GENDERS[place % 3], TONES[place % 5]) for role, place in chosen}
    return {code for code, (role, *rest) in people.items() if (role.removesuffix(MIRRORED), *rest) in triples}


def choose_share(emoji: list[Emoji], fraction: float) -> set[str]:
    """Code points of a random share of each class, always the same."""
    generator = np.random.default_rng(0)
    chosen = set()
    for label in CLASSES:
        codes = [one.code for one in emoji if one.label == label]
        chosen |= {codes[number] for number in generator.permutation(len(codes))[: round(fraction * len(codes))]}
    return chosen


def parse_args() -> argparse.Namespace:
    """The options, checked."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output_dir", type=pathlib.Path)
    parser.add_argument("--npz", help="take the pictures from this file instead of the npm packages")
    parser.add_argument("--size", type=int, default=32, help="side in pixels (default 32)")
    parser.add_argument("--classes", nargs="+", choices=CLASSES, metavar="NAME", help="default: all 35 classes")
    parser.add_argument("--max-per-class", type=int, metavar="N", help="the first N of a class, in Unicode's order")
    parser.add_argument("--skin-tones", action="store_true", help="also the skin-tone variants")
    parser.add_argument("--captions", action="store_true", help="also captions")
    parser.add_argument(
        "--hold-out", type=float, default=0.0, metavar="SHARE", help="of all (role, gender, tone), kept in `test`"
    )
    parser.add_argument(
        "--test-fraction", type=float, default=0.0, metavar="SHARE", help="of each class, kept in `test`"
    )
    args = parser.parse_args()
    if args.max_per_class is not None and args.max_per_class < 1:
        raise ValueError(f"`--max-per-class` has to be at least 1, got {args.max_per_class}.")
    if not 0 <= args.hold_out <= 0.5:
        raise ValueError(f"`--hold-out` has to lie in [0, 0.5], got {args.hold_out}.")
    if args.hold_out and not (args.captions and args.skin_tones):
        raise ValueError("`--hold-out` goes with `--captions` and `--skin-tones` only.")
    if not 0 <= args.test_fraction < 1:
        raise ValueError(f"`--test-fraction` has to lie in [0, 1), got {args.test_fraction}.")
    if args.test_fraction and args.hold_out:
        raise ValueError("`--test-fraction` and `--hold-out` both choose what is in `test`: give one of them.")
    if args.size < 1:
        raise ValueError(f"`--size` has to be at least 1, got {args.size}.")
    return args


def main() -> None:
    """Write the folder."""
    args = parse_args()
    emoji = emoji_from_npz(args.npz, args.captions) if args.npz else emoji_from_packages(args.captions)
    emoji = [one for one in emoji if args.skin_tones or not one.toned]
    emoji = [one for one in emoji if not args.classes or one.label in args.classes]
    if args.max_per_class:
        places = collections.defaultdict(itertools.count)
        emoji = [one for one in emoji if next(places[one.label]) < args.max_per_class]
    people = find_people(emoji)
    held_out = choose_held_out(people, args.hold_out)
    if args.hold_out and not held_out:
        raise ValueError(f"`--hold-out` {args.hold_out} finds nothing to hold out among {len(people)} people.")
    held_out |= choose_share(emoji, args.test_fraction)
    rows = {"train": [], "test": []} if held_out else {"train": []}
    splits = ["test" if one.code in held_out else "train" for one in emoji]
    paths = [args.output_dir / split / one.label / f"{one.code}.png" for one, split in zip(emoji, splits, strict=True)]
    tables = {args.output_dir / split / "metadata.jsonl" for split in rows if args.captions}
    # What this run does not write again would stay among the pictures, without a caption or in the wrong split.
    if strays := sorted({path for path in args.output_dir.rglob("*") if path.is_file()} - {*paths, *tables}):
        raise ValueError(f"`output_dir` holds {len(strays)} other files, such as {str(strays[0])!r}: choose another.")
    for one, split, path in zip(emoji, splits, paths, strict=True):
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(one.picture).resize((args.size, args.size), Image.Resampling.LANCZOS).save(path)
        role, gender, tone = people.get(one.code, ("", "", ""))
        row = {"file_name": f"{one.label}/{path.name}", "text": captions_of(one), "label": one.label}
        rows[split].append({**row, "role": role, "gender": gender, "tone": tone})
    if args.captions:
        for split, lines in rows.items():
            text = "".join(f"{json.dumps(line, ensure_ascii=False)}\n" for line in lines)
            (args.output_dir / split / "metadata.jsonl").write_text(text, encoding="utf-8")
    for split, lines in rows.items():
        print(f"{len(lines)} pictures in {args.output_dir / split if held_out else args.output_dir}")


if __name__ == "__main__":
    with told_in_a_line():
        main()
