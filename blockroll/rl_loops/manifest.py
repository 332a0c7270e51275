"""A folder's manifest: every file with its size and checksum, and the step it all belongs to.

It is written last, so a folder that has one was whole, and what changed since is found and named.
"""

import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from blockroll.errors import CheckpointError

MANIFEST_FILE = "manifest.json"
FORMAT = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class FileRecord:
    """What a file was when the manifest was written."""

    size: int  # bytes
    sha256: str


def write_manifest(folder: Path, *, step: int) -> None:
    """Record all files of `folder`, flushed to disk with them; the manifest appears whole or not at all."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    content = {
        "format": FORMAT,
        "step": step,
        "files": {
            path.relative_to(folder).as_posix(): {"size": path.stat().st_size, "sha256": sha256_of(path)}
            for path in paths
        },
    }
    unfinished = folder / f".{MANIFEST_FILE}.unfinished"
    unfinished.write_bytes(_bytes_of(content))
    for path in (*paths, unfinished):
        flush(path)
    os.replace(unfinished, folder / MANIFEST_FILE)
    for path in (*(each for each in folder.rglob("*") if each.is_dir()), folder):
        flush(path)


def check_manifest(folder: Path, *, step: int) -> None:
    """CheckpointError, naming the file, unless `folder` holds just what its manifest of this step says.

    Hidden files are no part of it.
    """
    files = _read(folder, step)
    present = {
        path.relative_to(folder).as_posix()
        for path in folder.rglob("*")
        if path.is_file() and not path.name.startswith(".")
    }
    for name, record in files.items():
        path = folder / name
        if name not in present:
            raise CheckpointError(f"{path} is missing")
        size = path.stat().st_size
        if size != record.size:
            raise CheckpointError(
                f"{path} is damaged: it has {size} bytes, and was written with {record.size}"
            )
        if sha256_of(path) != record.sha256:
            raise CheckpointError(f"{path} is damaged: its checksum is not the one it was written with")
    strangers = sorted(present - set(files) - {MANIFEST_FILE})
    if strangers:
        raise CheckpointError(
            f"{folder / strangers[0]} is no part of this checkpoint and might be loaded with it: move it away"
        )


def sha256_of(path: Path) -> str:
    """Hexadecimal digest of a file, read piece by piece."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def flush(path: Path) -> None:
    """Force a file, or a folder's list of names, to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _read(folder: Path, step: int) -> dict[str, FileRecord]:
    path = folder / MANIFEST_FILE
    if not path.is_file():
        raise CheckpointError(
            f"{path} is missing, without which nothing in the folder can be checked (it was lost, or an "
            "earlier version of blockroll wrote the checkpoint; a new run may start from its weights with "
            f"policy.path={folder})"
        )
    try:
        data = path.read_bytes()
        content: Any = json.loads(data)
        content.pop("sha256")
        is_sound = data == _bytes_of(content) and "format" in content
    except (ValueError, AttributeError, KeyError, TypeError):
        is_sound = False
    if not is_sound:
        raise CheckpointError(f"{path} is damaged: it is not what was written")
    if content["format"] != FORMAT:
        raise CheckpointError(
            f"{path} has format {content['format']}, and this version of blockroll reads {FORMAT}: resume "
            "with the version that wrote it"
        )
    try:
        files = {name: FileRecord(**record) for name, record in content["files"].items()}
        its_step = content["step"]
    except (AttributeError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path} is damaged: it is no list of files and their checksums") from error
    if its_step != step:
        raise CheckpointError(
            f"{path} is of step {its_step}, and its folder's name says {step}: give the folder its "
            "own name back"
        )
    return files


def _bytes_of(content: dict[str, Any]) -> bytes:
    """The file, its own checksum in it."""
    digest = hashlib.sha256(json.dumps(content).encode()).hexdigest()
    return (json.dumps({**content, "sha256": digest}, indent=1) + "\n").encode()
