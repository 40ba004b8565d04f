# SPDX-License-Identifier: Apache-2.0
"""Faster settings: what makes their pictures, the clock, the curve of given rounds. Tables that are refused, and
whole measurements: tests/examples/test_measure_speed.py."""

import sys

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler
from PIL import Image

from mar_hf import MARPipeline, TokenDDPMScheduler, demo_checkpoint
from mar_hf.evaluation import image_generator, speed
from tiny_pipelines import tiny_pipeline


FEW_STEPS = {"scheduler": "DDIMScheduler", "num_diffusion_steps": 2, "guidance_interval": [0.5, 1.0]}


def test_pictures_are_those_of_the_setting():
    pipe = tiny_pipeline()
    variant, arguments = speed.prepare(pipe, FEW_STEPS)
    found = speed.make_pictures(variant, arguments, [(0, 3), (2, 1)], seed=4)
    assert found.shape == (2, 3, 8, 8) and found.dtype == torch.uint8
    assert isinstance(pipe.scheduler, TokenDDPMScheduler) and variant.transformer is pipe.transformer
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    arguments = {"num_diffusion_steps": 2, "guidance_interval": (0.5, 1.0)}
    generators = [image_generator(4, 0, 3), image_generator(4, 2, 1)]
    expected = pipe([0, 2], generator=generators, output_type="np", **arguments).images
    assert np.abs(found.permute(0, 2, 3, 1).numpy() - expected * 255).max() <= 0.51


def test_weights_in_8_bits():
    quantization = pytest.importorskip("torchao.quantization")
    pipe = MARPipeline.from_pretrained(demo_checkpoint())
    variant, _ = speed.prepare(pipe, {"dtype": "int8"})
    kinds = [type(model.model.decoder_layers[0].mlp.fc1.weight) for model in (variant.transformer, pipe.transformer)]
    assert issubclass(kinds[0], quantization.Int8Tensor) and kinds[1] is torch.nn.Parameter


def test_the_curve_of_given_rounds():
    table = {"defaults": {}, "fast": {"num_inference_steps": 2, "scheduler": "DDIMScheduler"}}
    rounds = [
        {"name": name, "setting": table[name], "seed": seed, "seconds": seconds, "seconds_alone": 2.0}
        | {"metrics": {"fid": fid, "recall": 0.5}}
        for seed, name, seconds, fid in [
            *((1, "defaults", 6.0, 12.0), (0, "defaults", 4.0, 10.0), (2, "defaults", 40.0, 14.0)),
            *((0, "fast", 2.0, 11.0), (1, "fast", 2.0, 12.0), (2, "fast", 10.0, 10.0)),
        ]
    ]
    default, fast = speed.summarise(rounds, table)
    assert (default["seconds"], default["speed_up"], default["distance"], default["deviation"]) == (
        6.0,
        1.0,
        12.0,
        2.0,
    )
    # The median of 2, 3 and 4: a round in which the machine was busy is compared with itself.
    assert (fast["seconds"], fast["speed_up"], fast["speed_up_alone"], fast["distance"]) == (2.0, 3.0, 1.0, 11.0)
    assert fast["metrics"] == {"fid": 11.0, "recall": 0.5}
    assert (fast["scheduler"], fast["arguments"]) == ("DDIMScheduler", {"num_inference_steps": 2})
    text = speed.draw_table({"metric": "fid", "points": [default, fast]})
    assert text.splitlines()[3] == "| fast | 2 | 3.00 | 2 | 1.00 | 11 ± 1 | -0.5 | 0.5 |"


def test_without_torchao_its_weights_are_refused(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchao.quantization", None)
    with pytest.raises(ValueError, match='`dtype` "int8" needs torchao: pip install'):
        speed.prepare(tiny_pipeline(), {"dtype": "int8"})


def test_a_setting_s_dtype_is_its_own():
    pipe = tiny_pipeline()
    variant, arguments = speed.prepare(pipe, {"dtype": "float16", "num_inference_steps": 2})
    assert variant.dtype == variant.vae.dtype == torch.float16 and pipe.dtype == torch.float32
    assert arguments == {"num_inference_steps": 2}


def test_pictures_and_their_times():
    jobs = [(label, number) for label in (0, 2) for number in range(2)]
    pictures, seconds, alone = speed.time_pictures(tiny_pipeline(), {"num_inference_steps": 2}, jobs, 3, seed=1)
    assert len(pictures) == 4 and seconds > 0 and alone > 0
    expected = speed.make_pictures(tiny_pipeline(), {"num_inference_steps": 2}, jobs, seed=1)
    assert (torch.stack(pictures).int() - expected.int()).abs().max() <= 1
    assert speed.median_seconds(tiny_pipeline(), jobs, calls=2, num_inference_steps=1) > 0


def test_the_curve_has_a_mark_for_each_setting(tmp_path):
    points = [
        {"name": name, "distance": 1.0 + number, "deviation": 0.1, "speed_up": 1.0 + number}
        for number, name in enumerate(["defaults", "steps 4", "steps 2", "DDIM"])
    ]
    speed.draw_curve({"metric": "fid", "points": points}, tmp_path / "curve.png")
    assert Image.open(tmp_path / "curve.png").width > 600
