# SPDX-License-Identifier: Apache-2.0
"""What a measurement ran on."""

import json
import platform

import torch

import mar_hf
from mar_hf.evaluation import describe_machine, describe_versions


def test_the_machine_is_this_one():
    found = describe_machine()
    assert found["cores"] > 0 and found["threads"] == torch.get_num_threads() and "gpu" not in found
    assert json.loads(json.dumps(found)) == found


def test_versions_are_those_that_run():
    found = describe_versions("numpy")
    assert found["mar_hf"] == mar_hf.__version__ and found["torch"] == torch.__version__
    assert found["python"] == platform.python_version() and "numpy" in found
