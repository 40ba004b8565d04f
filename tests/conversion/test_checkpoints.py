# SPDX-License-Identifier: Apache-2.0
"""Whole conversions of the small original checkpoints: bytes, settings, the autoencoder's numbers, errors."""

import json
import os
import pickle
import shutil
import zipfile
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path, PurePosixPath

import pytest
import torch
from diffusers import AutoencoderKL
from safetensors.torch import load_file, save_file

from common import tiny_model
from mar_hf import ARConfig, ImageTokenizer, ImageTokenizerConfig, MARConfig, MARForImageGeneration, MARPipeline
from mar_hf.conversion import (
    convert_checkpoint,
    export_checkpoint,
    export_kl_state_dict,
    infer_kl_config,
)


DATA = Path(__file__).parents[1] / "parity" / "data" / "mar-tiny"
MAR, KL, ARGS = DATA / "checkpoint-last.pth", DATA / "kl.ckpt", DATA / "original_args.json"


def read(path):
    if path.suffix == ".safetensors":
        return load_file(path)
    with torch.serialization.safe_globals([Namespace]):
        return torch.load(path, weights_only=True)


def assert_identical(found, expected):
    """Same names, dtypes, shapes and bytes."""
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert (found[name].dtype, found[name].shape) == (tensor.dtype, tensor.shape), name
        same = torch.equal(found[name].contiguous().view(torch.uint8), tensor.contiguous().view(torch.uint8))
        assert same, name


@pytest.fixture(scope="module")
def args():
    return json.loads(ARGS.read_text())


@pytest.fixture(scope="module")
def mar():
    return read(MAR)


@pytest.fixture(scope="module")
def kl():
    return read(KL)["model"]


@pytest.fixture(scope="module")
def pipeline_folder(tmp_path_factory):
    return convert_checkpoint(MAR, tmp_path_factory.mktemp("converted") / "pipeline", vae=KL, config=ARGS)


# There and back


def test_a_pipeline_comes_back_with_the_same_bytes(pipeline_folder, mar, kl, args, tmp_path):
    back = export_checkpoint(pipeline_folder, tmp_path / "original")
    written = read(back / "checkpoint-last.pth")
    assert_identical(written["model_ema"], mar["model_ema"])
    assert_identical(written["model"], mar["model_ema"])
    assert_identical(read(back / "kl.ckpt")["model"], kl)
    # One copy of each tensor in the file, although two entries name it.
    assert (back / "checkpoint-last.pth").stat().st_size < 1.2 * sum(t.nbytes for t in mar["model"].values())
    arguments = json.loads((back / "original_args.json").read_text())
    assert {name: arguments.get(name) for name in args if name != "num_sampling_steps"} == {
        name: value for name, value in args.items() if name != "num_sampling_steps"
    }
    # What was written converts again, with the arguments written beside it.
    again = convert_checkpoint(
        back / "checkpoint-last.pth", tmp_path / "again", vae=back / "kl.ckpt", config=back / "original_args.json"
    )
    for part in ("transformer", "vae"):
        first, second = (read(folder / part / "model.safetensors") for folder in (pipeline_folder, again))
        assert_identical(second, first)


@pytest.mark.parametrize("weights, key", [("ema", "model_ema"), ("model", "model")])
@pytest.mark.parametrize("ending", ["pth", "safetensors"])
def test_a_transformer_comes_back_with_the_same_bytes(weights, key, ending, mar, tmp_path):
    assert not torch.equal(mar["model"]["z_proj.weight"], mar["model_ema"]["z_proj.weight"])
    folder = convert_checkpoint(MAR, tmp_path / "transformer", weights=weights, config=ARGS)
    written = read(export_checkpoint(folder, tmp_path / f"mar.{ending}"))
    assert_identical(written if ending == "safetensors" else written["model_ema"], mar[key])


@pytest.mark.parametrize("ending", ["ckpt", "safetensors"])
def test_an_autoencoder_comes_back_with_the_same_bytes(ending, kl, tmp_path):
    folder = convert_checkpoint(KL, tmp_path / "vae")
    written = read(export_checkpoint(folder, tmp_path / f"kl.{ending}"))
    assert_identical(written if ending == "safetensors" else written["model"], kl)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_bare_safetensors_keep_their_dtype(dtype, mar, tmp_path):
    original = {name: tensor.to(dtype) for name, tensor in mar["model"].items()}
    save_file(original, tmp_path / "mar.safetensors")
    folder = convert_checkpoint(tmp_path / "mar.safetensors", tmp_path / "transformer", config=ARGS)
    assert MARForImageGeneration.from_pretrained(folder).dtype == dtype
    assert_identical(read(export_checkpoint(folder, tmp_path / "back.safetensors")), original)


@pytest.mark.parametrize("layout", ["bare", "model", "state_dict", "older torch format"])
def test_layouts_of_autoencoder_files(layout, kl, tmp_path):
    content = kl if layout == "bare" else {"state_dict" if layout == "state_dict" else "model": kl}
    torch.save(content, tmp_path / "kl.ckpt", _use_new_zipfile_serialization=layout != "older torch format")
    folder = convert_checkpoint(tmp_path / "kl.ckpt", tmp_path / "vae")
    assert_identical(read(export_checkpoint(folder, tmp_path / "back.safetensors")), kl)


def test_tensors_of_the_autoencoder_s_training_are_left_out_aloud(kl, tmp_path, caplog):
    loss = {"loss.logvar": torch.zeros(()), "loss.discriminator.main.0.weight": torch.zeros(4)}
    torch.save({"state_dict": {**kl, **loss}}, tmp_path / "kl.ckpt")
    folder = convert_checkpoint(tmp_path / "kl.ckpt", tmp_path / "vae")
    assert "left out 2 tensors under `loss.`" in caplog.text
    assert_identical(read(export_checkpoint(folder, tmp_path / "back.safetensors")), kl)


def test_shards_are_exported(pipeline_folder, mar, tmp_path):
    model = MARForImageGeneration.from_pretrained(pipeline_folder, subfolder="transformer")
    model.save_pretrained(tmp_path / "sharded", max_shard_size="100KB")
    assert len(list((tmp_path / "sharded").glob("model-*.safetensors"))) > 1
    assert_identical(read(export_checkpoint(tmp_path / "sharded", tmp_path / "b.safetensors")), mar["model_ema"])


# What a converted checkpoint is


def test_a_converted_pipeline_has_the_original_s_settings(pipeline_folder):
    pipeline = MARPipeline.from_pretrained(pipeline_folder)
    assert pipeline.scheduler.config.max_timestep == 999
    assert pipeline.vae.config.scaling_factor == 0.2325
    assert (pipeline.vae.stride, pipeline.vae.token_dim) == (16, 8)
    assert dict(pipeline.config.generation_defaults) == {
        "num_inference_steps": 16,  # as many as there are tokens
        "num_diffusion_steps": 10,  # from the original's arguments
        "guidance_scale": 3.0,
        "guidance_schedule": "linear",
        "temperature": 1.0,
    }
    assert not pipeline.transformer.training and not pipeline.vae.training


def test_the_autoencoder_computes_what_the_original_computes(pipeline_folder):
    expected = load_file(DATA / "vae_tensors.safetensors")
    autoencoder = ImageTokenizer.from_pretrained(pipeline_folder, subfolder="vae").autoencoder
    with torch.no_grad():
        posterior = autoencoder.encode(expected["image"]).latent_dist
        found = {"mean": posterior.mean, "logvar": posterior.logvar}
        found["decoded"] = autoencoder.decode(expected["mean"]).sample
    for name, value in found.items():
        error = (value - expected[name]).abs().max() / expected[name].abs().max()
        assert error < 1e-5, (name, error)


def test_patches_of_the_autoencoder_s_latents(kl, args, mar, tmp_path):
    # The same tokens of 8 numbers from 2 channels in patches of 2 x 2.
    with torch.device("meta"):
        geometry = {**infer_kl_config(kl), "latent_channels": 2}
        small = AutoencoderKL.from_config(geometry).state_dict()
    small = {name: torch.zeros(tensor.shape) for name, tensor in export_kl_state_dict(small).items()}
    save_file(small, tmp_path / "kl.safetensors")
    config = {**args, "patch_size": 2, "vae_embed_dim": 2, "img_size": 128}
    folder = convert_checkpoint(MAR, tmp_path / "out", vae=tmp_path / "kl.safetensors", config=config)
    assert ImageTokenizer.from_pretrained(folder, subfolder="vae").stride == 32
    with pytest.raises(ValueError, match="contradict the autoencoder: vae_stride is 8, not 16"):
        config |= {"vae_stride": 8, "img_size": 64}
        convert_checkpoint(MAR, tmp_path / "x", vae=tmp_path / "kl.safetensors", config=config)


# Broken input


@pytest.fixture
def broken(tmp_path) -> Callable:
    """Convert the small pipeline with one of its files replaced; the error's text, and nothing left at the goal."""

    def convert(message, mar=MAR, kl=KL, config=ARGS, error=ValueError, **options):
        place = tmp_path / "out"
        place.mkdir()
        with pytest.raises(error, match=message):
            convert_checkpoint(mar, place / "pipeline", vae=kl, config=config, **options)
        assert list(place.iterdir()) == []

    return convert


def changed(source, path, change):
    """A copy of a checkpoint file with one change to each state dict in it."""
    content = read(source)
    for key in ("model", "model_ema"):
        if key in content:
            change(content[key])
    torch.save(content, path)
    return path


CHANGES = {
    "missing": (lambda s: s.pop("decoder_norm.bias"), "missing tensors: decoder_norm.bias$"),
    "missing, needed for sizes": (lambda s: s.pop("decoder_embed.weight"), "missing tensors: decoder_embed.weight"),
    "missing null class": (lambda s: s.pop("fake_latent"), "missing tensors: fake_latent$"),
    "extra": (lambda s: s.update({"ema.decay": torch.zeros(1)}), "with no place in the model: ema.decay$"),
    "shape": (
        lambda s: s.update({"mask_token": torch.zeros(1, 1, 31)}),
        r"mask_token has shape \(1, 1, 31\), expected \(1, 1, 32\)$",
    ),
    "dimensions": (lambda s: s.update({"z_proj.weight": torch.zeros(32)}), r"z_proj.weight has shape \(32,\)"),
    "no tensor": (lambda s: s.update({"mask_token": 3}), "not tensors: mask_token"),
    "grid": (
        lambda s: s.update({"diffusion_pos_embed_learned": torch.zeros(1, 15, 32)}),
        "diffusion_pos_embed_learned has 15 positions, which is no square grid",
    ),
}


@pytest.mark.parametrize("change, message", CHANGES.values(), ids=CHANGES)
def test_tensors_that_do_not_fit_the_transformer(change, message, broken, tmp_path):
    path = changed(MAR, tmp_path / "mar.pth", change)
    broken(f"mar.pth: .*{message}", mar=path)


KL_CHANGES = {
    "missing": (
        lambda s: s.pop("decoder.up.0.block.1.conv2.bias"),
        "missing tensors: decoder.up.0.block.1.conv2.bias$",
    ),
    "extra": (lambda s: s.update({"encoder.tail": torch.zeros(1)}), "with no place in the model: encoder.tail$"),
    "shape": (
        lambda s: s.update({"quant_conv.bias": torch.zeros(8)}),
        r"quant_conv.bias has shape \(8,\), expected \(16,\)$",
    ),
    "no levels": (
        lambda s: [s.pop(name) for name in list(s) if name.startswith("encoder.down")],
        "missing tensors: encoder.down.0.block.0.conv1.weight",
    ),
    "attention in half of a level": (
        lambda s: [s.pop(name) for name in list(s) if name.startswith("encoder.down.4.attn.0.norm")],
        "missing tensors: encoder.down.4.attn.0.norm.bias, encoder.down.4.attn.0.norm.weight$",
    ),
}


@pytest.mark.parametrize("change, message", KL_CHANGES.values(), ids=KL_CHANGES)
def test_tensors_that_do_not_fit_the_autoencoder(change, message, broken, tmp_path):
    broken(f"kl.pth: .*{message}", kl=changed(KL, tmp_path / "kl.pth", change))


@pytest.mark.parametrize("keep", [0, 4, 0.5, 0.999])
@pytest.mark.parametrize("source", [MAR, KL], ids=["mar", "kl"])
def test_truncated_pickles(source, keep, broken, tmp_path):
    content = source.read_bytes()
    path = tmp_path / source.name
    path.write_bytes(content[: int(keep * len(content)) if keep < 1 else keep])
    broken(f"{path.name}: truncated or no PyTorch checkpoint", **{"mar" if source == MAR else "kl": path})


@pytest.mark.parametrize("keep", [0, 4, 0.5, 0.999])
def test_truncated_safetensors(keep, mar, broken, tmp_path):
    path = tmp_path / "mar.safetensors"
    save_file(mar["model"], path)
    content = path.read_bytes()
    path.write_bytes(content[: int(keep * len(content)) if keep < 1 else keep])
    broken("mar.safetensors: truncated or no safetensors file", mar=path)


class Command:
    """Would create a file when unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_pickles_that_hold_anything_else(broken, tmp_path):
    # `posix` or `nt`, whatever implements `os` here.
    torch.save({"model": {}, "hook": Command(tmp_path / "made")}, tmp_path / "mar.pth")
    broken(rf"mar.pth: refused: it holds {os.mkdir.__module__}.mkdir, and only tensors", mar=tmp_path / "mar.pth")
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize(
    "content, message",
    [
        (
            {"model": {}, "args": PurePosixPath("runs")},
            r"refused: it holds \S*PurePosixPath, and only tensors and an arg",
        ),
        (torch.zeros(3), "holds a Tensor, expected a dict of tensors"),
        ({"epoch": 3}, "no state dict, neither bare nor under .*; not tensors: epoch"),
        ({"epoch": torch.zeros(1)}, "no MAR checkpoint: z_proj.weight is missing, it holds epoch"),
    ],
)
def test_files_without_a_model(content, message, broken, tmp_path):
    torch.save(content, tmp_path / "mar.pth")
    broken(f"mar.pth: {message}", mar=tmp_path / "mar.pth")


def test_plain_pickles_are_refused(broken, tmp_path):
    (tmp_path / "mar.pth").write_bytes(pickle.dumps({"model": Namespace(x=1)}, protocol=2))
    broken("mar.pth: truncated or no PyTorch checkpoint", mar=tmp_path / "mar.pth")


def test_no_averaged_weights(mar, broken, tmp_path):
    torch.save({"model": mar["model"]}, tmp_path / "mar.pth")
    broken(r"mar.pth: no averaged weights under `model_ema`, only \['model'\]", mar=tmp_path / "mar.pth")


def test_files_in_the_wrong_place(broken):
    broken("kl.ckpt: no MAR checkpoint: z_proj.weight is missing, it holds decoder.conv_in.bias, ", mar=KL)


def test_a_transformer_is_no_autoencoder(broken):
    broken("checkpoint-last.pth: missing tensors: encoder.down.0.block.0.conv1.weight", kl=MAR)


def test_tokens_that_do_not_fit_the_autoencoder(mar, args, broken, tmp_path):
    def widen(state_dict):
        state_dict["z_proj.weight"] = torch.zeros(32, 12)
        state_dict["diffloss.net.input_proj.weight"] = torch.zeros(24, 12)
        state_dict["diffloss.net.final_layer.linear.weight"] = torch.zeros(24, 24)
        state_dict["diffloss.net.final_layer.linear.bias"] = torch.zeros(24)

    path = changed(MAR, tmp_path / "mar.pth", widen)
    config = {name: value for name, value in args.items() if name != "vae_embed_dim"}
    broken("kl.ckpt: no square patch of its 8 channels makes tokens of width 12", mar=path, config=config)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"weights": "last"}, "`weights` is 'last', allowed are 'ema' and 'model'"),
        ({"scaling_factor": 0.0}, "`scaling_factor` is 0.0, it has to be above 0"),
        ({"mar": DATA / "none.pth", "error": FileNotFoundError}, "none.pth"),
        ({"kl": DATA / "none.safetensors", "error": FileNotFoundError}, "none.safetensors"),
        ({"config": DATA / "tensors.safetensors"}, "tensors.safetensors: "),
        ({"config": None}, "checkpoint-last.pth: the number of attention heads cannot be read off the tensors"),
    ],
)
def test_wrong_options(options, message, broken):
    broken(message, **options)


def test_arguments_that_are_no_object(broken, tmp_path):
    (tmp_path / "args.json").write_text("[1]")
    broken("args.json: holds a list, expected a JSON object", config=tmp_path / "args.json")


def test_head_steps_that_are_no_number(args, broken):
    broken("num_sampling_steps is 'ddim50', expected a number", config={**args, "num_sampling_steps": "ddim50"})


def test_a_folder_in_use_is_left_alone(tmp_path):
    (tmp_path / "notes").write_text("mine")
    with pytest.raises(ValueError, match="holds files"):
        convert_checkpoint(KL, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["notes"]


# Small files that ask for much


@pytest.fixture
def asks_for(broken, tmp_path, mar, kl):
    """Convert a file with tensors besides the right ones; the error's text."""

    def convert(message, extra, source="mar", **options):
        path = tmp_path / f"{source}.safetensors"
        save_file({**({"mar": mar["model"], "kl": kl}[source]), **extra}, path)
        broken(message, **{source: path}, **options)

    return convert


@pytest.mark.parametrize(
    "prefix", ["encoder_blocks.", "decoder_blocks.", "diffloss.net.res_blocks.", "module.encoder_blocks."]
)
@pytest.mark.parametrize("end", ["x", "norm1.weight"])
def test_numbers_that_ask_for_endless_layers(prefix, end, asks_for):
    plain = prefix.removeprefix("module.")
    message = rf"mar.safetensors: missing tensors: {plain}2, while there is {plain}1000000000$"
    asks_for(message, {f"{prefix}1000000000.{end}": torch.zeros(1)})


@pytest.mark.parametrize(
    "name, message",
    [
        ("encoder.down.1000000000.x", "missing tensors: encoder.down.5, while there is encoder.down.1000000000"),
        ("encoder.down.0.block.1000000000.x", "missing tensors: encoder.down.0.block.1, while there is"),
        ("encoder.down.3.block.1000000000.x", r"encoder.down.3 has the blocks \[0, 1000000000\], expected 1"),
        ("decoder.up.0.block.1000000000.x", r"decoder.up.0 has the blocks \[0, 1, 1000000000\], expected 2"),
        ("decoder.up.1000000000.block.0.x", "there is decoder.up.1000000000, but there are 5 levels"),
        ("decoder.up.1000000000.x", "with no place in the model: decoder.up.1000000000.x"),
        ("encoder.down.00.attn.0.x", "no place in the model: encoder.down.00.attn.0.x"),
    ],
)
def test_numbers_that_ask_for_endless_levels(name, message, asks_for):
    asks_for(f"kl.safetensors: .*{message}", {name: torch.zeros(1)}, "kl")


def test_many_layers_with_one_tensor_each(asks_for):
    extra = {f"encoder_blocks.{number}.norm1.weight": torch.zeros(1) for number in range(2, 1000)}
    config = {"encoder_num_heads": 4, "decoder_num_heads": 4}
    asks_for("missing tensors: encoder_blocks.10.attn.proj.bias, .* and 10966 more$", extra, config=config)


def test_many_levels_with_many_blocks(asks_for):
    extra = {f"encoder.down.{n}.block.0.conv1.weight": torch.zeros(1, 1, 1, 1) for n in range(5, 1000)}
    extra |= {f"encoder.down.0.block.{n}.x": torch.zeros(1) for n in range(1, 1000)}
    asks_for(r"encoder.down.1 has the blocks \[0\], expected 1000", extra, "kl")


@pytest.mark.parametrize(
    "tensor, message",
    [
        (torch.zeros(1).expand(10**6, 10**6), "the tensors claim 400000.* bytes, but the file has"),
        (torch.zeros(1).expand(10**9), "the tensors claim 40.* bytes, but the file has"),
        (torch.zeros(0, 10**12), "weights are floating-point numbers, and at least one; no weights: z_proj.weight"),
        (torch.zeros(32, 8, dtype=torch.int64), "no weights: z_proj.weight"),
        (torch.zeros(32, 8, dtype=torch.bool), "no weights: z_proj.weight"),
        (torch.zeros(10**6, 10**6, device="meta"), "not tensors: z_proj.weight"),
        (torch.zeros(2, 2).to_sparse(), "not tensors: z_proj.weight"),
    ],
)
def test_tensors_that_claim_more_than_there_is(tensor, message, broken, tmp_path):
    path = changed(MAR, tmp_path / "mar.pth", lambda s: s.update({"z_proj.weight": tensor}))
    broken(f"mar.pth: .*{message}", mar=path)


def test_archives_that_unpack_to_more_than_the_file(broken, tmp_path):
    torch.save({"model": {"z_proj.weight": torch.zeros(10**6)}}, tmp_path / "plain.pth")
    with zipfile.ZipFile(tmp_path / "plain.pth") as plain:
        with zipfile.ZipFile(tmp_path / "mar.pth", "w", zipfile.ZIP_DEFLATED) as packed:
            for name in plain.namelist():
                packed.writestr(name, plain.read(name))
    assert (tmp_path / "mar.pth").stat().st_size < 10**5
    broken(r"mar.pth: refused: a compressed archive, which unpacks to 4\d{6} bytes", mar=tmp_path / "mar.pth")


def test_arguments_nested_without_end(broken, tmp_path):
    (tmp_path / "args.json").write_text("[" * 10**5)
    broken("args.json: is nested too deeply", config=tmp_path / "args.json")


@pytest.mark.parametrize(
    "name, value",
    [
        ("encoder_depth", 10**9),
        ("encoder_num_heads", 10**9),
        ("encoder_num_heads", True),
        ("encoder_num_heads", 4.0),
        ("encoder_num_heads", "4"),
        ("patch_size", 0),
        ("patch_size", None),
        ("vae_stride", -16),
        ("mlp_ratio", float("nan")),
        ("label_drop_prob", 1.5),
        ("attn_dropout", [0.1]),
        ("num_sampling_steps", "1000000000"),
        ("num_sampling_steps", "0"),
        ("num_sampling_steps", "1" * 5000),
    ],
)
def test_arguments_out_of_range(name, value, args, broken):
    broken(f"the original argument {name} is ", config={**args, name: value})


# Names of wrapped models


def test_names_of_wrapped_models(mar, kl, tmp_path):
    def wrap(name):
        return "module._orig_mod." + name.replace("_blocks.1.", "_blocks.1._orig_mod.").replace(
            ".mid.", ".mid.module."
        )

    for source, tensors, config in (("mar", mar["model_ema"], ARGS), ("kl", kl, None)):
        torch.save({"model_ema": {wrap(name): tensor for name, tensor in tensors.items()}}, tmp_path / source)
        folder = convert_checkpoint(tmp_path / source, tmp_path / f"{source}-ours", config=config)
        assert_identical(read(export_checkpoint(folder, tmp_path / f"{source}.safetensors")), tensors)


def test_two_tensors_of_one_name(mar, broken, tmp_path):
    path = changed(MAR, tmp_path / "mar.pth", lambda s: s.update({"module.mask_token": s["mask_token"]}))
    broken("mar.pth: mask_token is there twice, the second time as module.mask_token", mar=path)


# Places that cannot be written


def test_a_full_disk_while_converting(broken, full_disk):
    with full_disk(10_000):
        broken("pipeline: could not be written: ", error=OSError)


@pytest.mark.parametrize("part, dst", [("transformer", "x.safetensors"), ("transformer", "x.pth"), ("", "x")])
def test_a_full_disk_while_exporting(part, dst, pipeline_folder, full_disk, tmp_path):
    with full_disk(10_000), pytest.raises(OSError, match="could not be written: "):
        export_checkpoint(pipeline_folder / part, tmp_path / dst)
    assert list(tmp_path.iterdir()) == []


def test_the_source_is_no_place_to_write(tmp_path):
    source = Path(shutil.copy(KL, tmp_path / "kl.ckpt"))
    for dst in (source, source / "inside"):
        with pytest.raises((ValueError, OSError), match="kl.ckpt"):
            convert_checkpoint(source, dst)
    assert source.read_bytes() == KL.read_bytes() and len(list(tmp_path.iterdir())) == 1


# Exports that cannot be


@pytest.mark.parametrize(
    "content, message",
    [
        ("{}", "`weight_map` has to be an object, got None"),
        ('{"weight_map": ["a.safetensors"]}', "`weight_map` has to be an object"),
        ('{"weight_map": {"a": "../../a.safetensors"}}', "weights are .safetensors files beside the index"),
        ('{"weight_map": {"a": "/a.safetensors"}}', "weights are .safetensors files beside the index"),
        ('{"weight_map": {"a": "w.bin"}}', "files beside the index, not 'w.bin'"),
        ('{"weight_map": {"a": 5}}', "files beside the index, not '5'"),
        ("null", "holds a NoneType, expected a JSON object"),
    ],
)
def test_indices_that_lead_elsewhere(content, message, pipeline_folder, tmp_path):
    folder = shutil.copytree(pipeline_folder / "transformer", tmp_path / "transformer")
    (folder / "model.safetensors.index.json").write_text(content)
    with pytest.raises(ValueError, match=f"model.safetensors.index.json: .*{message}"):
        export_checkpoint(folder, tmp_path / "out.pth")


@pytest.mark.parametrize("part, dst", [("", "out.pth"), ("transformer", "out"), ("vae", "out.bin")])
def test_export_to_a_wrong_ending(part, dst, pipeline_folder, tmp_path):
    with pytest.raises(
        ValueError, match=rf"`dst` is .*{dst}.*(becomes a folder|expected a file ending in .safetensors)"
    ):
        export_checkpoint(pipeline_folder / part, tmp_path / dst)
    assert list(tmp_path.iterdir()) == []


def test_export_overwrites_nothing(pipeline_folder, tmp_path):
    (tmp_path / "kl.ckpt").write_text("mine")
    with pytest.raises(ValueError, match="kl.ckpt', which exists already"):
        export_checkpoint(pipeline_folder / "vae", tmp_path / "kl.ckpt")
    assert (tmp_path / "kl.ckpt").read_text() == "mine"


def test_export_of_incomplete_weights(pipeline_folder, tmp_path):
    folder = shutil.copytree(pipeline_folder / "transformer", tmp_path / "transformer")
    tensors = read(folder / "model.safetensors")
    del tensors["head.out_proj.bias"]
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(ValueError, match="transformer: missing tensors: head.out_proj.bias$"):
        export_checkpoint(folder, tmp_path / "out.pth")
    (folder / "model.safetensors").write_bytes(b"x" * 100)
    with pytest.raises(ValueError, match="transformer: model.safetensors: truncated or no safetensors file"):
        export_checkpoint(folder, tmp_path / "out.pth")
    assert [path.name for path in tmp_path.iterdir()] == ["transformer"]


def test_export_of_what_the_original_does_not_know(tmp_path):
    ImageTokenizerConfig(patch_size=4).save_pretrained(tmp_path / "pixels")
    with pytest.raises(ValueError, match="autoencoder None, .*: the original code knows AutoencoderKL"):
        export_checkpoint(tmp_path / "pixels", tmp_path / "out.ckpt")
    wide = MARConfig(grid_height=2, grid_width=4, hidden_size=32, num_attention_heads=2)
    wide.save_pretrained(tmp_path / "wide")
    with pytest.raises(ValueError, match="grid of 2 x 4: the original code knows the diffusion head and square grids"):
        export_checkpoint(tmp_path / "wide", tmp_path / "out.pth")
    ARConfig().save_pretrained(tmp_path / "causal")
    with pytest.raises(ValueError, match="model_type is 'mar_hf_ar', those that can be exported are"):
        export_checkpoint(tmp_path / "causal", tmp_path / "out.pth")
    with pytest.raises(ValueError, match="neither model_index.json nor config.json"):
        export_checkpoint(tmp_path, tmp_path / "out.pth")
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(ValueError, match="model_type is 'bert', those that can be exported are"):
        export_checkpoint(tmp_path, tmp_path / "out.pth")


def test_export_of_what_reads_texts(tmp_path):
    tiny_model(text_dim=8, text_aligner_layers=0).save_pretrained(tmp_path / "transformer")
    with pytest.raises(ValueError, match=r"no place in the model: model\.\w+_layers\.0\.context_attention"):
        export_checkpoint(str(tmp_path / "transformer"), str(tmp_path / "original.safetensors"))
    assert [path.name for path in tmp_path.iterdir()] == ["transformer"]


def test_export_says_what_the_file_cannot_hold(tmp_path, caplog):
    folder = convert_checkpoint(KL, tmp_path / "vae", scaling_factor=0.5)
    export_checkpoint(folder, tmp_path / "kl.ckpt")
    assert "scaling_factor is 0.5 and is not part of the exported file" in caplog.text
