# SPDX-License-Identifier: Apache-2.0
"""The stand-in hub against the real client, and the guard that keeps tests off every other machine."""

import inspect
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from huggingface_hub import HfApi, ModelCard, RepoCard, constants, hf_hub_download, snapshot_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    HfHubHTTPError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)


@pytest.fixture
def api(hub):
    api = HfApi()
    api.create_repo("org/a")
    return api


def status_of(error):
    return error.value.response.status_code


def test_every_library_uses_this_hub(hub):
    assert constants.ENDPOINT == hub.url
    assert HfApi().whoami()["name"] == "tester"
    assert ("GET", "/api/whoami-v2", 200) in hub.log


def test_other_hosts_are_refused(refused_hosts):
    with pytest.raises(RuntimeError, match="this machine only"):
        socket.create_connection(("192.0.2.1", 80), timeout=1)
    assert set(refused_hosts) == {"192.0.2.1"}
    refused_hosts.clear()


def test_repositories_are_created_once_and_deleted(api):
    assert api.create_repo("org/a", exist_ok=True).repo_id == "org/a"
    with pytest.raises(HfHubHTTPError) as error:
        api.create_repo("org/a")
    assert status_of(error) == 409
    api.delete_repo("org/a")
    assert not api.repo_exists("org/a")


def test_writing_needs_a_token(api):
    with pytest.raises(HfHubHTTPError) as error:
        HfApi(token=False).create_repo("org/b")
    assert status_of(error) == 401
    assert not api.repo_exists("org/b")


@pytest.mark.parametrize("name, is_lfs", [("a.txt", False), ("sub/model.safetensors", True)])
@pytest.mark.parametrize("repo_type", ["model", "dataset"])
def test_files_come_back_as_they_were_sent(api, name, is_lfs, repo_type):
    data = bytes(range(256)) * 20
    api.create_repo("org/files", repo_type=repo_type)
    api.upload_file(path_or_fileobj=data, path_in_repo=name, repo_id="org/files", repo_type=repo_type)
    assert Path(hf_hub_download("org/files", name, repo_type=repo_type)).read_bytes() == data
    info = api.repo_info("org/files", repo_type=repo_type, files_metadata=True)
    (file,) = info.siblings
    assert (file.rfilename, file.size, file.lfs is not None) == (name, len(data), is_lfs)


def test_a_folder_is_uploaded_listed_and_trimmed(api, tmp_path):
    (tmp_path / "x" / "y").mkdir(parents=True)
    (tmp_path / "1.json").write_text("{}")
    (tmp_path / "x" / "y" / "2.npz").write_bytes(b"123")
    (tmp_path / "empty").write_bytes(b"")
    api.upload_folder(folder_path=tmp_path, repo_id="org/a", path_in_repo="f")
    assert set(api.list_repo_files("org/a")) == {"f/1.json", "f/x/y/2.npz", "f/empty"}

    commits = len(api.list_repo_commits("org/a"))
    api.upload_folder(folder_path=tmp_path, repo_id="org/a", path_in_repo="f")
    assert len(api.list_repo_commits("org/a")) == commits

    api.delete_file("f/empty", repo_id="org/a")
    api.delete_folder("f/x", repo_id="org/a")
    assert [entry.path for entry in api.list_repo_tree("org/a", recursive=True)] == ["f", "f/1.json"]


def test_branches_are_separate_and_snapshots_work_offline(api):
    api.upload_file(path_or_fileobj=b"main", path_in_repo="a.txt", repo_id="org/a")
    api.create_branch("org/a", branch="dev")
    api.upload_file(path_or_fileobj=b"dev", path_in_repo="a.txt", repo_id="org/a", revision="dev")
    assert Path(snapshot_download("org/a"), "a.txt").read_bytes() == b"main"
    assert Path(snapshot_download("org/a", revision="dev"), "a.txt").read_bytes() == b"dev"

    code = "from huggingface_hub import snapshot_download; print(snapshot_download('org/a'))"
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    run = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert Path(run.stdout.strip(), "a.txt").read_bytes() == b"main"


@pytest.mark.parametrize(
    "error, arguments",
    [
        (RepositoryNotFoundError, {"repo_id": "org/none", "filename": "a.txt"}),
        (RevisionNotFoundError, {"repo_id": "org/a", "filename": "a.txt", "revision": "none"}),
        (EntryNotFoundError, {"repo_id": "org/a", "filename": "none.txt"}),
    ],
)
def test_what_is_missing_is_named(api, error, arguments):
    with pytest.raises(error):
        hf_hub_download(**arguments)


def test_a_stale_parent_commit_is_refused(api):
    parent = api.model_info("org/a").sha
    api.upload_file(path_or_fileobj=b"1", path_in_repo="a.txt", repo_id="org/a")
    with pytest.raises(HfHubHTTPError) as error:
        api.upload_file(path_or_fileobj=b"2", path_in_repo="a.txt", repo_id="org/a", parent_commit=parent)
    assert status_of(error) == 412
    assert Path(hf_hub_download("org/a", "a.txt")).read_bytes() == b"1"


@pytest.mark.skipif(
    "huggingface.co" in inspect.getsource(RepoCard.validate),
    reason="this client has cards checked by the public service, whatever HF_ENDPOINT says",
)
def test_model_card_round_trip(api):
    ModelCard("---\nlicense: mit\ntags:\n- mar\n---\n# Hi\n").push_to_hub("org/a")
    assert ModelCard.load("org/a").data.license == "mit"
    assert api.model_info("org/a").tags == ["mar"]
