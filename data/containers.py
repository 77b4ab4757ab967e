"""Files that are no text at all, told by their first bytes before anybody reads lines."""

from __future__ import annotations

from pathlib import Path

from data.errors import InvalidInput

TAR = 257  # where a tar archive says that it is one
CONTAINERS: tuple[tuple[int, bytes, str], ...] = (
    (0, b"PK\x03\x04", "a zip archive (an .xlsx file is one)"),
    (0, b"\x1f\x8b", "a gzip file"),
    (0, b"BZh", "a bzip2 file"),
    (0, b"\xfd7zXZ\x00", "an xz file"),
    (0, b"\x28\xb5\x2f\xfd", "a zstd file"),
    (0, b"7z\xbc\xaf\x27\x1c", "a 7z archive"),
    (TAR, b"ustar", "a tar archive"),
    (0, b"PAR1", "a Parquet file"),
    (0, b"ARROW1", "an Arrow file"),
    (0, b"SQLite format 3\x00", "an SQLite database"),
    (0, b"%PDF-", "a PDF file"),
    (0, b"\xd0\xcf\x11\xe0", "an old Office file"),
    (0, b"\x89PNG", "a PNG picture"),
    (0, b"\xff\xd8\xff", "a JPEG picture"),
)


def check_is_text(path: Path, filename: str) -> None:
    """Refuse a file that begins as archives, tables and pictures do.

    Raises:
        InvalidInput: It is one (`unsupported_file`); the message says which, and what to do.
    """
    with path.open("rb") as stream:
        start = stream.read(TAR + 8)
    for offset, mark, kind in CONTAINERS:
        if start[offset : offset + len(mark)] == mark:
            raise InvalidInput(
                f"Unsupported file: '{filename}' is {kind}. Send JSON lines as UTF-8 text, one "
                f"object a line; `hone files prepare` makes them of tables.",
                param="file",
                code="unsupported_file",
            )
