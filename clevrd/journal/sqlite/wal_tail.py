"""Whether a WAL holds commits behind the place where SQLite stops to read it.

SQLite reads a WAL up to the first frame whose checksum does not fit, and takes the rest for the
remains of a commit that never ended. If a bit flipped, the rest may be commits that were
acknowledged. Layout: sqlite.org/fileformat2.html#walformat.
"""

from __future__ import annotations

import os
import struct
from typing import Final

_HEADER: Final = struct.Struct(">8I")
# Page number; pages in the database for a commit, 0 otherwise; both salts; two checksums.
_FRAME: Final = struct.Struct(">6I")
_MAGICS: Final = (0x377F0682, 0x377F0683)


def has_lost_commits(wal_path: str, valid_frames: int) -> bool:
    """Return whether commits may stand behind the first ``valid_frames`` frames.

    A commit that was cut short by a power failure may look like this too.
    """
    try:
        with open(wal_path, "rb") as file:
            size_bytes = os.fstat(file.fileno()).st_size
            head = file.read(_HEADER.size)
            if size_bytes < _HEADER.size + _FRAME.size or len(head) < _HEADER.size:
                return False
            magic, _, page_bytes, _, *salts, _, _ = _HEADER.unpack(head)
            if magic not in _MAGICS or not _is_sound(head):
                return True
            frame_bytes = _FRAME.size + page_bytes
            frames = (size_bytes - _HEADER.size) // frame_bytes
            for number in range(valid_frames, frames):
                file.seek(_HEADER.size + number * frame_bytes)
                _, pages, *frame_salts, _, _ = _FRAME.unpack(file.read(_FRAME.size))
                if frame_salts == salts and pages:
                    return True
            return False
    except FileNotFoundError:
        return False


def _is_sound(head: bytes) -> bool:
    """Return whether the WAL's header has the checksum that it should have."""
    magic = int.from_bytes(head[:4], "big")
    words = struct.unpack(">6I" if magic & 1 else "<6I", head[:24])
    first = second = 0
    for index in range(0, len(words), 2):
        first = (first + words[index] + second) & 0xFFFFFFFF
        second = (second + words[index + 1] + first) & 0xFFFFFFFF
    return (first, second) == struct.unpack(">2I", head[24:])
