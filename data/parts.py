"""The bytes of uploads under way: one blob a part, below `.parts/UPLOAD` in the blob store."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any, BinaryIO

from data.errors import InvalidInput

CHUNK_BYTES = 1 << 20
FOLDER = ".parts"
OURS = re.compile(r"upload_\w+")


class PartStore:
    """Parts by upload and id.

    Args:
        blobs: An fsspec file system.
        root: The folder of the blob store in it.
    """

    def __init__(self, blobs: Any, root: str):
        self._blobs = blobs
        self._folder = f"{root}/{FOLDER}"

    def put(self, upload_id: str, part_id: str, stream: BinaryIO, max_bytes: int) -> int:
        """Store a part and return its size.

        Raises:
            InvalidInput: It is empty, or larger than `max_bytes`; nothing is left behind.
        """
        path, size = f"{self._folder}/{upload_id}/{part_id}", 0
        self._blobs.makedirs(f"{self._folder}/{upload_id}", exist_ok=True)
        try:
            with self._blobs.open(path, "wb") as target:
                while chunk := stream.read(CHUNK_BYTES):
                    size += len(chunk)
                    if size > max_bytes:
                        raise InvalidInput(
                            f"The part is larger than {max_bytes} bytes; send smaller parts.",
                            param="data",
                            code="file_too_large",
                        )
                    target.write(chunk)
            if size == 0:
                raise InvalidInput("The part is empty.", param="data")
        except BaseException:
            if self._blobs.exists(path):
                self._blobs.rm(path)
            raise
        return size

    def read(self, upload_id: str, part_id: str) -> Iterator[bytes]:
        """Yield a part's bytes in chunks."""
        with self._blobs.open(f"{self._folder}/{upload_id}/{part_id}", "rb") as stream:
            while chunk := stream.read(CHUNK_BYTES):
                yield chunk

    def drop(self, upload_id: str) -> None:
        """Remove all parts of an upload."""
        path = f"{self._folder}/{upload_id}"
        if self._blobs.exists(path):
            self._blobs.rm(path, recursive=True)

    def uploads(self) -> list[str]:
        """Return the ids of the uploads that have parts."""
        if not self._blobs.exists(self._folder):
            return []
        names = [
            path.rstrip("/").rpartition("/")[2]
            for path in self._blobs.ls(self._folder, detail=False)
        ]
        return [name for name in names if OURS.fullmatch(name)]
