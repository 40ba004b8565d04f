# SPDX-License-Identifier: Apache-2.0
"""Broken checkpoints: every one is refused, and the message names the file or the tensor."""

import json
import re
import shutil
import sys
import tempfile
import time
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderTiny
from huggingface_hub import HfApi
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModel

from common import assert_same_tensors, tiny_config, tiny_model
from mar_hf import ImageTokenizer, ImageTokenizerConfig, MARForImageGeneration, MARModel, MARPipeline
from mar_hf.loading import check_counts, find_weights, read_json
from tiny_pipelines import tiny_kl, tiny_pipeline, tiny_pixels, tiny_text_pipeline


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


def test_the_marker_of_pixels_asks_for_no_gradient(tmp_path):
    tiny_pixels().save_pretrained(tmp_path)
    for loaded in (ImageTokenizer.from_pretrained(tmp_path), AutoModel.from_pretrained(tmp_path)):
        assert [parameter.requires_grad for parameter in loaded.parameters()] == [False]


# Pickles and files of others


def pickled(model, folder):
    """A checkpoint as it was before safetensors."""
    model.config.save_pretrained(folder)
    torch.save(model.state_dict(), folder / "pytorch_model.bin")
    return folder


@pytest.mark.parametrize("make", [tiny_model, tiny_pixels, tiny_kl])
def test_pickles_are_loaded_where_the_call_says_so(make, tmp_path):
    model, folder = make(), pickled(make(), tmp_path)
    for safe in ({}, {"use_safetensors": None}, {"use_safetensors": True}):
        message = ("no file named model.safetensors", "pytorch_model.bin stands for a pickle", "use_safetensors=False")
        refused(folder, *message, cls=type(model), error=OSError, **safe)
    loaded = type(model).from_pretrained(folder, use_safetensors=False)
    assert_same_tensors(loaded.state_dict(), model.state_dict())


@pytest.mark.parametrize("safe", [None, True])
@pytest.mark.parametrize("form", ["{}", "/{}", "../{}", "../../other/{}", "sub/{}", "{}.bin", "..", "", "a\\{}"])
def test_an_index_names_safetensors_beside_it(form, safe, folder):
    (folder / "model.safetensors").rename(folder / "w.safetensors")
    name = form.format("w.safetensors")
    (folder / "w.safetensors.bin").write_bytes((folder / "w.safetensors").read_bytes())
    shutil.copytree(folder, folder / "sub")
    index = {"metadata": {}, "weight_map": dict.fromkeys(tiny_model().state_dict(), name)}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    if name == "w.safetensors":
        MARForImageGeneration.from_pretrained(folder, use_safetensors=safe)
    else:
        refused(folder, "index.json has to name safetensors files beside it, got", repr(name), use_safetensors=safe)


@settings(max_examples=40)
@given(name=st.one_of(st.text(), st.none(), st.integers(), st.lists(st.text()), st.from_regex(r"[./\\]*w?\.\w+")))
def test_whatever_an_index_names_stays_in_the_folder(name):
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": name}}))
        with pytest.raises((ValueError, OSError), match="beside it|is missing"):
            find_weights(folder)


@pytest.mark.parametrize("index", [{}, {"weight_map": None}, {"weight_map": {}}, {"weight_map": ["a"]}])
def test_an_index_has_a_map(index, shards):
    (shards / "model.safetensors.index.json").write_text(json.dumps(index))
    refused(shards, shards, "index.json has to hold a `weight_map`")


@pytest.mark.parametrize("name", ["../w.safetensors", "w.safetensors", "w.safetensors.index.json"])
def test_a_configuration_names_no_weights(name, folder):
    # transformers reads such an index, and loads whatever it names.
    shutil.copy(folder / "model.safetensors", folder / "w.safetensors")
    (folder / "w.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": {"a": "/w.bin"}}))
    configure(folder, transformers_weights=name)
    refused(folder, folder, "names other weights, `transformers_weights`", name)


def test_shards_of_a_distributed_run_are_not_preferred(folder):
    shutil.copy(folder / "model.safetensors", folder / "shard-00000-model-00001-of-00001.safetensors")
    refused(folder, folder, "holds shards of a distributed run (shard-00000")


# Numbers


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_weights_are_finite(value, dtype, folder):
    path = folder / "model.safetensors"
    tensors = {name: tensor.to(dtype) for name, tensor in load_file(path).items()}
    save_file(tensors, path, metadata={"format": "pt"})
    MARForImageGeneration.from_pretrained(folder)
    tensors["head.out_proj.weight"][-1, -1] = value
    save_file(tensors, path, metadata={"format": "pt"})
    refused(folder, f"head.out_proj.weight in {path} holds values that are no finite numbers")
    MARModel.from_pretrained(folder)  # which leaves the head
    configure(folder, dtype=str(dtype).removeprefix("torch."))
    refused(folder, f"head.out_proj.weight in {path}", torch.empty(0, dtype=dtype).dtype)


def test_large_numbers_are_finite_until_they_are_halved(folder):
    rewrite(folder / "model.safetensors", lambda tensors: tensors["model.mask_token"].fill_(3e38))
    MARForImageGeneration.from_pretrained(folder)
    refused(folder, "model.mask_token in", "loaded as torch.float16", dtype=torch.float16)


def test_finite_weights_in_shards_name_the_shard(shards):
    path = sorted(shards.glob("model-*.safetensors"))[1]
    name = sorted(load_file(path))[0]
    rewrite(path, lambda tensors: tensors[name].fill_(torch.nan))
    refused(shards, f"{name} in {path}")


def test_the_decoder_of_a_tokenizer_is_finite(tmp_path):
    tiny_kl().save_pretrained(tmp_path)
    name = "autoencoder.decoder.conv_out.bias"
    rewrite(tmp_path / "model.safetensors", lambda tensors: tensors[name].fill_(torch.nan))
    refused(tmp_path, f"{name} in {tmp_path / 'model.safetensors'}", cls=ImageTokenizer)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int8, torch.uint8, torch.bool, torch.complex64])
def test_weights_are_floating_point_numbers(dtype, folder):
    name = "model.encoder_layers.0.mlp.fc1.weight"
    rewrite(folder / "model.safetensors", lambda tensors: tensors.update({name: tensors[name].to(dtype)}))
    refused(folder, folder, f"{name} has to hold floating-point numbers, got {dtype}")


# What a small file can ask for


@pytest.mark.parametrize(
    "change, message",
    [
        ({"hidden_size": 2**16}, "asks for"),
        ({"hidden_size": 10**6}, "`hidden_size` has to be at most 65536"),
        ({"num_classes": 10**7}, "asks for"),
        ({"num_classes": 10**12}, "`num_classes` has to be at most"),
        ({"num_encoder_layers": 10**9}, "has `num_encoder_layers` 1000000000, but its weights are"),
        ({"head_config": {"num_layers": 10**6, "hidden_size": 32}}, "has `num_layers` 1000000"),
        ({"text_dim": 8, "text_aligner_layers": 10**8}, "has `text_aligner_layers` 100000000"),
        ({"head_config": {"num_layers": 2, "hidden_size": 2**16}}, "asks for"),
        ({"head_config": {"num_layers": 2, "hidden_size": 10**8}}, "`hidden_size` has to be at most 65536"),
        ({"hidden_size": 10**30}, "can't be loaded as"),
    ],
)
def test_configurations_that_ask_for_more_than_there_is(change, message, folder):
    configure(folder, **change)
    start = time.monotonic()
    refused(folder, message)
    assert time.monotonic() - start < 30  # not minutes


def test_autoencoders_that_ask_for_more_than_there_is(tmp_path):
    tiny_kl().save_pretrained(tmp_path)
    settings = json.loads((tmp_path / "config.json").read_text())["autoencoder"]
    configure(tmp_path, autoencoder={**settings, "layers_per_block": 10**6})
    refused(tmp_path, "has `layers_per_block` 1000000", cls=ImageTokenizer)
    configure(tmp_path, autoencoder={**settings, "block_out_channels": [8, 10**6]})
    refused(tmp_path, "asks for", "autoencoder.", cls=ImageTokenizer)


@given(count=st.one_of(st.integers(65, 10**40), st.floats(65, None)), depth=st.integers(0, 3))
def test_counts_are_found_wherever_they_are(count, depth):
    configuration = {"num_layers": count}
    for _ in range(depth):
        configuration = {"head_config": configuration, "layer_norm_eps": 1e9, "block_out_channels": [512]}
    with pytest.raises(ValueError, match="has `num_layers`"):
        check_counts(configuration, 64, "config.json")


@pytest.mark.parametrize("content", ["null", "[]", "5", '"x"', "", "{", "\ud800", "[" * 10**5])
def test_configurations_are_objects(content, folder, tmp_path):
    (folder / "config.json").write_bytes(content.encode("utf-8", "surrogatepass"))
    refused(folder, folder / "config.json", error=(ValueError, OSError))
    tiny_pixels().save_pretrained(tmp_path / "pixels")
    shutil.copy(folder / "config.json", tmp_path / "pixels")
    refused(tmp_path / "pixels", "pixels/config.json", cls=ImageTokenizer, error=(ValueError, OSError))


@settings(max_examples=40)
@given(content=st.recursive(st.none() | st.booleans() | st.floats() | st.text(), st.lists).map(json.dumps))
def test_json_without_an_object_is_refused(content):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "config.json")
        path.write_text(content)
        with pytest.raises(ValueError, match="has to hold a JSON object"):
            read_json(path)


# As transformers loads


def with_adapter(base):
    """The model of a folder with an adapter that matters, as peft makes it."""
    model = get_peft_model(MARForImageGeneration.from_pretrained(base), LoraConfig(target_modules=["qkv"], r=2))
    for name, parameter in model.named_parameters():
        if "lora" in name:
            torch.nn.init.normal_(parameter)
    return model


def test_a_model_with_an_adapter_comes_back(whole, tmp_path):
    model = with_adapter(whole)
    model.save_pretrained(tmp_path / "adapter")
    loaded = MARForImageGeneration.from_pretrained(tmp_path / "adapter")
    assert any("lora" in name for name in loaded.state_dict())
    assert_same_tensors(loaded.state_dict(), model.get_base_model().state_dict())
    # The same inside of a pipeline.
    folder = tmp_path / "pipe"
    tiny_pipeline().save_pretrained(folder)
    shutil.rmtree(folder / "transformer")
    shutil.copytree(tmp_path / "adapter", folder / "transformer")
    found = MARPipeline.from_pretrained(folder).transformer
    assert_same_tensors(found.state_dict(), loaded.state_dict())


def test_adapters_are_checked_like_models(folder, tmp_path):
    with_adapter(folder).save_pretrained(tmp_path / "adapter")
    path = tmp_path / "adapter" / "adapter_model.safetensors"

    def broken(change, *parts, error=ValueError):
        copy = shutil.copytree(tmp_path / "adapter", tmp_path / "copy")
        change(copy)
        refused(copy, *parts, error=error)
        shutil.rmtree(copy)

    name = sorted(load_file(path))[0]
    broken(lambda to: rewrite(to / path.name, lambda tensors: tensors.pop(name)), "is missing")
    broken(lambda to: rewrite(to / path.name, lambda tensors: tensors[name].fill_(torch.nan)), "no finite numbers")
    broken(lambda to: (to / path.name).write_bytes(b""), "adapter_model.safetensors is truncated")
    broken(lambda to: (to / path.name).rename(to / "adapter_model.bin"), "no file named adapter_model", error=OSError)
    change = {"base_model_name_or_path": None}
    broken(lambda to: adapt(to, change), "base_model_name_or_path", "got None", "load_adapter")
    broken(lambda to: adapt(to, {"r": 10**9}), "has `r` 1000000000")
    rewrite(folder / "model.safetensors", lambda tensors: tensors["model.mask_token"].fill_(torch.inf))
    broken(lambda to: None, "model.mask_token in", "no finite numbers")


def adapt(folder, change):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))


def test_a_state_dict_in_place_of_files():
    model = tiny_model()
    loaded = MARForImageGeneration.from_pretrained(None, config=model.config, state_dict=model.state_dict())
    assert_same_tensors(loaded.state_dict(), model.state_dict())
    tensors = {name: tensor for name, tensor in model.state_dict().items() if name != "model.mask_token"}
    arguments = {"config": model.config, "state_dict": tensors}
    refused(None, "`state_dict` do not fit", "model.mask_token is missing", **arguments)
    arguments["state_dict"]["model.mask_token"] = torch.full((1, 1, 32), torch.nan)
    refused(None, "model.mask_token in `state_dict` holds values that are no finite numbers", **arguments)
    refused(None, "`pretrained_model_name_or_path` has to be given, or `config` and `state_dict`")


# Pipelines


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pipelines") / "texts"
    tiny_text_pipeline().save_pretrained(folder)
    return folder


@pytest.fixture
def pipeline(saved, tmp_path):
    """A copy to break."""
    return shutil.copytree(saved, tmp_path / "pipeline")


def index(folder, **changes):
    path = folder / "model_index.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    return folder


@pytest.mark.parametrize(
    "slot, entry, message",
    [
        (
            "transformer",
            ["transformers", "BertModel"],
            ("of class MARForImageGeneration or AR", "got BertModel"),
        ),
        ("transformer", ["mar_hf", "MARModel"], ("has to be of class", "got MARModel")),
        ("transformer", ["mar_hf", "ImageTokenizer"], ("has to be of class", "got ImageTokenizer")),
        ("vae", ["diffusers", "AutoencoderKL"], ("class ImageTokenizer, got AutoencoderKL", "from_autoencoder")),
        ("scheduler", ["diffusers", "UNet2DModel"], ("has to be of class SchedulerMixin", "got UNet2DModel")),
        ("scheduler", ["mar_hf", "DiffusionHead"], ("has to be of class SchedulerMixin", "got DiffusionHead")),
        ("text_encoder", ["transformers", "T5TokenizerFast"], ("has to be of class PreTrainedModel",)),
        ("text_encoder", ["transformers", "AutoModel"], ("has to be of class PreTrainedModel",)),
        ("tokenizer", ["transformers", "BertModel"], ("has to be of class PreTrainedTokenizerBase",)),
        ("tokenizer", ["os", "system"], ("unknown class 'system' of 'os'",)),
        ("vae", ["antigravity", "ImageTokenizer"], ("unknown class 'ImageTokenizer' of 'antigravity'",)),
        ("vae", ["mar_hf", "Nothing"], ("unknown class 'Nothing' of 'mar_hf'",)),
        ("vae", "ImageTokenizer", ("has to name library and class of `vae`",)),
        ("vae", ["mar_hf"], ("has to name library and class of `vae`",)),
        ("vae", [1, 2], ("has to name library and class of `vae`",)),
        ("vae", {"mar_hf": "ImageTokenizer"}, ("has to name library and class of `vae`",)),
    ],
    ids=str,
)
def test_an_index_names_what_fits(slot, entry, message, pipeline):
    refused(index(pipeline, **{slot: entry}), *message, cls=MARPipeline)


def test_an_index_imports_nothing(pipeline):
    assert "antigravity" not in sys.modules
    with pytest.raises(ValueError, match="unknown class"):
        MARPipeline.from_pretrained(index(pipeline, vae=["antigravity", "ImageTokenizer"]))
    assert "antigravity" not in sys.modules


def test_parts_that_are_given_are_not_looked_at(pipeline):
    shutil.rmtree(pipeline / "vae")
    index(pipeline, scheduler=["mar_hf", "DiffusionHead"])
    found = MARPipeline.from_pretrained(pipeline, vae=tiny_pixels(), scheduler=None)
    assert isinstance(found.vae, ImageTokenizer) and found.scheduler is None


@pytest.mark.parametrize("name", [None, ["pipeline", "Pipeline"], 5])
def test_an_index_brings_no_code(name, pipeline):
    (pipeline / "pipeline.py").write_text("raise SystemExit('this ran')")
    refused(index(pipeline, _class_name=name), "has to name a class in `_class_name`", cls=MARPipeline)


@pytest.mark.parametrize("content", ["null", "[]", "{", '"x"'])
def test_broken_schedulers_are_named(content, pipeline):
    (pipeline / "scheduler" / "scheduler_config.json").write_text(content)
    refused(pipeline, pipeline, cls=MARPipeline, error=(ValueError, OSError))


@pytest.mark.parametrize("content", ["null", "[]", "{", '"x"'])
def test_an_index_is_an_object(content, hub, pipeline):
    (pipeline / "model_index.json").write_text(content)
    refused(pipeline, pipeline / "model_index.json", cls=MARPipeline)
    (pipeline / "model_index.json").unlink()
    refused(pipeline, "model_index.json is missing", cls=MARPipeline, error=OSError)


def break_text_encoder(folder, change):
    rewrite(folder / "text_encoder" / "model.safetensors", change)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda tensors: tensors.pop("encoder.final_layer_norm.weight"), "encoder.final_layer_norm.weight is missing"),
        (lambda tensors: tensors.update({"shared.weight": torch.zeros(3, 16)}), "shared.weight is (3, 16), not ("),
        (lambda tensors: tensors["shared.weight"].fill_(torch.nan), "no finite numbers"),
        (
            lambda tensors: tensors.update({"shared.weight": tensors["shared.weight"].long()}),
            "shared.weight has to hold floating-point numbers, got torch.int64",
        ),
    ],
)
def test_text_encoders_are_loaded_by_the_same_rules(change, message, pipeline):
    break_text_encoder(pipeline, change)
    refused(pipeline, "text_encoder", cls=MARPipeline)
    refused(pipeline, message, cls=MARPipeline)
    assert MARPipeline.from_pretrained(pipeline, text_encoder=None).text_encoder is None


def test_text_encoders_may_leave_a_decoder(pipeline):
    break_text_encoder(pipeline, lambda tensors: tensors.update({"decoder.final_layer_norm.weight": torch.ones(16)}))
    MARPipeline.from_pretrained(pipeline)


@pytest.mark.parametrize("change", [{"d_ff": 10**9}, {"num_layers": 10**9}, {"d_model": 10**7}])
def test_text_encoders_ask_for_what_there_is(change, pipeline):
    configure(pipeline / "text_encoder", **change)
    refused(pipeline, "text_encoder", cls=MARPipeline)


@pytest.mark.parametrize("part", ["transformer", "vae", "text_encoder"])
def test_pipelines_load_no_pickle_unasked(part, hub, pipeline):
    folder = pipeline / part
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    refused(pipeline, "no file named model.safetensors", "use_safetensors=False", cls=MARPipeline, error=OSError)
    refused(pipeline, "no file named", cls=MARPipeline, error=OSError, use_safetensors=True)
    HfApi().create_repo("org/pickle")
    HfApi().upload_folder(repo_id="org/pickle", folder_path=pipeline)
    refused("org/pickle", "safetensors", cls=MARPipeline, error=(OSError, ValueError))


def test_pickles_of_a_pipeline_that_are_asked_for(pipeline):
    expected = MARPipeline.from_pretrained(pipeline)
    for part in ("transformer", "vae", "text_encoder"):
        folder = pipeline / part
        torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
        (folder / "model.safetensors").unlink()
    found = MARPipeline.from_pretrained(pipeline, use_safetensors=False)
    assert_same_tensors(found.transformer.state_dict(), expected.transformer.state_dict())


def test_constructors_name_the_wrapper_of_autoencoders():
    parts = {**tiny_pipeline().components, "vae": tiny_kl().autoencoder}
    with pytest.raises(ValueError, match=r"`vae` has to be of class ImageTokenizer, got AutoencoderKL.*from_autoenc"):
        MARPipeline(**parts)
    with pytest.raises(ValueError, match="`scheduler` has to be of class SchedulerMixin, got ImageTokenizer"):
        MARPipeline(**{**tiny_pipeline().components, "scheduler": tiny_pixels()})
