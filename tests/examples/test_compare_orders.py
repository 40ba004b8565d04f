# SPDX-License-Identifier: Apache-2.0
"""`examples/compare_orders.py`: everything once in small, started again, and what the tables say of known numbers."""

import json
import sys
from functools import partial

import pytest
from PIL import Image

from mar_hf import ImageTokenizer
from mar_hf.models import BACKBONES
from mar_hf.training import TokenizerTrainingArguments, parse_arguments
from snippets import ROOT


sys.path.insert(0, str(ROOT / "examples"))
import compare_orders  # noqa: E402
import draw_comparison  # noqa: E402


ONLY = ["mar_pixels_4", "raster_causal_categorical", "mar_categorical"]


@pytest.mark.slow
def test_a_small_comparison_and_the_same_again(tmp_path, capsys):
    args = partial(compare_orders.Arguments, str(tmp_path / "out"), quick=True, seeds=[0])
    compare_orders.main(args(only=ONLY))
    first = capsys.readouterr().out
    assert all(f"evaluation-{row}-0\n" in first for row in ONLY)
    folder = tmp_path / "out"
    comparison = json.loads((folder / "comparison.json").read_text(encoding="utf-8"))
    assert set(comparison["rows"]) == set(ONLY)
    assert set(comparison["tokenizers"]) == {"pixels", "vq"}
    for row in comparison["rows"].values():
        assert row["without"]["fd_pixels"][0] > 0 and row["seconds_a_picture"]["alone"] > 0
    quantised = ImageTokenizer.from_pretrained(folder / "tokenizers" / "vq")
    continuous = ImageTokenizer.from_pretrained(folder / "tokenizers" / "vq_continuous")
    assert quantised.config.quantize and not continuous.config.quantize
    assert quantised.config.shift_factor != continuous.config.shift_factor
    for name, rows in (("orders", 2), ("tokenizers", 2)):
        table = (folder / f"{name}.md").read_text(encoding="utf-8")
        assert table in first and len(table.splitlines()) == rows + 3
        for kind in ("", "_speed", "_samples"):
            assert Image.open(folder / f"comparison_{name}{kind}.png").width > 100

    compare_orders.main(args(only=ONLY))
    # Nothing was done but the tables.
    assert capsys.readouterr().out == first[first.index("\n| loss") :]
    # What was cut off after a part was finished is found again.
    (folder / "results" / "evaluation-mar_categorical-0.json").unlink()
    compare_orders.main(args(only=["mar_categorical"]))
    assert "evaluation-mar_categorical-0\n" in capsys.readouterr().out
    again = json.loads((folder / "comparison.json").read_text(encoding="utf-8"))["rows"]
    assert again["mar_categorical"]["without"] == comparison["rows"]["mar_categorical"]["without"]
    with pytest.raises(ValueError, match="pictures made with quick True"):
        compare_orders.main(compare_orders.Arguments(str(folder)))


def write_results(folder, row, distances, recognised=0.5):
    """Results of a row: Frechet distance by guidance scale for each seed."""
    (folder / "results").mkdir(exist_ok=True)
    model = compare_orders.ROWS[row][0]
    metrics = {"fd_pixels": 1.25, "classifier_accuracy": 0.98}
    found = {f"speed-{row}": {"threads": 1, "alone": 0.5, "batch": 0.0625}}
    found |= {f"tokenizer-{name}": {"psnr": 30.0, "metrics": metrics} for name in ("pixels", "kl", "vq")}
    for seed, by_scale in enumerate(distances):
        found[f"training-{model}-{seed}"] = {"parameters": 1234}
        by_scale = {
            scale: {"fd_pixels": value, "classifier_accuracy": recognised + seed / 100}
            for scale, value in by_scale.items()
        }
        found[f"evaluation-{row}-{seed}"] = {"metrics": by_scale}
    for name, result in found.items():
        (folder / "results" / f"{name}.json").write_text(json.dumps(result), encoding="utf-8")


def test_tables_have_mean_and_deviation_of_the_seeds(tmp_path):
    # Each seed alone would choose another scale.
    distances = [
        {"1.0": 9.0, "1.5": 3.0, "2.0": 5.0},
        {"1.0": 10.0, "1.5": 4.0, "2.0": 5.0},
        {"1.0": 11.0, "1.5": 8.5, "2.0": 5.0},
    ]
    write_results(tmp_path, "mar_diffusion", distances)
    write_results(tmp_path, "random_causal_categorical", [{"1.0": 20.0, "3.0": 19.0}] * 3, recognised=0.25)
    args = compare_orders.Arguments(str(tmp_path), only=["mar_diffusion", "random_causal_categorical"])
    comparison = compare_orders.collect(args)
    row = comparison["rows"]["mar_diffusion"]
    assert row["guidance_scale"] == 2.0
    assert row["without"]["fd_pixels"] == [10.0, 1.0]
    assert row["with"]["fd_pixels"] == [5.0, 0.0]
    assert row["with"]["classifier_accuracy"] == [pytest.approx(0.51), pytest.approx(0.01)]
    lines = draw_comparison.markdown(comparison, draw_comparison.ORDERS, with_tokenizers=False).splitlines()
    assert lines[2:] == [
        "| cross-entropy | random | causal | 1 | 1,234 | 20.00 ± 0.00 | 19.00 ± 0.00 | 26.0 ± 1.0 % "
        "| 26.0 ± 1.0 % | 3 | 0.500 | 0.062 |",
        "| diffusion | random | bidirectional | 4 on average | 1,234 | 10.00 ± 1.00 | 5.00 ± 0.00 "
        "| 51.0 ± 1.0 % | 51.0 ± 1.0 % | 2 | 0.500 | 0.062 |",
        "| real pictures |  |  |  |  | 1.25 |  | 98.0 % |  |  |  |  |",
    ]
    assert {line.count("|") for line in lines} == {13}
    # Of one seed there is no deviation.
    comparison = compare_orders.collect(compare_orders.Arguments(str(tmp_path), only=["mar_diffusion"], seeds=[0]))
    assert comparison["rows"]["mar_diffusion"]["guidance_scale"] == 1.5
    table = draw_comparison.markdown(comparison, draw_comparison.TOKENIZERS, with_tokenizers=True)
    assert "| KL | diffusion | 1.25 | 1,234 | 9.00 | 3.00 | 50.0 % | 50.0 % | 1.5 |" in table


def test_the_models_are_of_about_the_same_size():
    shared = json.loads(compare_orders.CONFIG.read_text(encoding="utf-8"))["model_config"]
    sizes = {}
    for name, (backbone, tokens, head) in compare_orders.MODELS.items():
        settings = shared | compare_orders.BACKBONES[backbone] | compare_orders.HEADS[head]
        config_class, _, model_class = BACKBONES[settings.pop("model_type", "mar_hf_mar")]
        patch = compare_orders.PATCH_SIZES.get(tokens)
        grid, width = (16 // patch, 3 * patch * patch) if patch else (8, 4)
        config = config_class(grid_height=grid, grid_width=grid, token_dim=width, num_classes=10, **settings)
        sizes[name] = sum(p.numel() for p in model_class(config).parameters())
    assert max(sizes.values()) < 1.05 * min(sizes.values()), sizes


@pytest.mark.parametrize("name", compare_orders.TOKENIZER_CONFIGS)
def test_the_tokenizers_make_such_tokens(name):
    words = ["--config", str(compare_orders.TOKENIZER_CONFIGS[name]), "--train_data_dir", "a", "--output_dir", "b"]
    args = parse_arguments(TokenizerTrainingArguments, words)
    assert (args.resolution, len(args.block_out_channels), args.latent_channels) == (16, 2, 4)
    if name == "vq":
        assert args.quantize
        assert args.num_codes == compare_orders.HEADS["categorical"]["head_config"]["num_codes"]


def test_every_row_has_a_model_and_a_table():
    assert {model for model, _ in compare_orders.ROWS.values()} == set(compare_orders.MODELS)
    assert draw_comparison.ORDERS.keys() | draw_comparison.TOKENIZERS.keys() == compare_orders.ROWS.keys()
    page = (ROOT / "docs" / "comparison.md").read_text(encoding="utf-8")
    assert [row for row in draw_comparison.TOKENIZERS if f"`{row}`" not in page] == []


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"only": ["mar", "mar_diffusion"]}, r"`only` has to name some of .*mar_pixels_4.*, got \['mar', "),
        ({"only": []}, "`only` has to name some of"),
        ({"seeds": []}, "`seeds` is empty"),
        ({"jobs": 0}, "`jobs` has to be at least 1, got 0"),
    ],
)
def test_wrong_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        compare_orders.Arguments("out", **settings)
