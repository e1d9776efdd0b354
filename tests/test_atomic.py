"""Folders that appear whole or not at all: power loss, full disks, other writers, leftovers of killed runs."""

import os
import subprocess
from pathlib import Path

import pytest

from orbitdit import CheckpointError, atomic
from orbitdit.atomic import new_folder, write_new_file


def fill(scratch):
    (scratch / "deep").mkdir()
    (scratch / "deep" / "weights").write_bytes(bytes(100))
    (scratch / "config.json").write_text("{}")


def contents(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


FILLED = {"config.json": b"{}", "deep/weights": bytes(100)}


class Disk:
    """What would be there after a loss of power: the content that files, and the entries that folders, had when they
    were last synced. A rename may be there at once, or only when its folder is synced; both are looked at."""

    def __init__(self, monkeypatch):
        self.files: dict[int, bytes] = {}
        self.folders: dict[int, dict[str, int]] = {}
        self.renames: list[dict[str, bytes | None]] = []
        real_sync, real_rename = os.fsync, Path.rename

        def fsync(handle):
            path = Path(os.readlink(f"/proc/self/fd/{handle}"))
            if path.is_dir():
                self.folders[path.stat().st_ino] = {p.name: p.stat().st_ino for p in path.iterdir()}
            else:
                self.files[path.stat().st_ino] = path.read_bytes()
            real_sync(handle)

        def rename(path, target):
            self.renames.append(self.surviving(path.stat().st_ino))
            return real_rename(path, target)

        monkeypatch.setattr(os, "fsync", fsync)
        monkeypatch.setattr(Path, "rename", rename)

    def surviving(self, folder, prefix=""):
        """Name -> content, None where entries or content were not synced, of all that is in the folder."""
        if folder not in self.folders:
            return {prefix: None}
        found = {}
        for name, inode in self.folders[folder].items():
            if inode in self.folders:
                found |= self.surviving(inode, f"{prefix}{name}/")
            else:
                found[f"{prefix}{name}"] = self.files.get(inode)
        return found


@pytest.mark.skipif(not os.path.exists("/proc/self/fd"), reason="needs Linux to see what is synced")
def test_power_may_fail_at_any_time(tmp_path, monkeypatch):
    disk = Disk(monkeypatch)
    with new_folder(tmp_path / "a" / "out") as scratch:
        fill(scratch)
    assert disk.renames == [FILLED]  # whole before it has its name
    assert contents(tmp_path / "a" / "out") == FILLED
    parent = disk.folders[(tmp_path / "a").stat().st_ino]  # and the name is on the disk at the end, below its parents
    assert parent["out"] == (tmp_path / "a" / "out").stat().st_ino
    assert disk.folders[tmp_path.stat().st_ino]["a"] == (tmp_path / "a").stat().st_ino


@pytest.mark.skipif(not os.path.exists("/proc/self/fd"), reason="needs Linux to see what is synced")
def test_the_simulation_finds_what_is_not_synced(tmp_path, monkeypatch):
    disk = Disk(monkeypatch)
    monkeypatch.setattr(atomic, "_sync_tree", lambda folder: atomic.sync(folder))
    with new_folder(tmp_path / "out") as scratch:
        fill(scratch)
    assert disk.renames == [{"deep": None, "config.json": None}]


def test_leftovers_of_a_killed_run_go_with_the_next(tmp_path):
    killed(tmp_path / "out")
    assert sorted(os.listdir(tmp_path)) == [".out.orbitdit-lock", ".out.orbitdit-partial"]
    with new_folder(tmp_path / "out") as scratch:
        assert os.listdir(scratch) == []
        fill(scratch)
    assert os.listdir(tmp_path) == ["out"]


def test_a_run_that_fails_cleans_up_after_a_killed_one(tmp_path):
    killed(tmp_path / "out")
    with pytest.raises(KeyError), new_folder(tmp_path / "out"):
        raise KeyError
    assert os.listdir(tmp_path) == []


def test_resuming_keeps_what_is_there_and_leaves_it(tmp_path):
    killed(tmp_path / "out")

    def fail():
        with new_folder(tmp_path / "out", resume=True) as scratch:
            assert contents(scratch) == FILLED
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    with new_folder(tmp_path / "out", resume=True) as scratch:
        assert contents(scratch) == FILLED
    assert os.listdir(tmp_path) == ["out"]


def killed(target):
    """Leave what a process leaves that is killed when it has filled its folder."""
    child = os.fork()
    if child == 0:
        with new_folder(target) as scratch:
            fill(scratch)
            os._exit(9)
    assert os.waitpid(child, 0)[1] == 9 << 8


def test_a_folder_of_somebody_else_is_not_removed(tmp_path):
    (tmp_path / ".out.orbitdit-partial").mkdir()
    (tmp_path / ".out.orbitdit-partial" / "thesis.txt").write_text("mine")
    for _ in range(2):
        with pytest.raises(CheckpointError, match="no leftover of orbitdit: remove it"), new_folder(tmp_path / "out"):
            pass
    assert contents(tmp_path) == {".out.orbitdit-partial/thesis.txt": b"mine"}


@pytest.mark.parametrize("resume", [False, True])
def test_of_two_writers_one_wins(tmp_path, resume):
    with new_folder(tmp_path / "out", resume) as scratch:
        fill(scratch)
        with pytest.raises(CheckpointError, match="is being written by another process"), new_folder(tmp_path / "out"):
            pass
        assert contents(scratch) == FILLED
    assert contents(tmp_path / "out") == FILLED
    assert os.listdir(tmp_path) == ["out"]


def test_a_target_that_comes_in_between_stays(tmp_path):
    """From a program that knows nothing of locks."""

    def write():
        with new_folder(tmp_path / "out") as scratch:
            fill(scratch)
            (tmp_path / "out").mkdir()
            (tmp_path / "out" / "x").write_text("mine")

    with pytest.raises(CheckpointError, match="cannot be written"):
        write()
    assert contents(tmp_path) == {"out/x": b"mine"}


@pytest.mark.parametrize("name", ["x" * 250, "a\0b", "file/out", "file/deep/out"])
def test_names_that_cannot_be(tmp_path, name):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(CheckpointError, match="choose another output folder") as caught, new_folder(tmp_path / name):
        pass
    assert "\n" not in str(caught.value)
    with pytest.raises(CheckpointError, match="choose another file"):
        write_new_file(tmp_path / name, "text")
    assert contents(tmp_path) == {"file": b"mine"}


@pytest.fixture(params=["size=200k", "size=200k,ro"])
def small_disk(tmp_path, request):
    """A file system of 200 kB that is full soon, or one that is read-only, for who may mount one."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", request.param, "tmpfs", str(folder)]
    try:
        done = subprocess.run(command, capture_output=True).returncode == 0
    except OSError:
        done = False
    if not done:
        pytest.skip("may not mount a file system")
    yield folder, "No space left" if request.param == "size=200k" else "Read-only file system"
    subprocess.run(["umount", str(folder)], check=True)


def test_full_and_read_only_disks(small_disk):
    folder, reason = small_disk
    with pytest.raises(CheckpointError, match=reason) as caught, new_folder(folder / "a" / "out") as scratch:
        (scratch / "weights").write_bytes(bytes(10**6))
    assert str(caught.value).startswith(f"{folder / 'a' / 'out'} cannot be written")
    with pytest.raises(CheckpointError, match=reason):
        write_new_file(folder / "plan.json", "x" * 10**6)
    assert os.listdir(folder) == []


def test_new_files_are_whole_and_for_others_to_read(tmp_path):
    write_new_file(tmp_path / "plan.json", "é\n")
    write_new_file(tmp_path / "plan.json", "ü\n")
    assert contents(tmp_path) == {"plan.json": "ü\n".encode()}
    assert (tmp_path / "plan.json").stat().st_mode & 0o777 == 0o644
