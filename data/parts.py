"""The bytes of uploads under way: one blob a part, below `.parts/UPLOAD` in the blob store."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from contextlib import suppress
from typing import Any, BinaryIO

from data.errors import InvalidInput

CHUNK_BYTES = 1 << 20
FOLDER = ".parts"
OURS = re.compile(r"upload_\w+")

log = logging.getLogger("hone.uploads")


class PartStore:
    """Parts by upload and id.

    Args:
        blobs: An fsspec file system.
        root: The folder of the blob store in it.
    """

    def __init__(self, blobs: Any, root: str):
        self._blobs = blobs
        self._folder = f"{root}/{FOLDER}"

    def put(self, upload_id: str, part_id: str, stream: BinaryIO, max_bytes: int, room: int) -> int:
        """Store a part and return its size.

        Args:
            max_bytes: The largest part there may be.
            room: What its upload has left of the bytes that were announced.

        Raises:
            InvalidInput: It is empty or too large; nothing is left behind.
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
                    check_room(size, room)
                    target.write(chunk)
            if size == 0:
                raise InvalidInput("The part is empty.", param="data")
        except BaseException:
            self.remove(upload_id, part_id)
            raise
        return size

    def remove(self, upload_id: str, part_id: str) -> None:
        """Remove one part, if it is there."""
        with suppress(FileNotFoundError):
            self._blobs.rm(f"{self._folder}/{upload_id}/{part_id}")

    def read(self, upload_id: str, part_id: str) -> Iterator[bytes]:
        """Yield a part's bytes in chunks."""
        with self._blobs.open(f"{self._folder}/{upload_id}/{part_id}", "rb") as stream:
            while chunk := stream.read(CHUNK_BYTES):
                yield chunk

    def drop(self, upload_id: str) -> None:
        """Remove all parts of an ended upload; what cannot be removed now is left to a sweep."""
        path = f"{self._folder}/{upload_id}"
        if self._blobs.exists(path):
            try:
                self._blobs.rm(path, recursive=True)
            except OSError as error:  # somebody else removes them too, or adds one
                log.info("the parts of %s are left to the next sweep: %s", upload_id, error)

    def uploads(self) -> list[str]:
        """Return the ids of the uploads that have parts."""
        if not self._blobs.exists(self._folder):
            return []
        names = [
            path.rstrip("/").rpartition("/")[2]
            for path in self._blobs.ls(self._folder, detail=False)
        ]
        return [name for name in names if OURS.fullmatch(name)]


def check_room(size: int, room: int) -> None:
    """Raise InvalidInput where a part is larger than what is left of its upload."""
    if size > room:
        raise InvalidInput(
            f"The part is larger than the {room} bytes that are left of those announced for the "
            "upload. Cancel it, and begin one of the right size.",
            param="data",
        )
