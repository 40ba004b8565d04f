# SPDX-License-Identifier: Apache-2.0
"""Trainings as programs, without a clone of the repository."""

import pytest
from test_trainer import SETTINGS, write_pictures

from mar_hf import ImageTokenizer, MARPipeline
from mar_hf.training.programs import main


def words(**settings):
    return [word for name, value in settings.items() for word in (f"--{name}", str(value))]


def test_the_first_word_names_the_program(tmp_path, capsys):
    pictures = write_pictures(tmp_path / "data", ["cat", "dog"], 4)
    tokenizer = {"train_batch_size": 4, "max_train_steps": 1, "resolution": 8, "block_out_channels": 8}
    main(["tokenizer", *words(train_data_dir=pictures, output_dir=tmp_path / "tokenizer", **tokenizer)])
    assert "PSNR" in capsys.readouterr().out
    assert ImageTokenizer.from_pretrained(tmp_path / "tokenizer").config.latent_channels == 8
    source = {"pretrained_tokenizer": tmp_path / "tokenizer", "resolution": 8}
    main(["latents", *words(train_data_dir=pictures, output_dir=tmp_path / "latents", **source)])
    assert "8 pictures in 1 shards" in capsys.readouterr().out
    settings = {**SETTINGS, "max_train_steps": 1}
    main(words(train_data_dir=tmp_path / "latents", output_dir=tmp_path / "out", **settings))
    assert f"pipeline in {tmp_path / 'out' / 'pipeline'}" in capsys.readouterr().out
    assert MARPipeline.from_pretrained(tmp_path / "out" / "pipeline").labels == {"cat": 0, "dog": 1}


def test_an_unknown_program_is_named():
    with pytest.raises(SystemExit, match="'toknizer' is none of model, tokenizer, text_encoder, latents"):
        main(["toknizer", "--output_dir", "x"])
