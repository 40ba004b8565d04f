# SPDX-License-Identifier: Apache-2.0
"""`python -m mar_hf.training`, in a process of its own and in two."""

import os
import subprocess
import sys

import pytest
from test_trainer import SETTINGS, write_pictures

from mar_hf import MARPipeline


def run(*words):
    settings = {"CUDA_VISIBLE_DEVICES": "", "ACCELERATE_USE_CPU": "true", "HF_HUB_OFFLINE": "1"}
    return subprocess.run(list(map(str, words)), capture_output=True, text=True, env={**os.environ, **settings})


@pytest.mark.slow
def test_two_processes_of_a_launcher_train(tmp_path):
    pictures = write_pictures(tmp_path / "data", ["cat", "dog"], 4)
    settings = {**SETTINGS, "max_train_steps": 1, "train_data_dir": pictures, "output_dir": tmp_path / "out"}
    words = [word for name, value in settings.items() for word in (f"--{name}", value)]
    launcher = ["torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m"]
    done = run(sys.executable, "-m", *launcher, "mar_hf.training", *words)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("pipeline in") == 1
    assert MARPipeline.from_pretrained(tmp_path / "out" / "pipeline").labels == {"cat": 0, "dog": 1}


@pytest.mark.slow
def test_accelerate_hands_on_what_it_is_given():
    launcher = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", "-m", "mar_hf.training"]
    done = run(*launcher, "text_encoder", "--help")
    assert done.returncode == 0 and "--vocab_size" in done.stdout
