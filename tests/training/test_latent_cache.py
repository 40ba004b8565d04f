# SPDX-License-Identifier: Apache-2.0
"""Cached latents are what encoding gives, whoever wrote them and however often the run was stopped."""

import json
import pickle

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, VQModel
from PIL import Image
from safetensors.torch import load_file
from torch.utils.data import DataLoader

from example_runs import forget_accelerate, in_processes
from mar_hf import ImageTokenizer, ImageTokenizerConfig
from mar_hf.evaluation.experiments import run_script
from mar_hf.training import (
    ImageTransform,
    LatentCacheArguments,
    cache_latents,
    load_image_dataset,
    load_latents,
)
from mar_hf.training.latent_cache import tokenizer_digest
from snippets import ROOT


COUNTS = {"cat": 5, "dog": 2, "owl": 4}
SIZE = 16


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    folder, numbers = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    for name, count in COUNTS.items():
        (folder / name).mkdir()
        for number in range(count):
            pixels = numbers.integers(0, 256, (SIZE + number, 20, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{number}.png")
    return folder


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        autoencoder = AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            block_out_channels=(8, 8),
            norm_num_groups=4,
            latent_channels=2,
        )
    folder = tmp_path_factory.mktemp("tokenizer")
    ImageTokenizer.from_autoencoder(autoencoder, patch_size=2, scaling_factor=[0.5, 2.0]).save_pretrained(folder)
    return folder


def arguments(pictures, tokenizer, output_dir, **settings):
    settings = {"resolution": SIZE, "random_flip": True, "shard_size": 4, "batch_size": 3, **settings}
    return LatentCacheArguments(str(pictures), str(tokenizer), str(output_dir), **settings)


def cache(*args, **settings):
    cache_latents(arguments(*args, **settings))
    return args[2]


@pytest.fixture(scope="module")
def whole(pictures, tokenizer, tmp_path_factory):
    """A cache of three shards."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ACCELERATE_USE_CPU", "true")
        folder = cache(pictures, tokenizer, tmp_path_factory.mktemp("cache"))
        forget_accelerate()
    return folder


def files(folder):
    return {path.relative_to(folder): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def copy(folder, target):
    for name, content in files(folder).items():
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        (target / name).write_bytes(content)
    return target


def encoded(pictures, tokenizer):
    """Rows as they should be, from the tokenizer alone, one picture at a time."""
    dataset = load_image_dataset(str(pictures)).with_transform(ImageTransform(SIZE))
    with torch.no_grad():
        for row in dataset:
            picture = row["pixel_values"][None]
            values = (*tokenizer.encode_moments(picture), *tokenizer.encode_moments(picture.flip(3)))
            names = ("mean", "std", "mean_flipped", "std_flipped")
            yield {"label": row["label"], **{name: value[0] for name, value in zip(names, values, strict=True)}}


def test_latents_are_those_of_the_tokenizer(pictures, tokenizer, whole):
    latents = load_latents(str(whole))
    assert latents.least_label() == min(row["label"] for row in latents.__getitems__(range(len(latents))))
    assert len(latents) == 11 and latents.class_names == list(COUNTS)
    assert (latents.resolution, latents.latent_shape, latents.has_flipped) == (SIZE, (2, 8, 8), True)
    rows = latents.__getitems__(list(range(11)))
    assert [row["label"] for row in rows] == [0] * 5 + [1] * 2 + [2] * 4
    for row, expected in zip(rows, encoded(pictures, ImageTokenizer.from_pretrained(tokenizer)), strict=True):
        assert row.keys() == expected.keys() and row["label"] == expected["label"]
        for name in row.keys() - {"label"}:
            torch.testing.assert_close(row[name], expected[name], rtol=1e-5, atol=1e-5)
    assert not torch.equal(rows[0]["mean"], rows[0]["mean_flipped"])
    assert torch.equal(latents[-1]["mean"], rows[-1]["mean"])
    with pytest.raises(IndexError):
        latents[11]


def test_the_cache_holds_its_tokenizer(tokenizer, whole):
    kept, original = (ImageTokenizer.from_pretrained(folder) for folder in (whole / "tokenizer", tokenizer))
    assert kept.config.scaling_factor == [0.5, 2.0]
    for name, tensor in original.state_dict().items():
        assert torch.equal(kept.state_dict()[name], tensor)


def test_captions_are_left_out(pictures, tokenizer, whole, tmp_path):
    folder = copy(pictures, tmp_path / "pictures")
    lines = [
        json.dumps({"file_name": f"{name}/{number}.png", "label": name, "text": ["a"] * number})
        for name, count in COUNTS.items()
        for number in range(count)
    ]
    (folder / "metadata.jsonl").write_text("\n".join(lines), encoding="utf-8")
    captioned = load_latents(str(cache(folder, tokenizer, tmp_path / "cache")))
    for row, expected in zip(
        captioned.__getitems__(range(11)), load_latents(str(whole)).__getitems__(range(11)), strict=True
    ):
        assert row.keys() == expected.keys() and row["label"] == expected["label"]
        assert torch.equal(row["mean"], expected["mean"])


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_through_workers(whole, workers):
    latents = load_latents(str(whole))
    first = latents[0]["mean"]
    # What a worker gets that is started anew.
    sent = pickle.dumps(latents)
    assert len(sent) < 2000
    batches = list(DataLoader(pickle.loads(sent), batch_size=4, num_workers=workers))
    assert [len(batch["label"]) for batch in batches] == [4, 4, 3]
    assert torch.equal(batches[0]["mean"][0], first)
    shards = [load_file(path)["std_flipped"] for path in sorted(whole.glob("*.safetensors"))]
    assert torch.equal(torch.cat([batch["std_flipped"] for batch in batches]), torch.cat(shards))


def test_a_stopped_run_goes_on_with_what_is_missing(pictures, tokenizer, whole, tmp_path):
    folder = copy(whole, tmp_path / "cache")
    (folder / "shard-00001.safetensors").unlink()
    last = folder / "shard-00002.safetensors"
    last.write_bytes(last.read_bytes()[:-8])
    # What a killed run leaves of the shard that it was at.
    (folder / "shard-00001.safetensors.partial").write_bytes(b"half")
    untouched = (folder / "shard-00000.safetensors").stat().st_mtime_ns
    said = cache_latents(arguments(pictures, tokenizer, folder))
    assert said == f"11 pictures in 3 shards in {folder}, 2 of them new"
    assert (folder / "shard-00000.safetensors").stat().st_mtime_ns == untouched
    assert files(folder) == files(whole)


@pytest.mark.slow
def test_the_number_of_processes_does_not_matter(pictures, tokenizer, whole, tmp_path):
    words = ["--random_flip", "--resolution", SIZE, "--shard_size", 4, "--batch_size", 3]
    words += ["--train_data_dir", pictures, "--pretrained_tokenizer", tokenizer, "--output_dir", tmp_path / "cache"]
    in_processes(2, run_script, ROOT / "examples" / "cache_latents.py", list(map(str, words)))
    assert files(tmp_path / "cache") == files(whole)


@pytest.mark.parametrize("name, count", [("shard-00001.safetensors", None), ("shard-00002.safetensors", 100)])
def test_a_cache_that_is_not_whole_is_refused(whole, tmp_path, name, count):
    path = copy(whole, tmp_path / "cache") / name
    content = path.read_bytes()
    path.unlink()
    if count is not None:
        path.write_bytes(content[:count])
    with pytest.raises(ValueError, match=f"not whole: .*{name} is (missing|truncated)"):
        load_latents(str(tmp_path / "cache"))


def test_shards_of_another_shape_are_refused(whole, tmp_path):
    folder = copy(whole, tmp_path / "cache")
    (folder / "shard-00002.safetensors").write_bytes((whole / "shard-00001.safetensors").read_bytes())
    with pytest.raises(ValueError, match="shard-00002.safetensors holds .* not "):
        load_latents(str(folder))


def test_a_broken_index_is_refused(whole, tmp_path):
    folder = copy(whole, tmp_path / "cache")
    for content in ("", "{}", "[]"):
        (folder / "index.json").write_text(content)
        with pytest.raises(ValueError, match="index.json is not the index of cached latents"):
            load_latents(str(folder))


@pytest.mark.parametrize(
    "change, message",
    [
        ("tokenizer", "tokenizer was .* is "),
        ("statistics", "scaling_factor was .* is 3.0"),
        ("pictures", "num_examples was 11, is 10"),
        ("picture", "source was .* is "),
        ("resolution", "resolution was 16, is 20"),
        ("dtype", "dtype was float32, is bfloat16"),
        ("flip", "tensors was "),
    ],
)
def test_another_source_is_refused(pictures, tokenizer, whole, tmp_path, change, message):
    folder, settings = copy(whole, tmp_path / "cache"), {}
    if change in ("tokenizer", "statistics"):
        changed = ImageTokenizer.from_pretrained(tokenizer)
        if change == "tokenizer":
            changed.autoencoder.encoder.conv_in.bias.data[0] += 1e-3
        else:
            changed.config.scaling_factor = 3.0
        changed.save_pretrained(tokenizer := tmp_path / "tokenizer")
    elif change in ("pictures", "picture"):
        pictures = copy(pictures, tmp_path / "pictures")
        (pictures / "owl" / "3.png").unlink()
        if change == "picture":
            Image.new("RGB", (SIZE, SIZE)).save(pictures / "owl" / "3.png")
    else:
        settings = {"resolution": {"resolution": 20}, "dtype": {"dtype": "bfloat16"}, "flip": {"random_flip": False}}
        settings = settings[change]
    before = files(folder)
    with pytest.raises(ValueError, match=message):
        cache(pictures, tokenizer, folder, **settings)
    assert files(folder) == before


def test_moving_the_pictures_changes_nothing(pictures, tokenizer, whole, tmp_path):
    folder = copy(whole, tmp_path / "cache")
    (tmp_path / "link").symlink_to(copy(pictures, tmp_path / "deep" / "moved"))
    for moved in ("deep/moved", "link"):
        assert "0 of them new" in cache_latents(arguments(tmp_path / moved, tokenizer, folder))


@pytest.mark.parametrize("dtype, error", [("bfloat16", 1e-2), ("float16", 1e-3)])
def test_narrow_types(pictures, tokenizer, whole, tmp_path, dtype, error):
    narrow, wide = load_latents(str(cache(pictures, tokenizer, tmp_path, dtype=dtype))), load_latents(str(whole))
    assert narrow[7]["mean"].dtype == torch.float32
    torch.testing.assert_close(narrow[7]["mean"], wide[7]["mean"], rtol=error, atol=error)
    size = sum(path.stat().st_size for path in tmp_path.glob("*.safetensors"))
    assert 11 * 4 * 128 * 2 < size < 11 * 4 * 128 * 2 + 3 * 1000


def test_pixels_without_mirrors_and_classes(pictures, tmp_path):
    # Neither deviations nor mirror images take room.
    ImageTokenizer(ImageTokenizerConfig(patch_size=2)).save_pretrained(tmp_path / "tokenizer")
    latents = load_latents(str(cache(pictures / "cat", tmp_path / "tokenizer", tmp_path / "cache", random_flip=False)))
    expected = load_image_dataset(str(pictures / "cat")).with_transform(ImageTransform(SIZE))
    assert latents.class_names is None and not latents.has_flipped and latents.latent_shape == (3, SIZE, SIZE)
    assert latents.index["tensors"] == ["mean"]
    for row, picture in zip(latents.__getitems__(range(5)), expected, strict=True):
        assert row.keys() == {"mean", "std", "label"} and row["label"] == -1
        assert torch.equal(row["mean"], picture["pixel_values"])
        assert row["std"].shape == row["mean"].shape and row["std"].count_nonzero() == 0


def test_parquet_is_told_apart_by_sizes(pictures, tokenizer, tmp_path):
    load_image_dataset(str(pictures)).to_parquet(tmp_path / "data" / "train.parquet")
    folder = cache(tmp_path / "data", tokenizer, tmp_path / "cache")
    assert load_latents(str(folder)).class_names == list(COUNTS)
    (tmp_path / "data" / "train.parquet").unlink()
    load_image_dataset(str(pictures)).select(range(10, -1, -1)).to_parquet(tmp_path / "data" / "train.parquet")
    with pytest.raises(ValueError, match="source was "):
        cache(tmp_path / "data", tokenizer, folder)


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"dtype": "float64"}, r"`dtype` has to be one of .* got 'float64'"),
        ({"shard_size": 0}, "`shard_size` has to be at least 1, got 0"),
        ({"resolution": 18}, "`resolution` has to be a multiple of 4, got 18"),
    ],
)
def test_wrong_settings(pictures, tokenizer, tmp_path, settings, message):
    with pytest.raises(ValueError, match=message):
        cache(pictures, tokenizer, tmp_path / "out", **settings)
    assert not (tmp_path / "out").exists()


def test_the_index_says_what_the_latents_are(whole):
    index = json.loads((whole / "index.json").read_text())
    assert index["scaling_factor"] == [0.5, 2.0] and index["resolution"] == SIZE and index["dtype"] == "float32"
    assert index["tensors"] == ["mean", "std", "mean_flipped", "std_flipped"]


def test_tokens_of_a_codebook_are_not_those_before_it():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        autoencoder = VQModel(block_out_channels=(8,), norm_num_groups=4, latent_channels=2, num_vq_embeddings=4)
    plain, quantised = (ImageTokenizer.from_autoencoder(autoencoder, quantize=value) for value in (False, True))
    assert tokenizer_digest(plain) != tokenizer_digest(quantised)
