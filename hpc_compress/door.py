"""The one way in for data that others wrote: run folders, checkpoints, exports, what a cluster's commands print.

Such data comes from a stranger. It is bounded in size, stays inside its folder, is never imported or run, and damage in it
is named. Knows nothing of what the data means.
"""

import errno
import json
import os
import re
import stat
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

B = TypeVar("B", bound=BaseModel)
T = TypeVar("T")

RECORD_BYTES = 64 * 2**20  # no record of ours comes near it
PASSING = (errno.ESTALE, errno.EIO, errno.EINTR, errno.ETIMEDOUT)  # what a network filesystem says now and then
WAITS_SECONDS = (0.1, 0.5, 2.0, 8.0, 30.0)  # between tries after a passing error


class DamageError(ValueError):
    """A file that can't be used; the message names the file and what is wrong with it."""


def patiently(do: Callable[[], T], sleep: Callable[[float], None] = time.sleep) -> T:
    """Do something on a network filesystem; try again after errors that pass.

    Raises: OSError when the error does not pass, or is another one.
    """
    for seconds in WAITS_SECONDS:
        try:
            return do()
        except OSError as error:
            if error.errno not in PASSING:
                raise
        sleep(seconds)
    return do()


def read_bytes(path: Path, most: int = RECORD_BYTES) -> bytes:
    """The content of a regular file.

    Raises: FileNotFoundError; OSError while the filesystem is away, which says nothing of the file; DamageError for a file
    that is no regular one, can't be read, or has more than `most` bytes.
    """
    try:
        return patiently(lambda: _read(path, most))
    except OSError as error:
        if isinstance(error, FileNotFoundError) or error.errno in PASSING:
            raise
        raise DamageError(f"{path} can't be read: {error.strerror}") from None


def _read(path: Path, most: int) -> bytes:
    # O_NONBLOCK: opening a pipe would wait for a writer.
    with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as stream:
        if not stat.S_ISREG(os.fstat(stream.fileno()).st_mode):
            raise DamageError(f"{path} is not a regular file")
        content = stream.read(most + 1)
    if len(content) > most:
        raise DamageError(f"{path} has more than {most / 2**20:.0f} MiB; no such file of ours is so large")
    return content


def tail(path: Path, most: int = 2**14) -> str:
    """The end of a regular file as text, such as of a log that may have any size.

    Raises: OSError; DamageError for a file that is no regular one.
    """
    with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as stream:
        status = os.fstat(stream.fileno())
        if not stat.S_ISREG(status.st_mode):
            raise DamageError(f"{path} is not a regular file")
        stream.seek(max(0, status.st_size - most))
        return stream.read(most).decode(errors="replace")


def record(path: Path, kind: type[B]) -> B | None:
    """The record in a JSON file; None where there is no such file.

    Raises: OSError while the filesystem is away; DamageError for a file that is cut short, is no JSON, or is not a record of
    this kind.
    """
    try:
        content = read_bytes(path)
    except FileNotFoundError:
        return None
    try:
        return kind.model_validate_json(content)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        if first["type"] != "json_invalid":
            where = ".".join(map(str, first["loc"]))
            said = f"is no {kind.__name__.lower()} that this version knows: {where + ': ' if where else ''}{first['msg']}"
        elif "EOF" in first["msg"] or not content.strip(b"\0 \n"):
            said = "is cut short"
        else:
            said = "is not valid JSON"
        raise DamageError(f"{path} {one_line(said)}") from None


def json_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file that has no record type of ours, such as a checkpoint's config.json.

    Raises: as `read_bytes`; DamageError for a file that is cut short, is no JSON, or holds no object.
    """
    try:
        found = json.loads(read_bytes(path))
    except (ValueError, RecursionError) as error:
        if isinstance(error, DamageError):
            raise
        raise DamageError(f"{path} is cut short or not valid JSON: {one_line(str(error))}") from None
    if not isinstance(found, dict):
        raise DamageError(f"{path} holds a JSON {type(found).__name__}, and an object is needed")
    return found


def inside(root: Path, *parts: str) -> Path:
    """A path below a folder.

    Raises: DamageError when a part is absolute, climbs with `..`, or leads out of the folder by a symbolic link.
    """
    path, home = root.joinpath(*parts), os.path.realpath(root)
    # Texts, not paths: a reader of a long run asks for each of its files.
    if "\0" in str(path) or not f"{os.path.realpath(path)}/".startswith(f"{home}/".replace("//", "/")):
        raise DamageError(f"{path} leads out of {root}")
    return path


def all_inside(root: Path, name: str) -> None:
    """Look at everything in the folder `name` below `root`, for code that opens files there without this module.

    Raises: DamageError for a symbolic link that leads out of `root`, and for what is neither a file nor a folder.
    """
    for folder, folders, files in os.walk(inside(root, name)):
        for path in (inside(root, folder, found) for found in (*folders, *files)):
            if path.exists() and not path.is_file() and not path.is_dir():
                raise DamageError(f"{path} is not a regular file")


def one_line(text: str, most: int = 500) -> str:
    """A stranger's text on one line that can be printed: terminal escapes and other control characters are shown as `?`."""
    line = "".join(sign if sign.isprintable() else "?" for sign in re.sub(r"\s+", " ", text))
    return line if len(line) <= most else f"{line[: most - 3]}..."


def cell(value: Any) -> Any:
    """A value for a csv file: text that a spreadsheet would take for a formula starts with an apostrophe."""
    if not isinstance(value, str):
        return value
    line = one_line(value, most=30_000)  # a spreadsheet's cell holds 32,767 characters
    return f"'{line}" if line.startswith(("=", "+", "-", "@")) else line


def markdown_cell(value: Any) -> Any:
    """A value for a cell of a Markdown table."""
    return one_line(value, most=5_000).replace("|", "\\|") if isinstance(value, str) else value
