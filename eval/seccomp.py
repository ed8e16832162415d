"""The system calls that a box of the sandbox is denied: a seccomp filter in classic BPF.

The filter looks at (number, architecture, arguments) of a system call. What it denies with EPERM is what namespaces do
not cover; see `_DENIED`.
"""

import functools
import struct

# Denied with EPERM: tracing other processes; memory that belongs to no process (System V, memfd, …); mounts and
# namespaces; keys, bpf, io_uring and other kernel interfaces that no tested program needs.
_DENIED = {
    "x86_64": (
        29, 30, 31, 64, 68, 101, 135, 154, 155, 161, 163, 165, 166, 167, 172, 173, 175, 179, 212, 240, 246, 248, 249,
        250, 272, 298, 300, 303, 304, 308, 310, 311, 312, 313, 319, 320, 321, 323, 425, 426, 427, 428, 429, 430, 431,
        432, 433, 438, 440, 442, 447,
    ),
    "aarch64": (
        39, 40, 41, 51, 60, 89, 92, 97, 104, 105, 117, 180, 186, 190, 194, 195, 196, 217, 218, 219, 224, 241, 262, 264,
        265, 268, 270, 271, 272, 273, 279, 280, 282, 294, 425, 426, 427, 428, 429, 430, 431, 432, 433, 438, 440, 442,
        447,
    ),
}  # fmt: skip
# machine → (audit architecture, number of clone)
MACHINES = {"x86_64": (0xC000003E, 56), "aarch64": (0xC00000B7, 220)}
_CLONE3 = 435
_NEW_NAMESPACES = 0x7E020080  # CLONE_NEW{USER,PID,NET,IPC,UTS,CGROUP,NS,TIME}
_ALLOW, _ERRNO, _KILL = 0x7FFF0000, 0x00050000, 0x80000000


@functools.cache
def seccomp_filter(machine: str) -> bytes:
    """Return the filter as struct sock_filter[]."""
    architecture, clone = MACHINES[machine]
    load, equal, at_least, any_bit, give = 0x20, 0x15, 0x35, 0x45, 0x06
    lines = [
        (load, 0, 0, 4),
        (equal, 1, 0, architecture),
        (give, 0, 0, _KILL),
        (load, 0, 0, 0),
        (at_least, 0, 1, 0x40000000),  # the x32 numbers
        (give, 0, 0, _ERRNO | 1),
        (equal, 0, 1, _CLONE3),  # its flags lie in memory, where no filter sees them: ENOSYS, and libc takes clone
        (give, 0, 0, _ERRNO | 38),
        (equal, 0, 4, clone),
        (load, 0, 0, 16),
        (any_bit, 0, 1, _NEW_NAMESPACES),
        (give, 0, 0, _ERRNO | 1),
        (give, 0, 0, _ALLOW),
    ]
    for number in _DENIED[machine]:
        lines += [(equal, 0, 1, number), (give, 0, 0, _ERRNO | 1)]
    lines.append((give, 0, 0, _ALLOW))
    return b"".join(struct.pack("=HBBI", *line) for line in lines)
