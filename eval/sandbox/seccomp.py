"""The system calls that a box of the sandbox is denied: a seccomp filter in classic BPF.

The filter looks at (number, architecture, arguments) of a system call. What it denies is what namespaces do not cover:
whole system calls (`_DENIED`), and some arguments of others (`Machine`):

- new namespaces by clone;
- mappings that are shared, or of huge pages: their memory is in no process's resident memory once it is let go there;
- sockets other than Unix, TCP and UDP ones (AF_VSOCK reaches the host; rare protocols are the kernel's weakest code).
"""

import errno
import functools
import mmap
import socket
import struct
from dataclasses import dataclass

# Denied with EPERM: tracing other processes; memory that belongs to no process (System V, memfd, pages given to a pipe
# by vmsplice, …); mounts and namespaces; keys, bpf, io_uring, aio and other kernel interfaces that no tested program
# needs.
_DENIED = {
    "x86_64": (
        29, 30, 31, 64, 68, 101, 135, 154, 155, 161, 163, 165, 166, 167, 172, 173, 175, 179, 206, 212, 240, 246, 248,
        249, 250, 272, 278, 298, 300, 303, 304, 308, 310, 311, 312, 313, 319, 320, 321, 323, 425, 426, 427, 428, 429,
        430, 431, 432, 433, 438, 440, 442, 447,
    ),
    "aarch64": (
        0, 39, 40, 41, 51, 60, 75, 89, 92, 97, 104, 105, 117, 180, 186, 190, 194, 195, 196, 217, 218, 219, 224, 241,
        262, 264, 265, 268, 270, 271, 272, 273, 279, 280, 282, 294, 425, 426, 427, 428, 429, 430, 431, 432, 433, 438,
        440, 442, 447,
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Machine:
    """Its audit architecture, and the numbers of the system calls whose arguments the filter looks at."""

    architecture: int
    clone: int
    mmap: int
    sockets: tuple[int, int]  # socket, socketpair


MACHINES = {
    "x86_64": Machine(0xC000003E, clone=56, mmap=9, sockets=(41, 53)),
    "aarch64": Machine(0xC00000B7, clone=220, mmap=222, sockets=(198, 199)),
}
_CLONE3 = 435
_NEW_NAMESPACES = 0x7E020080  # CLONE_NEW{USER,PID,NET,IPC,UTS,CGROUP,NS,TIME}
_MAP_HUGETLB = 0x40000
_FAMILIES = (socket.AF_UNIX, socket.AF_INET, socket.AF_INET6)
_PROTOCOLS = (0, socket.IPPROTO_TCP, socket.IPPROTO_UDP)
_ALLOW, _ERRNO, _KILL = 0x7FFF0000, 0x00050000, 0x80000000
_LOAD, _EQUAL, _AT_LEAST, _ANY_BIT, _GIVE = 0x20, 0x15, 0x35, 0x45, 0x06
_REFUSE = (_GIVE, 0, 0, _ERRNO | errno.EPERM)
_Line = tuple[int, int, int, int]  # code, jump where true, jump where false, operand


@functools.cache
def seccomp_filter(name: str) -> bytes:
    """Return the filter for the machine of this name as struct sock_filter[]."""
    machine = MACHINES[name]
    lines: list[_Line] = [
        (_LOAD, 0, 0, 4),
        (_EQUAL, 1, 0, machine.architecture),
        (_GIVE, 0, 0, _KILL),
        (_LOAD, 0, 0, 0),
        (_AT_LEAST, 0, 1, 0x40000000),  # the x32 numbers
        _REFUSE,
        # clone3's flags lie in memory, where no filter sees them: ENOSYS, and libc takes clone
        *_for_call(_CLONE3, [(_GIVE, 0, 0, _ERRNO | errno.ENOSYS)]),
        *_for_call(machine.clone, _without_bits(0, _NEW_NAMESPACES)),
        *_for_call(machine.mmap, _without_bits(3, mmap.MAP_SHARED | _MAP_HUGETLB)),
    ]
    for number in machine.sockets:
        lines += _for_call(number, [*_one_of(0, _FAMILIES), *_one_of(2, _PROTOCOLS), (_GIVE, 0, 0, _ALLOW)])
    for number in _DENIED[name]:
        lines += _for_call(number, [_REFUSE])
    lines.append((_GIVE, 0, 0, _ALLOW))
    return b"".join(struct.pack("=HBBI", *line) for line in lines)


def _for_call(number: int, then: list[_Line]) -> list[_Line]:
    """`then`, which ends by giving a verdict, for this system call."""
    return [(_EQUAL, 0, len(then), number), *then]


def _load_argument(index: int) -> _Line:
    return (_LOAD, 0, 0, 16 + 8 * index)  # its lower half: flags, families and protocols are 32 bits


def _without_bits(index: int, bits: int) -> list[_Line]:
    return [_load_argument(index), (_ANY_BIT, 0, 1, bits), _REFUSE, (_GIVE, 0, 0, _ALLOW)]


def _one_of(index: int, values: tuple[int, ...]) -> list[_Line]:
    """Go on where the argument has one of `values`, and refuse the call where it has none."""
    tries = [(_EQUAL, len(values) - place, 0, value) for place, value in enumerate(values)]
    return [_load_argument(index), *tries, _REFUSE]
