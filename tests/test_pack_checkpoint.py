# SPDX-License-Identifier: Apache-2.0
"""`utils/pack_checkpoint.py`: half the room, float32 again when loaded, almost the same pictures."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from mar_hf import ImageTokenizer, MARForImageGeneration, MARPipeline
from tiny_pipelines import FEW_STEPS, seeds, tiny_kl, tiny_pipeline, tiny_transformer
from tiny_texts import TEXT, TEXT_DIM, tiny_text_encoder, tiny_text_tokenizer


def load_script():
    path = Path(__file__).parents[1] / "utils" / "pack_checkpoint.py"
    spec = importlib.util.spec_from_file_location("pack_checkpoint", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


script = load_script()


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """What a training leaves: a pipeline with its text encoder, a card and samples."""
    folder = tmp_path_factory.mktemp("trained")
    vae = tiny_kl()
    tiny_pipeline(
        vae,
        transformer=tiny_transformer(vae.token_dim, **TEXT, num_classes=0),
        text_encoder=tiny_text_encoder(),
        tokenizer=tiny_text_tokenizer(),
        id2label=None,
    ).save_pretrained(folder)
    for name in ("README.md", "samples.png"):
        (folder / name).write_text("of the training")
    return folder


@pytest.fixture(scope="module")
def packed(trained, tmp_path_factory):
    folder = tmp_path_factory.mktemp("packed") / "folder"
    script.main([str(trained), str(folder)])
    return folder


def test_only_what_is_needed_is_there_in_half_the_room(trained, packed):
    assert sorted(path.name for path in packed.iterdir()) == ["model_index.json", "scheduler", "transformer", "vae"]
    for part in ("transformer", "vae"):
        before, after = (load_file(folder / part / "model.safetensors") for folder in (trained, packed))
        assert before.keys() == after.keys()
        for name, tensor in after.items():
            assert tensor.dtype == torch.float16
            assert torch.equal(tensor, before[name].half())


def test_it_loads_as_float32(packed):
    pipe = MARPipeline.from_pretrained(packed)
    transformer = MARForImageGeneration.from_pretrained(packed / "transformer")
    vae = ImageTokenizer.from_pretrained(packed / "vae")
    for part in (pipe.transformer, pipe.vae, transformer, vae):
        assert {tensor.dtype for tensor in part.parameters()} == {torch.float32}
        assert part.config.dtype == torch.float32
    assert pipe.text_encoder is None and pipe.tokenizer is None


def test_another_type_can_be_asked_for(packed):
    pipe = MARPipeline.from_pretrained(packed, dtype=torch.bfloat16)
    assert {tensor.dtype for tensor in pipe.transformer.parameters()} == {torch.bfloat16}


def test_pictures_differ_little(trained, packed):
    states = torch.randn(3, 5, TEXT_DIM, generator=torch.Generator().manual_seed(0))
    before, after = (
        MARPipeline.from_pretrained(folder)(prompt_embeds=states, generator=seeds(0, 1, 2), output_type="np").images
        for folder in (trained, packed)
    )
    assert before.std() > 0.05
    assert 0 < np.abs(after - before).max() < 0.02


def test_settings_are_kept_or_changed(trained, packed, tmp_path):
    assert MARPipeline.load_config(packed)["generation_defaults"] == FEW_STEPS
    script.main([str(trained), str(tmp_path / "changed"), "--generation-defaults", '{"guidance_scale": 5.0}'])
    changed = MARPipeline.load_config(tmp_path / "changed")["generation_defaults"]
    assert changed == {**FEW_STEPS, "guidance_scale": 5.0}


def test_a_card_at_the_destination_stays_and_nothing_else(trained, packed, tmp_path, capsys):
    (tmp_path / "README.md").write_text("the card")
    (tmp_path / "old.safetensors").write_text("weights")
    with pytest.raises(SystemExit, match="holds files"):
        script.main([str(trained), str(tmp_path)])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["README.md", "old.safetensors"]
    script.main([str(trained), str(tmp_path), "--overwrite"])
    names = sorted(path.name for path in packed.iterdir())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["README.md", *names]
    assert (tmp_path / "README.md").read_text() == "the card"
    assert f"{tmp_path}: " in capsys.readouterr().out


def test_what_cannot_be_packed_leaves_nothing_behind(trained, tmp_path):
    pipe = MARPipeline.from_pretrained(trained)
    with torch.no_grad():
        pipe.transformer.model.token_proj.bias[0] = 1e5
    pipe.save_pretrained(tmp_path / "large")
    with pytest.raises(SystemExit, match="model.token_proj.bias has numbers that float16 can't hold, up to 100000"):
        script.main([str(tmp_path / "large"), str(tmp_path / "out")])
    with pytest.raises(SystemExit, match="generation_defaults"):
        script.main([str(trained), str(tmp_path / "out"), "--generation-defaults", '{"speed": 1}'])
    with pytest.raises(SystemExit):
        script.main([str(tmp_path / "none"), str(tmp_path / "out")])
    assert [path.name for path in tmp_path.iterdir()] == ["large"]
