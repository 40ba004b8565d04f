# SPDX-License-Identifier: Apache-2.0
"""What holds for every test: our own hub instead of the real one, no other network, one thread."""

import os
import socket
import sys
import tempfile
from collections import Counter
from contextlib import contextmanager

import pytest
from hypothesis import settings

from fake_hub import FakeHub


if "huggingface_hub" in sys.modules:
    raise RuntimeError("huggingface_hub was imported before conftest.py could point it at the tests' own hub")

LOOPBACK = {"127.0.0.1", "::1", "localhost", socket.gethostname(), "", None}
HUB = FakeHub().__enter__()
HF_HOME = tempfile.TemporaryDirectory(prefix="mar-hf-tests-")

# Examples are tested as subprocesses, so all of this goes through the environment. Nothing of the user's own
# settings (a token, an offline switch, another cache) may decide what a test sees.
for name in [name for name in os.environ if name.startswith(("HF_", "HUGGING_FACE_", "TRANSFORMERS_", "DIFFUSERS_"))]:
    del os.environ[name]
os.environ.update(
    HF_ENDPOINT=HUB.url,
    HF_TOKEN="hf_test",
    HF_HOME=HF_HOME.name,
    HF_HUB_DISABLE_XET="1",
    HF_HUB_DISABLE_TELEMETRY="1",
    HF_HUB_DISABLE_PROGRESS_BARS="1",
    NO_PROXY="127.0.0.1,localhost",
    OMP_NUM_THREADS="1",
)

import torch  # noqa: E402  (after OMP_NUM_THREADS)


torch.set_num_threads(1)
# The same examples every time, on machines of any speed.
settings.register_profile("tests", deadline=None, derandomize=True, max_examples=40)
settings.load_profile("tests")

_refused: list[str] = []


def _refuse_network(event: str, args: tuple) -> None:
    if event == "socket.getaddrinfo":
        host = args[0]
    elif event == "socket.connect" and isinstance(args[1], tuple):
        host = args[1][0]
    else:
        return
    host = host.decode() if isinstance(host, bytes) else host
    if host not in LOOPBACK:
        _refused.append(host)
        raise RuntimeError(f"a test asked for {host!r}; tests reach this machine only")


sys.addaudithook(_refuse_network)


def pytest_collection_modifyitems(items):
    """Begin with the files that take longest, so that no worker is left with one of them at the end."""
    slow = Counter(item.path for item in items if item.get_closest_marker("slow"))
    items.sort(key=lambda item: -slow[item.path])


@pytest.fixture(autouse=True)
def refused_hosts():
    """Fails the test that tried to reach another machine, also when something caught the refusal."""
    _refused.clear()
    yield _refused
    assert not _refused, f"the test tried to reach {_refused}"


@pytest.fixture
def full_disk():
    """`with full_disk(size):` lets no file grow beyond `size` bytes, as if there was no more room."""
    resource = pytest.importorskip("resource")

    @contextmanager
    def limit(size):
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)

    return limit


@pytest.fixture
def hub():
    """The stand-in for the model hub, empty. Every library here already uses it, with a token that may write."""
    HUB.clear()
    return HUB
