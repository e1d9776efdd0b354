"""Results as JSON lines that survive a stop: each line is complete in itself and written at once."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from orbitdit.errors import CheckpointError


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The lines of `path` as dictionaries; an unfinished last line is left out. Raises CheckpointError, with the line's
    number, for anything else that is no JSON object."""
    return _parse(path)[0]


def append_line(path: Path, line: Mapping[str, Any]) -> None:
    """Add one line to `path`. Raises CheckpointError when it cannot be written."""
    try:
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
    except OSError as error:
        raise CheckpointError(f"{path} cannot be written ({error.strerror}): choose another file") from error


def resume_lines(path: Path) -> tuple[list[dict[str, Any]], str]:
    """The lines of `path` (none if there is no such file), made ready to be added to, and what was repaired.

    A last line that a stop left unfinished is cut off, and the message, otherwise empty, says so.
    """
    if not path.exists():
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise CheckpointError(f"{path.parent} cannot be made ({error.strerror}): choose another file") from error
        return [], ""
    rows, whole, torn = _parse(path)
    if not torn:
        return rows, ""
    with path.open("r+b") as file:
        file.truncate(whole)
    return rows, f"{path}: the last line was unfinished and has been cut off; it is measured again"


def _parse(path: Path) -> tuple[list[dict[str, Any]], int, bool]:
    """The whole lines, how many bytes they take, and whether more follows."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read ({error.strerror})") from error
    whole = data.rfind(b"\n") + 1
    rows = []
    for number, text in enumerate(data[:whole].splitlines(), start=1):
        try:
            row = json.loads(text)
        except ValueError:
            row = None
        if not isinstance(row, dict):
            raise CheckpointError(f"{path}, line {number} is no JSON object: repair or remove it")
        rows.append(row)
    return rows, whole, whole < len(data)
