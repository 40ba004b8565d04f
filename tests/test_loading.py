# SPDX-License-Identifier: Apache-2.0
"""Broken checkpoints: every one is refused, and the message names the file or the tensor."""

import json
import re
import shutil

import pytest
import torch
from diffusers import AutoencoderTiny
from safetensors.torch import load_file, save_file

from common import assert_same_tensors, tiny_config, tiny_model
from mar_hf import ImageTokenizer, ImageTokenizerConfig, MARForImageGeneration, MARModel


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A saved transformer in one file."""
    folder = tmp_path_factory.mktemp("whole")
    tiny_model().save_pretrained(folder)
    return folder


@pytest.fixture
def folder(whole, tmp_path):
    """A copy to break."""
    return shutil.copytree(whole, tmp_path / "checkpoint")


@pytest.fixture
def shards(tmp_path):
    """The same in shards."""
    tiny_model().save_pretrained(tmp_path / "shards", max_shard_size="60KB")
    return tmp_path / "shards"


def configure(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def rewrite(path, change):
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def refused(folder, *parts, cls=MARForImageGeneration, error=ValueError, **arguments):
    """The message has all the parts, in their order."""
    with pytest.raises(error, match="(?s)" + ".*".join(re.escape(str(part)) for part in parts)):
        cls.from_pretrained(folder, **arguments)


# Tensors


def test_what_is_whole_loads(whole, shards):
    expected = tiny_model().state_dict()
    for folder in (whole, shards):
        model, report = MARForImageGeneration.from_pretrained(folder, output_loading_info=True)
        assert_same_tensors(model.state_dict(), expected)
        assert not any(report.values())


@pytest.mark.parametrize("name", ["model.mask_token", "model.encoder_layers.0.mlp.fc1.bias", "head.out_proj.weight"])
def test_missing_tensors(name, folder):
    rewrite(folder / "model.safetensors", lambda tensors: tensors.pop(name))
    refused(folder, folder, "do not fit MARForImageGeneration", f": {name} is missing.")


def test_many_missing_tensors_are_counted(tmp_path):
    # The backbone alone is no image model: its head would be random.
    tiny_model().model.save_pretrained(tmp_path)
    missing = [name for name in tiny_model().state_dict() if name.startswith("head.")]
    refused(tmp_path, "head.blocks.0.linear_1.bias is missing; ", f"; and {len(missing) - 8} more.")


def test_tensors_of_another_shape(folder):
    rewrite(folder / "model.safetensors", lambda tensors: tensors.update({"model.mask_token": torch.zeros(1, 1, 31)}))
    refused(folder, folder, "model.mask_token is (1, 1, 31), not (1, 1, 32).")


def test_tensors_left_over(folder):
    rewrite(folder / "model.safetensors", lambda tensors: tensors.update({"model.extra": torch.zeros(1)}))
    refused(folder, folder, "model.extra has no place.")
    refused(folder, "model.extra has no place.", cls=MARModel)


def test_the_backbone_may_leave_the_head_but_nothing_else(folder):
    assert_same_tensors(MARModel.from_pretrained(folder).state_dict(), tiny_model().model.state_dict())
    rewrite(folder / "model.safetensors", lambda tensors: tensors.pop("model.mask_token"))
    refused(folder, "MARModel", "mask_token is missing.", cls=MARModel)


def test_another_number_of_classes_on_purpose(folder):
    refused(folder, "model.class_embedding.weight is (4, 32), not (8, 32).", num_classes=7)
    model = MARForImageGeneration.from_pretrained(folder, num_classes=7, ignore_mismatched_sizes=True)
    assert model.model.class_embedding.weight.shape == (8, 32)
    assert 0.01 < model.model.class_embedding.weight.std() < 0.03  # initialised, not left as it was in memory
    rest = {name: value for name, value in tiny_model().state_dict().items() if "class_embedding" not in name}
    assert_same_tensors({name: model.state_dict()[name] for name in rest}, rest)


# Files


@pytest.mark.parametrize("keep", [0, 4, 0.5, 0.999])
def test_truncated_files(keep, folder):
    path = folder / "model.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[: int(keep * len(content)) if keep < 1 else keep])
    refused(folder, f"{path} is truncated or not a safetensors file")


def test_files_of_another_format(folder):
    torch.save({}, folder / "model.safetensors")
    refused(folder, f"{folder / 'model.safetensors'} is truncated or not a safetensors file")


def test_truncated_shards(shards):
    first, second, *_ = sorted(shards.glob("model-*.safetensors"))
    second.write_bytes(second.read_bytes()[:-10])
    refused(shards, f"{second} is truncated or not a safetensors file")


def test_missing_shards(shards):
    _, second, *_ = sorted(shards.glob("model-*.safetensors"))
    second.unlink()
    refused(shards, second, error=OSError)


def test_incomplete_shards(shards):
    _, second, *_ = sorted(shards.glob("model-*.safetensors"))
    name = sorted(load_file(second))[0]
    rewrite(second, lambda tensors: tensors.pop(name))
    refused(shards, shards, f"{name} is missing.")


def test_a_broken_index(shards):
    (shards / "model.safetensors.index.json").write_text('{"weight_map": ')
    refused(shards, f"{shards} can't be loaded as MARForImageGeneration")


def test_no_weights(folder):
    (folder / "model.safetensors").unlink()
    refused(folder, "no file named model.safetensors", folder, error=OSError)


def test_subfolders_are_named(folder):
    (folder.parent / "model.safetensors").write_bytes(b"not this one")
    (folder / "model.safetensors").write_bytes(b"")
    refused(folder.parent, f"{folder / 'model.safetensors'} is truncated", subfolder="checkpoint")


# Configurations


@pytest.mark.parametrize(
    "change, message",
    [
        ({"num_encoder_layers": 2}, "model.encoder_layers.1.attention.proj.bias is missing"),
        ({"head_config": {"num_layers": 1, "hidden_size": 32}}, "head.blocks.1.linear_1.bias has no place"),
        ({"num_class_tokens": 3}, "model.decoder_position_embedding is (1, 18, 32), not (1, 19, 32)"),
        ({"hidden_size": "32"}, "Field 'hidden_size' expected int, got str"),
        ({"num_attention_heads": 5}, "`hidden_size` 32 has to be a multiple of `num_attention_heads` 5"),
        ({"head_type": "flow"}, "`head_type` has to be one of"),
        ({"head_config": {"depth": 2}}, "`head_config` {'depth': 2} does not fit"),
    ],
)
def test_wrong_configurations(change, message, folder):
    configure(folder, **change)
    refused(folder, folder, message)


def test_missing_configurations(folder):
    # transformers would go on with the defaults.
    (folder / "config.json").unlink()
    refused(folder, f"{folder / 'config.json'} is missing.", error=OSError)
    config = tiny_config()
    model = MARForImageGeneration.from_pretrained(folder, config=config)
    assert_same_tensors(model.state_dict(), tiny_model().state_dict())


def test_broken_configurations(folder):
    (folder / "config.json").write_text('{"hidden_size": ')
    refused(folder, folder / "config.json", "not a valid JSON file", error=OSError)


# Image tokenizers are loaded by the same rules


def test_image_tokenizers(tmp_path):
    autoencoder = AutoencoderTiny(
        encoder_block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8),
        num_encoder_blocks=(1, 1),
        num_decoder_blocks=(1, 1),
    )
    ImageTokenizer.from_autoencoder(autoencoder).save_pretrained(tmp_path)
    rewrite(tmp_path / "model.safetensors", lambda tensors: tensors.pop("autoencoder.encoder.layers.0.bias"))
    refused(tmp_path, tmp_path, "autoencoder.encoder.layers.0.bias is missing.", cls=ImageTokenizer)
    # Without its autoencoder the tokenizer would be one of pixels.
    configure(tmp_path, autoencoder=None)
    refused(tmp_path, "autoencoder.decoder.layers.0.bias has no place", cls=ImageTokenizer)


def test_image_tokenizers_without_a_configuration(tmp_path):
    ImageTokenizer(ImageTokenizerConfig(patch_size=4)).save_pretrained(tmp_path)
    (tmp_path / "config.json").unlink()
    refused(tmp_path, "config.json is missing", cls=ImageTokenizer, error=OSError)
