"""The bytes of files: where they are kept, by any file system that fsspec knows.

An upload streams to a staging file, is hashed and synced there, then moved to its place. Bytes
never change afterwards.
"""

from __future__ import annotations

import hashlib
import os
import re
import tempfile
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import fsspec

from data.durable import sync
from data.errors import InvalidInput
from data.parts import PartStore

CHUNK_BYTES = 1 << 20
OURS = re.compile(r"proj_\w+/file-\w+|\.staging/upload-\w+")  # what may be removed as an orphan


@dataclass(frozen=True)
class Staged:
    """Bytes that have arrived and are nowhere yet.

    Attributes:
        sha256: Of them, in hexadecimal digits.
    """

    path: Path
    bytes: int
    sha256: str


class BlobStore:
    """Blobs by name, below one folder.

    Args:
        url: fsspec URL of the folder.

    Raises:
        InvalidInput: The URL is empty, its protocol unknown, or its driver not installed.
    """

    def __init__(self, url: str):
        try:
            if not url:
                raise ValueError("it is empty")
            self._filesystem, self._root = fsspec.core.url_to_fs(url)
        except (ValueError, ImportError) as error:
            raise InvalidInput(
                f'blob_url "{url}" cannot be used ({error}); give a folder as file:///PATH, '
                "or for S3 install hone-toolkit[s3]",
                param="blob_url",
            ) from error
        self._is_local = "file" in _protocols(self._filesystem)
        self.parts = PartStore(self._filesystem, self._root)

    @contextmanager
    def stage(self, stream: BinaryIO | Iterable[bytes], max_bytes: int) -> Iterator[Staged]:
        """Receive bytes; what `publish` has not moved when the block ends is removed.

        Raises:
            InvalidInput: `file_too_large`, at the first byte over `max_bytes`.
        """
        folder = Path(self._root) / ".staging" if self._is_local else Path(tempfile.gettempdir())
        folder.mkdir(parents=True, exist_ok=True)
        digest, size = hashlib.sha256(), 0
        with tempfile.NamedTemporaryFile(dir=folder, prefix="upload-", delete=False) as target:
            path = Path(target.name)
            try:
                for chunk in _chunks(stream):
                    size += len(chunk)
                    if size > max_bytes:
                        raise InvalidInput(
                            f"The file is larger than {max_bytes} bytes, the most that one "
                            "upload may hold; split it",
                            param="file",
                            code="file_too_large",
                        )
                    digest.update(chunk)
                    target.write(chunk)
                target.flush()
                os.fsync(target.fileno())
                yield Staged(path, size, digest.hexdigest())
            finally:
                path.unlink(missing_ok=True)

    def publish(self, staged: Staged, blob: str) -> None:
        """Move bytes to their place, so that they survive a power cut."""
        target = self._path(blob)
        self._filesystem.makedirs(target.rpartition("/")[0], exist_ok=True)
        if self._is_local:
            os.rename(staged.path, target)
            sync(Path(target).parent)
            sync(Path(self._root))
        else:
            self._filesystem.put_file(str(staged.path), target)

    def open(self, blob: str) -> BinaryIO:
        """Open a blob for reading.

        Raises:
            FileNotFoundError: There is none.
        """
        stream: BinaryIO = self._filesystem.open(self._path(blob), "rb")
        return stream

    @contextmanager
    def local_path(self, blob: str, name: str) -> Iterator[Path]:
        """Yield a path with a blob's bytes; a remote one is copied for the time of the block."""
        if self._is_local:
            yield Path(self._path(blob))
            return
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / name
            self._filesystem.get_file(self._path(blob), str(path))
            yield path

    def copy_to(self, blob: str, target: Path) -> None:
        """Give a blob's bytes another name, or a copy where that is impossible."""
        if self._is_local:
            try:
                os.link(self._path(blob), target)  # bytes never change: both names may share them
                return
            except OSError:
                pass  # another disk
        self._filesystem.get_file(self._path(blob), str(target))

    def remove(self, blob: str) -> None:
        """Remove a blob."""
        self._filesystem.rm(self._path(blob))

    def orphans(self, known: set[str], min_age_s: float) -> Iterator[str]:
        """Yield the blobs and staging files of at least this age that are not `known`."""
        there = self._filesystem.exists(self._root)
        for path in self._filesystem.find(self._root) if there else ():
            blob = path[len(self._root) :].lstrip("/")
            if OURS.fullmatch(blob) and blob not in known and self._age_s(path) >= min_age_s:
                yield blob

    def _path(self, blob: str) -> str:
        return f"{self._root}/{blob}"

    def _age_s(self, path: str) -> float:
        return time.time() - float(self._filesystem.modified(path).timestamp())


def _protocols(filesystem: Any) -> tuple[str, ...]:
    protocol = filesystem.protocol
    return (protocol,) if isinstance(protocol, str) else tuple(protocol)


def _chunks(stream: BinaryIO | Iterable[bytes]) -> Iterator[bytes]:
    if hasattr(stream, "read"):
        while chunk := stream.read(CHUNK_BYTES):
            yield chunk
    else:
        yield from stream
