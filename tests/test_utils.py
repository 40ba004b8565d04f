# SPDX-License-Identifier: Apache-2.0
import os
import signal
import stat
import sys

import numpy as np
import pytest
from PIL import Image

from mar_hf.utils import CELL, atomic_file, atomic_folder, draw_grid, import_extra


def names(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture
def full(tmp_path):
    folder = tmp_path / "full"
    folder.mkdir()
    (folder / "old.txt").write_text("old")
    return folder


@pytest.mark.parametrize("make_first", [False, True])
def test_a_new_or_empty_folder_appears_when_the_body_ends(tmp_path, make_first):
    dst = tmp_path / "a" / "b"
    if make_first:
        dst.mkdir(parents=True)
    with atomic_folder(dst) as folder:
        (folder / "sub").mkdir()
        (folder / "sub" / "x.txt").write_text("x")
        assert not (dst / "sub").exists()
    assert (dst / "sub" / "x.txt").read_text() == "x"
    assert names(tmp_path / "a") == ["b"]


def test_the_new_folder_has_ordinary_permissions(tmp_path):
    (tmp_path / "plain").mkdir()
    with atomic_folder(tmp_path / "atomic"):
        pass
    assert (tmp_path / "atomic").stat().st_mode == (tmp_path / "plain").stat().st_mode


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_failure_leaves_nothing(tmp_path, error):
    with pytest.raises(error), atomic_folder(tmp_path / "dst") as folder:
        (folder / "half.txt").write_text("half")
        raise error
    assert names(tmp_path) == []


def test_a_full_folder_is_refused_before_the_body_runs(tmp_path, full):
    with pytest.raises(ValueError, match="`dst` must be a new or an empty folder .*full.* holds files"):
        with atomic_folder(full):
            pytest.fail("the body ran")
    assert names(full) == ["old.txt"]


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_file_is_refused(tmp_path, overwrite):
    (tmp_path / "file").write_text("kept")
    with pytest.raises(ValueError, match="is a file"):
        with atomic_folder(tmp_path / "file", overwrite=overwrite):
            pytest.fail("the body ran")
    assert (tmp_path / "file").read_text() == "kept"


def test_overwrite_replaces_the_whole_folder(tmp_path, full):
    with atomic_folder(full, overwrite=True) as folder:
        (folder / "new.txt").write_text("new")
        assert names(full) == ["old.txt"]
    assert names(full) == ["new.txt"]
    assert names(tmp_path) == ["full"]


def test_a_failed_overwrite_keeps_the_old_folder(tmp_path, full):
    with pytest.raises(RuntimeError), atomic_folder(full, overwrite=True) as folder:
        (folder / "new.txt").write_text("new")
        raise RuntimeError
    assert names(full) == ["old.txt"]
    assert names(tmp_path) == ["full"]


def test_the_old_folder_comes_back_when_the_new_one_cannot_take_its_place(tmp_path, full):
    with pytest.raises(FileNotFoundError), atomic_folder(full, overwrite=True) as folder:
        folder.rmdir()
    assert names(full) == ["old.txt"]
    assert names(tmp_path) == ["full"]


def test_what_appeared_meanwhile_is_not_lost(tmp_path):
    with pytest.raises(OSError), atomic_folder(tmp_path / "dst") as folder:
        (folder / "ours.txt").write_text("ours")
        (tmp_path / "dst").mkdir()
        (tmp_path / "dst" / "theirs.txt").write_text("theirs")
    assert names(tmp_path / "dst") == ["theirs.txt"]
    assert names(tmp_path) == ["dst"]


def test_the_working_directory_by_its_short_name(tmp_path, monkeypatch):
    (tmp_path / "cwd").mkdir()
    monkeypatch.chdir(tmp_path / "cwd")
    with atomic_folder(".") as folder:
        (folder / "x.txt").write_text("x")
    assert names(tmp_path) == ["cwd"]
    assert names(tmp_path / "cwd") == ["x.txt"]


def test_a_file_is_replaced_when_the_body_ends(tmp_path):
    dst = tmp_path / "a" / "b.txt"
    with atomic_file(dst) as path:
        path.write_text("one")
        assert path.suffix == ".txt" and not dst.exists()
    with atomic_file(dst) as path:
        path.write_text("two")
        assert dst.read_text() == "one"
    assert dst.read_text() == "two" and names(tmp_path / "a") == ["b.txt"]


def test_an_error_leaves_the_old_file(tmp_path):
    dst = tmp_path / "b.txt"
    dst.write_text("old")
    with pytest.raises(OSError, match="full"):
        with atomic_file(dst) as path:
            path.write_text("half")
            raise OSError("full")
    assert dst.read_text() == "old" and names(tmp_path) == ["b.txt"]


def test_a_folder_is_no_file(tmp_path):
    with pytest.raises(ValueError, match="is a folder"):
        with atomic_file(tmp_path):
            pass


def test_a_grid_of_small_pictures_is_enlarged():
    images = [Image.new("RGB", (32, 32), color) for color in ("red", "blue")]
    grid = draw_grid(images, ["a", "a name too long for one line before its row of pictures " * 3])
    assert grid.height == 2 * (CELL + 4) + 4
    assert grid.getpixel((grid.width - 10, 10)) == (255, 0, 0)
    assert grid.getpixel((grid.width - 10, grid.height - 10)) == (0, 0, 255)
    assert grid.width < 400


def test_many_rows_stand_in_blocks_side_by_side():
    colours = [(index, 0, 0) for index in range(35)]
    images = [Image.new("RGB", (96, 96), colour) for colour in colours for _ in range(2)]
    grid = draw_grid(images, [f"name {index}" for index in range(35)])
    width, step = grid.width // 3, CELL + 4
    assert grid.height == 12 * step + 4
    for index, colour in enumerate(colours):
        block, row = divmod(index, 12)
        for column in range(2):
            right = (block + 1) * width - (1 - column) * step - 10
            assert grid.getpixel((right, 10 + row * step)) == colour
    assert grid.getpixel((grid.width - 10, grid.height - 10)) == (255, 255, 255), "35 names leave one place"


def test_names_are_written_in_full_on_three_lines():
    def ink(*names):
        labels = draw_grid([Image.new("RGB", (96, 96), "white")] * len(names), names)
        return (np.asarray(labels.convert("L"))[: CELL + 4] < 128).any(1).sum()

    one = ink("woman cook")
    two = ink("woman cook: medium-dark skin tone")
    three = ink("woman cook: medium-dark skin tone, at the door of a kitchen")
    assert 0 < one < two < three < CELL
    assert ink("woman cook " * 20) < CELL, "the rest is left out"


# Writers that are killed, or write at the same time


EVENTS = ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.chmod", "shutil.rmtree", "fcntl.flock")
needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")


def write_file(dst, text):
    with atomic_file(dst) as path:
        path.write_text(text)


def write_folder(dst, text, fail=False):
    with atomic_folder(dst, overwrite=True) as folder:
        (folder / "sub").mkdir()
        for name in ("x.txt", "sub/y.txt"):
            (folder / name).write_text(text)
        if fail:
            raise RuntimeError("the body fails")


def content(dst):
    """What a file or a folder holds, None where there is nothing."""
    if dst.is_dir():
        return {(dst / name).read_text() for name in ("x.txt", "sub/y.txt")}
    return {dst.read_text()} if dst.exists() else None


def killed_before(number, write):
    """Write in another process, which kills itself before its `number`-th step in the file system; whether it did."""
    child = os.fork()
    if child == 0:
        left = number

        def count(event, args):
            nonlocal left
            if event in EVENTS:
                if left == 0:
                    os.kill(os.getpid(), signal.SIGKILL)
                left -= 1

        sys.addaudithook(count)
        try:
            write()
        finally:
            os._exit(0)
    status = os.waitpid(child, 0)[1]
    return os.WIFSIGNALED(status)


@needs_fork
@pytest.mark.parametrize("write", [write_file, write_folder])
@pytest.mark.parametrize("exists", [False, True])
def test_a_kill_at_any_moment_leaves_old_or_new_and_nothing_else_after_the_next_write(write, exists, tmp_path):
    number, kills = 0, 0
    while True:
        dst = tmp_path / str(number) / "dst"
        if exists:
            write(dst, "old")
        if not killed_before(number, lambda: write(dst, "new")):
            break
        kills += 1
        allowed = [{"new"}, {"old"} if exists else None]
        if write is write_folder:
            assert content(dst) in [*allowed, None]  # between two renames it is at neither place
            with pytest.raises(RuntimeError):
                write_folder(dst, "broken", fail=True)
        assert content(dst) in allowed
        write(dst, "newer")
        assert content(dst) == {"newer"}
        assert names(dst.parent) == ["dst"]
        number += 1
    assert kills > 5 and content(dst) == {"new"} and names(dst.parent) == ["dst"]


@needs_fork
def test_a_kill_inside_the_body_is_cleaned_up_by_the_next_write(tmp_path):
    def write():
        with atomic_file(tmp_path / "dst") as path:
            path.write_text("half")
            os.kill(os.getpid(), signal.SIGKILL)

    assert killed_before(10**6, write)
    assert [name.startswith(".dst.") for name in names(tmp_path)] == [True]
    write_file(tmp_path / "other", "x")
    assert len(names(tmp_path)) == 2, "another target's"
    write_file(tmp_path / "dst", "whole")
    assert names(tmp_path) == ["dst", "other"]


def test_writers_at_the_same_time_leave_each_other_alone(tmp_path):
    dst = tmp_path / "dst"
    with atomic_file(dst) as first:
        first.write_text("first")
        with atomic_file(dst) as second, atomic_file(dst) as third:
            second.write_text("second")
            third.write_text("third")
        assert dst.read_text() == "second", "the last to end"
    assert dst.read_text() == "first" and names(tmp_path) == ["dst"]


@needs_fork
def test_what_several_killed_writers_left_goes_at_once(tmp_path):
    def write(depth=3):
        with atomic_folder(tmp_path / "dst") as folder:
            (folder / "x").touch()
            write(depth - 1) if depth else os.kill(os.getpid(), signal.SIGKILL)

    assert killed_before(10**6, write)
    assert len(names(tmp_path)) == 4
    with atomic_folder(tmp_path / "dst"):
        assert len(names(tmp_path)) == 1
    assert names(tmp_path) == ["dst"]


# What the old one was


@pytest.mark.parametrize("mode", [0o600, 0o640, 0o666])
def test_permissions_stay(mode, tmp_path):
    write_file(tmp_path / "new", "x")
    (tmp_path / "plain").touch()
    assert (tmp_path / "new").stat().st_mode == (tmp_path / "plain").stat().st_mode
    (tmp_path / "plain").chmod(mode)
    write_file(tmp_path / "plain", "x")
    assert stat.S_IMODE((tmp_path / "plain").stat().st_mode) == mode
    write_folder(tmp_path / "folder", "x")
    (tmp_path / "folder").chmod(mode | 0o100)
    write_folder(tmp_path / "folder", "y")
    assert stat.S_IMODE((tmp_path / "folder").stat().st_mode) == mode | 0o100


@pytest.mark.parametrize("write", [write_file, write_folder])
def test_links_are_followed(write, tmp_path):
    real, link = tmp_path / "there" / "real", tmp_path / "link"
    link.symlink_to(real)
    for text in ("one", "two"):
        write(link, text)
        assert link.is_symlink() and content(real) == {text}
    assert names(tmp_path) == ["link", "there"] and names(real.parent) == ["real"]


def test_what_is_no_ordinary_file_is_refused(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for place in (tmp_path / "pipe", "/dev/null"):
        with pytest.raises(ValueError, match="no ordinary file"):
            write_file(place, "x")


@pytest.mark.parametrize("name", ["x" * 255, "é" * 127, ".hidden", "lock", "new", "a b\n[c]*.txt"])
def test_names_of_any_kind(name, tmp_path):
    for write in (write_file, write_folder):
        dst = tmp_path / write.__name__ / name
        write(dst, "one")
        write(dst, "two")
        assert content(dst) == {"two"} and names(dst.parent) == [name]


def test_a_full_disk_leaves_the_old_file_and_is_told_with_its_name(tmp_path, full_disk):
    write_file(tmp_path / "dst", "old")
    with full_disk(100), pytest.raises(OSError, match="dst"):
        write_file(tmp_path / "dst", "new" * 1000)
    assert content(tmp_path / "dst") == {"old"} and names(tmp_path) == ["dst"]


def test_an_absent_extra_is_named(monkeypatch):
    assert import_extra("json", "train").loads("1") == 1
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ImportError, match=r'`datasets` is needed here: pip install "mar_hf\[train\]"'):
        import_extra("datasets", "train")
