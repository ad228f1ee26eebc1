"""A network namespace for a test: addresses of its own on its `lo`, and no way out.

The calling thread itself enters, and what it starts is inside, too: child processes, the threads of an event loop that is made inside, and so every client
and every `free_ports`. Nothing has to be told where it runs. The namespace has no name: it ends with the last process in it, however the test ends.

Threads that were started before stay outside: grpcio's, if an earlier test has used grpcio in this process.
"""

import contextlib
import ctypes
import os
import shutil
import subprocess
from collections.abc import Iterator

import pytest

CLONE_NEWNET = 0x40000000  # linux/sched.h
NETWORK = "10.77.0"
ADDRESSES = tuple(f"{NETWORK}.{n}" for n in range(1, 21))  # the API server refuses loopback addresses in EndpointSlices


@contextlib.contextmanager
def network_of_its_own() -> Iterator[None]:
    """The calling thread is in a namespace with ADDRESSES until the end. Where it may not be, the test is skipped."""
    if shutil.which("ip") is None:
        pytest.skip("there is no ip here (Debian: apt-get install iproute2), which gives a network namespace its addresses")
    libc = ctypes.CDLL(None, use_errno=True)
    outside = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
    try:
        if libc.unshare(CLONE_NEWNET) != 0:
            pytest.skip(f"only root can make a network namespace here: {os.strerror(ctypes.get_errno())}")
        try:
            commands = ["link set lo up", *(f"addr add {address}/32 dev lo" for address in ADDRESSES)]
            subprocess.run(["ip", "-batch", "-"], input="\n".join(commands).encode(), check=True)
            yield
        finally:
            if libc.setns(outside, CLONE_NEWNET) != 0:
                raise OSError(ctypes.get_errno(), "the thread cannot leave its network namespace")
    finally:
        os.close(outside)
