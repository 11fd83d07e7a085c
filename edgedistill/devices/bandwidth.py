"""How fast this machine's memory can be read: the ceiling of decoding, which reads every weight for every token."""

from __future__ import annotations

import ctypes
import functools
import threading
import time

from edgedistill.devices.host import fingerprint

_BYTES = 256 << 20  # per thread; several times the last-level cache of the machines that targets describe
_MOST = 1 << 30  # of all threads together, and an eighth of the memory at most: a server's cache is smaller, too


@functools.cache
def bandwidth(threads: int, reps: int = 8) -> float:
    """Return the bytes/s that ``threads`` threads read together, best of ``reps`` (0.5 s; needs 256 MiB a thread, 1 GiB at most).

    The C library's memchr looks for a byte that is not there: vector loads and nothing else, no copy, and ctypes lets
    the threads run at once. The best counts, because everything that disturbs a read makes it slower.
    """
    libc = ctypes.CDLL(None)
    libc.memchr.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t]
    libc.memchr.restype = ctypes.c_void_p
    share = fingerprint().memory_bytes // 8 or _MOST  # 0: not known
    size = min(_BYTES, min(_MOST, share) // threads)
    buffers = [ctypes.create_string_buffer(size) for _ in range(threads)]
    addresses = [ctypes.addressof(buffer) for buffer in buffers]
    for address in addresses:
        ctypes.memset(address, 1, size)  # untouched pages would all be the one zero page, read from the cache
    best = float("inf")
    for _ in range(reps):
        gate = threading.Barrier(threads)
        spans: list[tuple[float, float]] = []

        def read(address: int, gate: threading.Barrier = gate, spans: list[tuple[float, float]] = spans) -> None:
            gate.wait()
            start = time.perf_counter()
            libc.memchr(address, 2, size)
            spans.append((start, time.perf_counter()))

        readers = [threading.Thread(target=read, args=(address,)) for address in addresses]
        for reader in readers:
            reader.start()
        for reader in readers:
            reader.join()
        best = min(best, max(end for _, end in spans) - min(start for start, _ in spans))
    return threads * size / best
