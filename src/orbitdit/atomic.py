"""Folders and files that appear whole or not at all, also when the power fails, and by one writer at a time.

`new_folder` lets the caller fill `.NAME.orbitdit-partial` beside the target NAME. At the end every file and folder is
synced, one rename makes the target, and the rename is synced. Who holds the lock on `.NAME.orbitdit-lock` is the
writer; the system releases it when a process dies, however it does, so a partial folder without a held lock is the
leftover of a killed run, and the next run removes it or continues from it.
"""

import errno
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from orbitdit.errors import CheckpointError, OrbitDiTError

NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@contextmanager
def new_folder(target: str | os.PathLike[str], resume: bool = False) -> Iterator[Path]:
    """A folder to fill, beside `target`, that becomes `target` when the block ends and vanishes when it fails.

    With `resume` it holds what a run that was stopped left in it, and stays when the block fails.
    Raises CheckpointError at once when `target` exists and is not an empty folder, cannot be made, or is being written
    by another process; and where the disk is full or the block's files cannot be written.
    """
    target = Path(os.path.abspath(target))
    made: list[Path] = []
    try:
        with _written_to(target, "output folder"):
            _check_free(target)
            made += [parent for parent in target.parents if not parent.exists()]
            target.parent.mkdir(parents=True, exist_ok=True)
            with _scratch(target, resume) as scratch:
                yield scratch
                _sync_tree(scratch)
                scratch.rename(target)
                for parent in (target.parent, *(folder.parent for folder in made)):
                    sync(parent)
    except BaseException:
        for parent in made:
            if parent.is_dir() and not any(parent.iterdir()):
                parent.rmdir()
        raise


@contextmanager
def new_file(target: Path) -> Iterator[Path]:
    """A file to write, beside `target`, that replaces it when the block ends and vanishes when it fails.

    Raises CheckpointError where the target cannot be written.
    """
    with _written_to(target, "file"):
        handle, name = tempfile.mkstemp(prefix=f".{target.name}.", dir=target.parent)
        os.close(handle)
        try:
            yield Path(name)
            os.chmod(name, 0o644)  # temporary files are made private
            sync(Path(name))
            os.replace(name, target)
        except BaseException:
            os.unlink(name)
            raise
        sync(target.parent)


def write_new_file(path: Path, text: str) -> None:
    """Write `text` as UTF-8 to `path`, whole or not at all. Raises as `new_file` does."""
    with new_file(path) as beside:
        beside.write_text(text, encoding="utf-8")


def sync(path: Path) -> None:
    """Have the content of a file, or the entries of a folder, on the disk before returning."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno != errno.EINVAL:  # network file systems that cannot sync folders
            raise
    finally:
        os.close(handle)


def _sync_tree(folder: Path) -> None:
    """Sync all files in `folder`, then all folders."""
    for path in sorted([*folder.rglob("*"), folder], key=Path.is_dir):
        sync(path)


def _check_free(target: Path) -> None:
    if target.is_symlink() or target == Path.cwd():
        raise CheckpointError(f"{target} is a link or the current folder: choose another output folder")
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise CheckpointError(f"{target} exists and is not an empty folder: choose another output folder")


@contextmanager
def _scratch(target: Path, resume: bool) -> Iterator[Path]:
    """The partial folder of `target`, locked: new, or with `resume` as it was left. It is removed when the block fails,
    except with `resume`."""
    scratch, lock = (target.with_name(f".{target.name}.orbitdit-{kind}") for kind in ("partial", "lock"))
    handle, left_behind = _lock(lock, target)
    try:
        _check_free(target)
        if scratch.exists() and not left_behind:
            lock.unlink()
            raise CheckpointError(f"{scratch} is in the way, and no leftover of orbitdit: remove it")
        if not resume:
            shutil.rmtree(scratch, ignore_errors=True)
        scratch.mkdir(exist_ok=resume)
        try:
            yield scratch
        except BaseException:
            if not resume:
                shutil.rmtree(scratch, ignore_errors=True)
            raise
    finally:
        if not scratch.exists():
            lock.unlink(missing_ok=True)
        os.close(handle)


def _lock(lock: Path, target: Path) -> tuple[int, bool]:
    """An open handle with the lock, and whether the file was there before: then what lies beside it is a leftover.

    Raises CheckpointError when another process holds it. Its holder removes the file at the end, and so a lock that is
    had may be one on a file that is gone: then it is tried again.
    """
    import fcntl  # late: where there is none (Windows), models can be loaded

    while True:
        there = lock.exists()
        handle = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK, 0o644)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.samestat(os.fstat(handle), os.stat(lock)):
                return handle, there
        except BlockingIOError as error:
            os.close(handle)
            raise CheckpointError(f"{target} is being written by another process: choose another output") from error
        except FileNotFoundError:
            pass
        except BaseException:
            os.close(handle)
            raise
        os.close(handle)


@contextmanager
def _written_to(target: Path, kind: str) -> Iterator[None]:
    """Turn what the system raises while `target` is written into one line with its name."""
    try:
        yield
    except OrbitDiTError:
        raise
    except ValueError as error:
        if "null" not in str(error) or "\0" not in str(target):
            raise
        raise CheckpointError(f"{str(target)!r} is no path: choose another {kind}") from error
    except OSError as error:
        if error.errno in NO_SPACE:
            raise CheckpointError(
                f"{target} cannot be written ({error.strerror}): free some space or choose another {kind}"
            ) from error
        if error.errno is None or not _beside(error.filename, target):
            raise  # of something that was read
        raise CheckpointError(f"{target} cannot be written ({error.strerror}): choose another {kind}") from error


def _beside(name: str | bytes | int | None, target: Path) -> bool:
    """Whether `name`, which an error has, is the target, what lies beside it or a folder above it."""
    if not isinstance(name, str | bytes):
        return True
    path, target = (Path(os.path.abspath(os.fsdecode(p))) for p in (name, target))
    scratch = target.with_name(f".{target.name}.orbitdit-partial")
    return path in target.parents or path.parent == target.parent or path.is_relative_to(scratch)
