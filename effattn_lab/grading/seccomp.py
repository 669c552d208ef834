"""System calls that nothing inside the sandbox needs: refused by a filter that bubblewrap loads.

Namespaces and limits leave gaps. Memory of a kind that belongs to no process (memory files, shared anonymous
mappings, System V segments) escapes every limit per process and every look from outside; some calls look into other
processes; others widen what of the kernel can be attacked. All of them get "operation not permitted".
"""

from __future__ import annotations

import platform
import struct

#: machine → (its number in the filter's data, numbers of the calls that are refused)
_CALLS: dict[str, tuple[int, dict[str, int]]] = {
    "x86_64": (0xC000003E, {
        "shmget": 29, "shmat": 30, "shmctl": 31, "semget": 64, "semop": 65, "semctl": 66, "msgget": 68,
        "msgsnd": 69, "msgrcv": 70, "msgctl": 71, "ptrace": 101, "syslog": 103, "uselib": 134, "personality": 135,
        "ustat": 136, "pivot_root": 155, "chroot": 161, "acct": 163, "mount": 165, "umount2": 166, "swapon": 167,
        "swapoff": 168, "reboot": 169, "iopl": 172, "ioperm": 173, "init_module": 175, "delete_module": 176,
        "quotactl": 179, "lookup_dcookie": 212, "semtimedop": 220, "mq_open": 240, "kexec_load": 246,
        "add_key": 248, "request_key": 249, "keyctl": 250, "unshare": 272, "move_pages": 279, "vmsplice": 278,
        "perf_event_open": 298, "name_to_handle_at": 303, "open_by_handle_at": 304, "setns": 308,
        "process_vm_readv": 310, "process_vm_writev": 311, "kcmp": 312, "finit_module": 313, "memfd_create": 319,
        "kexec_file_load": 320, "bpf": 321, "userfaultfd": 323, "setxattr": 188, "lsetxattr": 189,
        "fsetxattr": 190, "removexattr": 197, "lremovexattr": 198, "fremovexattr": 199,
    }),
    "aarch64": (0xC00000B7, {
        "lookup_dcookie": 18, "umount2": 39, "mount": 40, "pivot_root": 41, "chroot": 51, "quotactl": 60,
        "vmsplice": 75, "acct": 89, "personality": 92, "unshare": 97, "kexec_load": 104, "init_module": 105,
        "delete_module": 106, "syslog": 116, "ptrace": 117, "reboot": 142, "mq_open": 180, "msgget": 186,
        "msgctl": 187, "msgrcv": 188, "msgsnd": 189, "semget": 190, "semctl": 191, "semtimedop": 192, "semop": 193,
        "shmget": 194, "shmctl": 195, "shmat": 196, "add_key": 217, "request_key": 218, "keyctl": 219,
        "swapon": 224, "swapoff": 225, "move_pages": 239, "perf_event_open": 241, "name_to_handle_at": 264,
        "open_by_handle_at": 265, "setns": 268, "process_vm_readv": 270, "process_vm_writev": 271, "kcmp": 272,
        "finit_module": 273, "memfd_create": 279, "bpf": 280, "userfaultfd": 282, "kexec_file_load": 294,
        "setxattr": 5, "lsetxattr": 6, "fsetxattr": 7, "removexattr": 14, "lremovexattr": 15, "fremovexattr": 16,
    }),
}  # fmt: skip
#: Calls younger than 2019 have one number everywhere: io_uring, the mount calls by descriptor, memory and handles of
#: other processes, memory files that even the kernel does not see, modes and attributes of files.
_EVERYWHERE = (425, 426, 427, 428, 429, 430, 431, 432, 433, 438, 440, 442, 443, 447, 452, 463, 466)
#: Done by no one and said to be done. Where the grader is root, this machine's devices belong to who is inside, and
#: their modes could be changed; much honest code sets the mode of a file that it made.
_PRETENDED = {"x86_64": (90, 91, 92, 93, 94, 260, 268), "aarch64": (52, 53, 54, 55)}  # chmod, chown and kin
_MMAP = {"x86_64": 9, "aarch64": 222}
_PRLIMIT = {"x86_64": 302, "aarch64": 261}

_LOAD, _EQUAL, _AT_LEAST, _AND, _RETURN = 0x20, 0x15, 0x35, 0x54, 0x06
_NUMBER, _MACHINE, _FIRST, _FOURTH = 0, 4, 16, 16 + 3 * 8  # offsets in the data that a filter sees
_ALLOW, _PRETEND, _REFUSE = 0x7FFF0000, 0x00050000, 0x00050000 | 1  # EPERM
_SHARED, _ANONYMOUS = 0x01, 0x20
_X32 = 0x40000000  # the other numbering of calls on x86-64


def supported() -> bool:
    """Is there a filter for this machine's processor?"""
    return platform.machine() in _CALLS


def program(shared_memory: bool = False) -> bytes:
    """The filter, as bubblewrap's ``--seccomp`` reads it.

    Args:
        shared_memory: allow anonymous memory that processes share. A GPU's driver needs it.
    """
    machine = platform.machine()
    number, calls = _CALLS[machine]
    code = [
        (_LOAD, 0, 0, _MACHINE), (_EQUAL, 1, 0, number), (_RETURN, 0, 0, _REFUSE), (_LOAD, 0, 0, _NUMBER),
        (_AT_LEAST, 0, 1, _X32), (_RETURN, 0, 0, _REFUSE),
    ]  # fmt: skip
    for call in _PRETENDED[machine]:
        code += [(_EQUAL, 0, 1, call), (_RETURN, 0, 0, _PRETEND)]
    for call in (*sorted(calls.values()), *_EVERYWHERE):
        code += [(_EQUAL, 0, 1, call), (_RETURN, 0, 0, _REFUSE)]
    if not shared_memory:
        both = _SHARED | _ANONYMOUS
        code += [
            (_EQUAL, 0, 4, _MMAP[machine]), (_LOAD, 0, 0, _FOURTH), (_AND, 0, 0, both),
            (_EQUAL, 0, 1, both), (_RETURN, 0, 0, _REFUSE),
        ]  # fmt: skip
    # A process sets its own limits only. The number of the call was overwritten above at most by flags.
    code += [
        (_LOAD, 0, 0, _NUMBER), (_EQUAL, 0, 3, _PRLIMIT[machine]), (_LOAD, 0, 0, _FIRST),
        (_EQUAL, 1, 0, 0), (_RETURN, 0, 0, _REFUSE), (_RETURN, 0, 0, _ALLOW),
    ]  # fmt: skip
    return b"".join(struct.pack("<HBBI", *step) for step in code)
