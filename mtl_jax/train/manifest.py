"""Manifest: what a folder of files held when it was written, so that damage is noticed before anything is read."""

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from mtl_jax.errors import DamagedCheckpoint

NAME = "manifest.json"


def write_manifest(folder: Path, facts: dict[str, Any]) -> None:
    """Records size and sha256 of every file in ``folder``, together with ``facts`` (JSON types); call it last."""
    files = {str(path.relative_to(folder)): _fingerprint(path) for path in _files(folder)}
    content = {"facts": facts, "files": files}
    write_json(folder / NAME, {"sha256": _sha256_of(content), "content": content})


def read_manifest(folder: Path) -> dict[str, Any]:
    """The facts of a folder whose files are all as they were written.

    Every byte is read again: the array storage notices a file that is cut short, but not every flipped bit.

    Raises:
      DamagedCheckpoint: Names the folder and the first file that is missing or different.
    """
    content = _content(folder)
    for name, expected in content["files"].items():
        try:
            found = _fingerprint(folder / name)
        except OSError as error:
            raise damaged(folder, f"'{name}' cannot be read ({error.strerror})") from None
        if found["bytes"] != expected["bytes"]:
            raise damaged(folder, f"'{name}' has {found['bytes']} bytes instead of {expected['bytes']}")
        if found != expected:
            raise damaged(folder, f"'{name}' has other content than was written (sha256)")
    return content["facts"]


def read_facts(folder: Path) -> dict[str, Any]:
    """The facts alone; only the manifest itself is checked.

    Raises:
      DamagedCheckpoint: The manifest is missing or different.
    """
    return _content(folder)["facts"]


def write_json(path: Path, content: Any) -> None:
    """Writes JSON and waits until it is on the disk."""
    with path.open("w", encoding="utf-8") as file:
        json.dump(content, file)
        file.flush()
        os.fsync(file.fileno())


def damaged(folder: Path, fault: str) -> DamagedCheckpoint:
    """The error for one fault of a checkpoint folder."""
    return DamagedCheckpoint(
        f"checkpoint '{folder}' is damaged: {fault}; expected the files as they were written. "
        f"Restore them from a copy, or remove '{folder.parent}' so that the same command trains from the beginning"
    )


def _content(folder: Path) -> dict[str, Any]:
    try:
        manifest = json.loads((folder / NAME).read_bytes())
        content = manifest["content"]
        whole = manifest["sha256"] == _sha256_of(content)
    except OSError as error:
        raise damaged(folder, f"'{NAME}' cannot be read ({error.strerror})") from None
    except (ValueError, KeyError, TypeError):
        whole = False
    if not whole:
        raise damaged(folder, f"'{NAME}' has other content than was written")
    return content


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def _fingerprint(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        return {"bytes": file.tell(), "sha256": digest}


def _sha256_of(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
