# SPDX-License-Identifier: Apache-2.0
"""Trainings as programs, without a clone of the repository."""

import pathlib
import sys

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


@pytest.mark.parametrize("kind", [[], ["tokenizer"], ["text_encoder"]])
def test_what_is_refused_is_told_in_a_line(tmp_path, kind, capsys):
    data = write_pictures(tmp_path / "data", ["cat"], 2)
    given = words(train_data_dir=data, output_dir=tmp_path / "out")
    for more, message in (
        (words(learning_rate="nan"), "`learning_rate` has to be a finite number, got nan."),
        (words(train_data_dir=tmp_path / "nowhere"), f"`train_data_dir` '{tmp_path}/nowhere' "),
        (words(learning_rat=1), "unknown options ['--learning_rat', '1'] did you mean --learning_rate? (see --help)"),
        (words(seed="x"), "argument --seed: invalid int value: 'x' (see --help)"),
        (["--config"], "argument --config: expected one argument (see --help)"),
        (words(config="nowhere.json"), "`config` 'nowhere.json' can't be read: "),
    ):
        with pytest.raises(SystemExit) as stopped:
            main([*kind, *given, *more])
        said = capsys.readouterr().err.strip().split("\n")
        name = "mar_hf.training" if pathlib.Path(sys.argv[0]).name == "__main__.py" else pathlib.Path(sys.argv[0]).name
        assert stopped.value.code == 2 and len(said) == 1 and said[0].startswith(f"{name}: error: {message}")
    assert not (tmp_path / "out").exists()


def test_an_unknown_program_is_named(capsys):
    with pytest.raises(SystemExit):
        main(["toknizer", "--output_dir", "x"])
    assert "'toknizer' is none of model, tokenizer, text_encoder, latents" in capsys.readouterr().err
