"""The Xet store of a loopback Hub: a folder that the stock client fills and reads by itself.

The client asks the Hub only for the address of the store, here `local://FOLDER`, and leaves the files in it, cut into
chunks. A commit then names a file by its SHA-256, as with LFS: what Xet calls it stands in the store's index shards.
"""

from __future__ import annotations

import hashlib
import shutil
import struct
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from hub.messages import HubError, Response, json_response
from hub.storage import Blob

_RECORD = 48  # bytes; everything in a shard's list of files has this size
_HAS_VERIFICATION, _HAS_SHA256 = 1 << 31, 1 << 30


class XetStore:
    """Keeps files in `folder`, which one client process at a time can have open."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder.resolve()
        self._folder.mkdir(parents=True, exist_ok=True)

    def token(self) -> Response:
        """Tell a client where the store is, in the headers for one half of it and in the body for the other."""
        address, token, expiry = f"local://{self._folder}", "loopback", int(time.time()) + 3600
        headers = {"X-Xet-Cas-Url": address, "X-Xet-Access-Token": token, "X-Xet-Token-Expiration": str(expiry)}
        return json_response({"casUrl": address, "accessToken": token, "exp": expiry}, headers=headers)

    def read(self, sha256: str, size: int) -> Blob | None:
        """Put the file with this digest together; None if the store has none.

        Raises:
            HubError: 400, if what is stored does not have the digest or the size.
        """
        import hf_xet  # type: ignore[import-untyped, unused-ignore]

        # The client that has just stored the file holds a lock on the store while it lives: read a copy.
        with tempfile.TemporaryDirectory() as scratch:
            copy, out = Path(scratch, "store"), Path(scratch, "out")
            shutil.copytree(self._folder, copy)
            names = {sha: name for shard in copy.glob("xet/xorbs/shards/*.mdb") for sha, name in _names(shard)}
            if sha256 not in names:
                return None
            with hf_xet.XetSession().new_file_download_group(endpoint=f"local://{copy}") as group:
                group.start_download_file(hf_xet.XetFileInfo(names[sha256], size), str(out))
            content = out.read_bytes()
        if len(content) != size or hashlib.sha256(content).hexdigest() != sha256:
            raise HubError(400, f"The file in the Xet store is not {size} bytes with sha256 {sha256}")
        return Blob(content, lfs=True, xet_hash=names[sha256])


def _names(shard: Path) -> Iterator[tuple[str, str]]:
    """The SHA-256 and the Xet hash of every file in an index shard.

    A file is a header (hash, flags, count), `count` segments, as many verifications if flagged, and its SHA-256 if
    flagged; a header of ones ends the list.
    """
    records = struct.iter_unpack(f"{_RECORD}s", _list_of_files(shard.read_bytes()))
    for (header,) in records:
        name, flags, count = header[:32], *struct.unpack_from("<2I", header, 32)
        if name == b"\xff" * 32:
            return
        for _ in range(count * (2 if flags & _HAS_VERIFICATION else 1)):
            next(records)
        if flags & _HAS_SHA256:
            yield _hexadecimal(next(records)[0][:32]), _hexadecimal(name)


def _list_of_files(shard: bytes) -> bytes:
    """All after the shard's own header, cut to whole records."""
    return shard[_RECORD : len(shard) // _RECORD * _RECORD]


def _hexadecimal(digest: bytes) -> str:
    """Xet keeps digests as four little-endian words."""
    return "".join(f"{word:016x}" for word in struct.unpack("<4Q", digest))
