"""Text on disk as a stream of documents."""

import os
import random
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

CHUNK = 1 << 20
# of the standard library: other people's packages, and folders of tests that would outweigh the rest
SKIPPED_FOLDERS = {"site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test"}


@dataclass
class Corpus:
    """Text files in a fixed, shuffled order.

    paths: (n,) files; size: their bytes together.
    """

    paths: list[Path]
    size: int

    def documents(self) -> Iterator[tuple[str, bool]]:
        """Yields (text, ends): pieces of about a megabyte, cut after a line; `ends` marks a file's last piece."""
        for path in self.paths:
            with path.open(encoding="utf-8", errors="replace") as file:
                piece = "".join(file.readlines(CHUNK))
                while piece:
                    following = "".join(file.readlines(CHUNK))
                    yield piece, not following
                    piece = following


def find_corpus(paths: list[str], *, seed: int = 0, max_bytes: int | None = None) -> Corpus:
    """The text files that `paths` (files, or folders with all they hold) name; default: the standard library's source.

    Binary and hidden files in folders are passed over. `max_bytes` keeps the first files, in shuffled order,
    that fit into it.
    """
    files = [file for path in paths for file in text_files(Path(path))] if paths else standard_library()
    # a file named twice counts once; the order must not depend on the file system
    files = sorted(set(files))
    random.Random(seed).shuffle(files)
    kept, size = [], 0
    for file in files:
        n = file.stat().st_size
        if n and (max_bytes is None or size + n <= max_bytes):
            kept.append(file)
            size += n
    if not kept:
        limit = f" within {max_bytes} bytes" if max_bytes is not None else ""
        raise ValueError(f"corpus must hold text, found none{limit} in {', '.join(paths) or 'the standard library'}")
    return Corpus(kept, size)


def text_files(path: Path) -> list[Path]:
    """The file itself, or the text files of a folder and of all folders in it."""
    if path.is_file():
        if not is_text(path):
            raise ValueError(f"corpus must be UTF-8 text, {str(path)!r} is not")
        return [path]
    if not path.is_dir():
        raise FileNotFoundError(f"corpus must be a file or a folder, {str(path)!r} does not exist")
    found = []
    for folder, subfolders, names in os.walk(path):
        subfolders[:] = [name for name in subfolders if not name.startswith(".")]
        files = [Path(folder, name) for name in names if not name.startswith(".")]
        found += [file for file in files if file.is_file() and is_text(file)]
    return found


def is_text(file: Path) -> bool:
    """Whether a file starts like UTF-8 text."""
    with file.open("rb") as stream:
        start = stream.read(4096)
    # the end of the sample may cut a character: up to 3 bytes of it
    return b"\0" not in start and any(decodes(start[: len(start) - cut]) for cut in range(4))


def decodes(data: bytes) -> bool:
    try:
        data.decode("utf-8")
    except UnicodeDecodeError:
        return False
    return True


def standard_library() -> list[Path]:
    """The Python source of the standard library, without installed packages and tests."""
    found = []
    for folder, subfolders, names in os.walk(sysconfig.get_path("stdlib")):
        subfolders[:] = [name for name in subfolders if name not in SKIPPED_FOLDERS]
        found += [Path(folder, name) for name in names if name.endswith(".py")]
    return [file for file in found if is_text(file)]
