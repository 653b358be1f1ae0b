"""Files that appear whole or not at all, and text files whose errors name them."""

import gzip
import json
import math
import os
import tempfile
import zlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO


@contextmanager
def replacing(path: str | os.PathLike) -> Iterator[Path]:
    """A temporary name in `path`'s folder to write to; it takes path's place where the block ends without an error.

    The folder is created; after an error the temporary file is gone and what stood at `path` still stands. Of a link it is what
    the link leads to; a device or a pipe is written to itself.
    """
    if os.path.exists(path) and not os.path.isfile(path):
        yield Path(path)
        return
    path = Path(os.path.realpath(path))
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.stem}.", suffix=path.suffix)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        let_others_read(temporary)  # mkstemp gives a file to its owner alone
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def replacing_files(directory: str | os.PathLike, *names: str) -> Iterator[Path]:
    """A temporary folder to write files of these names to, which belong together in `directory`; it is created.

    Where the block ends without an error they take their places in the order of `names`, each whole and none before all are
    written. What stands under a name that was not written is removed.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=directory, prefix=".saving-") as temporary:
        yield Path(temporary)
        for name in names:
            written = Path(temporary) / name
            if written.exists():
                let_others_read(written)  # safetensors gives a file to its owner alone
                os.replace(written, directory / name)
            else:
                (directory / name).unlink(missing_ok=True)


def check_writable(directory: str | os.PathLike) -> None:
    """OSError for a folder that takes no file, before there is work to lose; it is created where it is missing."""
    Path(directory).mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=directory):
        pass


@contextmanager
def open_text(path: str | os.PathLike) -> Iterator[TextIO]:
    """A UTF-8 text file to read, unzipped where its name ends in .gz, with its line ends as they are.

    ValueError naming the file where its bytes are no such text, also from reading inside the block.
    """
    opener = gzip.open if str(path).lower().endswith(".gz") else open
    try:
        with opener(path, "rt", encoding="utf-8-sig", newline="") as file:
            yield file
    except (UnicodeDecodeError, gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise ValueError(f"{path}: not a UTF-8 text file: {error}") from None


def json_lines(lines: Iterable[str], source: str | os.PathLike) -> Iterator[tuple[int, Any]]:
    """The number and the value of each line of JSON, blank ones left out; ValueError naming the source and the line."""
    for number, text in enumerate(lines, 1):
        if not text.strip():
            continue
        try:
            value = json.loads(text)
        except json.JSONDecodeError as error:
            at = f"at character {error.pos + 1}"
            raise ValueError(f"{source}, line {number}: expected one JSON object a line, got none: {error.msg}, {at}") from None
        except (RecursionError, ValueError) as error:  # nested too deep; an int of too many digits
            raise ValueError(f"{source}, line {number}: {error}") from None
        yield number, value


def write_json(path: str | os.PathLike, value: Any) -> None:
    """Writes `value` as indented JSON, with null for numbers that JSON has no words for (infinities and NaN)."""
    _write_text(path, json.dumps(_json(value), indent=2, ensure_ascii=False) + "\n")


def write_json_lines(path: str | os.PathLike, rows: list[Any]) -> None:
    """Writes one line of JSON for each row."""
    _write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def _write_text(path: str | os.PathLike, text: str) -> None:
    """As UTF-8, zipped where the name ends in .gz."""
    opener = gzip.open if str(path).lower().endswith(".gz") else open
    with replacing(path) as temporary, opener(temporary, "wt", encoding="utf-8", errors="backslashreplace") as file:
        file.write(text)


def _json(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _json(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [_json(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def let_others_read(path: Path) -> None:
    """The mode of a file that is simply made: all that the umask leaves."""
    mask = os.umask(0)
    os.umask(mask)
    path.chmod(0o666 & ~mask)
