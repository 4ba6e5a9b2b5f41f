"""Files in memory, and what of them is there."""

from __future__ import annotations

import ctypes
import mmap
import os
import threading
from collections.abc import Callable

import numpy as np

_libc = ctypes.CDLL(None, use_errno=True)
_mmap, _munmap, _mincore = _libc.mmap, _libc.munmap, _libc.mincore
_mmap.argtypes = [
    ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long,
]  # fmt: skip
_mmap.restype = ctypes.c_void_p
_munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
_mincore.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p]
_FAILED = ctypes.c_void_p(-1).value
_PAGE = mmap.PAGESIZE
# Of more pages the first is asked for alone: what is not there begins as a rule with that one, and
# to look for thousands takes longer.
_MANY = 512


class _Answers(threading.local):
    """Where the system says of each page whether it is in memory."""

    def __init__(self) -> None:
        self.hold(1024)

    def hold(self, pages: int) -> None:
        self.pages = bytearray(pages)
        self.address = ctypes.addressof((ctypes.c_char * pages).from_buffer(self.pages))


_answers = _Answers()


class _Memory:
    """Mapped memory, unmapped when the last array in it is gone."""

    def __init__(self, address: int, nbytes: int) -> None:
        self._at = address, nbytes
        self.__array_interface__ = {
            "version": 3, "shape": (nbytes,), "typestr": "|u1", "data": (address, True),
        }  # fmt: skip

    def __del__(self, unmap: Callable[[int, int], object] = _munmap) -> None:  # also at exit
        unmap(*self._at)


class Map:
    """The beginning of a file in memory, as long as anybody has a view of it; no descriptor.

    Args:
        fd: of the file, open for reading.
        nbytes: how much; may be more than there is yet. What is not there must not be touched.

    Attributes:
        data: uint8 `[nbytes]`, read-only.

    Raises:
        OSError: the system does not.
    """

    def __init__(self, fd: int, nbytes: int) -> None:
        self.nbytes = -(-nbytes // _PAGE) * _PAGE
        self.address = _mmap(None, self.nbytes, mmap.PROT_READ, mmap.MAP_SHARED, fd, 0)
        if self.address == _FAILED:
            error = ctypes.get_errno()
            raise OSError(error, os.strerror(error))
        self.data = np.asarray(_Memory(self.address, self.nbytes))

    def resident(self, at: int, nbytes: int) -> bool:
        """Whether all of `[at, at + nbytes)` is in memory, and there."""
        first = (self.address + at) // _PAGE * _PAGE
        nbytes += self.address + at - first
        pages = -(-nbytes // _PAGE)
        if pages > _MANY and not self.resident(at, 1):
            return False
        if pages > len(_answers.pages):
            _answers.hold(2 * pages)
        # The lowest bit is what counts; no other is in use.
        return (
            _mincore(first, nbytes, _answers.address) == 0 and _answers.pages.find(0, 0, pages) < 0
        )
