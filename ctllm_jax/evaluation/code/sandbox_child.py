"""The isolation of a model-written program; run as a script by `sandbox`, with a clean interpreter.

Three processes: this one makes the namespaces; its child is their first process, whose end ends all others in them; and
the child's child restricts itself and becomes the program. Only the standard library; Linux only.
"""

from __future__ import annotations

import ctypes
import json
import os
import platform
import resource
import signal
import struct
import sys

RUNNER = """
import os, sys
write, leave, status = os.write, os._exit, int(sys.argv[1])
with open(int(sys.argv[2]), encoding="utf-8", newline="") as file:
    token, _, program = file.read().partition("\\n")
sys.argv[1:] = []
exec(compile(program, "<program>", "exec"), {"__name__": "__main__"})
sys.stdout.flush()
write(status, token.encode())
leave(0)
"""
SETUP_FAILED = 125

_CLONE_THREAD = 0x10000
_NAMESPACES = 0x20000 | 0x4000000 | 0x8000000 | 0x10000000 | 0x20000000 | 0x40000000  # mount uts ipc user pid net
_PR_SET_PDEATHSIG, _PR_SET_NO_NEW_PRIVS, _PR_SET_SECCOMP, _SECCOMP_MODE_FILTER = 1, 38, 22, 2
_PR_CAPBSET_DROP, _PR_CAP_AMBIENT, _CLEAR_ALL = 24, 47, 4
_MOUNT_SETATTR, _LANDLOCK_CREATE, _LANDLOCK_ADD, _LANDLOCK_RESTRICT = 442, 444, 445, 446
_READ_FILE, _READ_DIRECTORY, _EXECUTE = 1 << 2, 1 << 3, 1 << 0

# Numbers on x86_64 and on aarch64 (None: there is no such call) of what a program may call: computing, its own files,
# threads, timers and time. All other calls fail: new processes, sockets, signals and a look into other processes,
# memory that no limit counts (memfd_create), the machine's name, clock, mounts and modules, other ways to hide or to
# gain rights.
_ALLOWED = {
    "read": (0, 63), "write": (1, 64), "open": (2, None), "openat": (257, 56), "close": (3, 57), "stat": (4, None),
    "fstat": (5, 80), "lstat": (6, None), "newfstatat": (262, 79), "statx": (332, 291), "poll": (7, None),
    "ppoll": (271, 73), "lseek": (8, 62), "mmap": (9, 222), "munmap": (11, 215), "mprotect": (10, 226),
    "mremap": (25, 216), "msync": (26, 227), "mincore": (27, 232), "madvise": (28, 233), "brk": (12, 214),
    "rt_sigaction": (13, 134), "rt_sigprocmask": (14, 135), "rt_sigreturn": (15, 139), "rt_sigpending": (127, 136),
    "rt_sigsuspend": (130, 133), "rt_sigtimedwait": (128, 137), "sigaltstack": (131, 132),
    "restart_syscall": (219, 128), "pause": (34, None), "pread64": (17, 67), "pwrite64": (18, 68), "readv": (19, 65),
    "writev": (20, 66), "preadv": (295, 69), "pwritev": (296, 70), "preadv2": (327, 286), "pwritev2": (328, 287),
    "access": (21, None), "faccessat": (269, 48), "faccessat2": (439, 439), "pipe": (22, None), "pipe2": (293, 59),
    "select": (23, None), "pselect6": (270, 72), "sched_yield": (24, 124), "sched_getaffinity": (204, 123),
    "sched_getparam": (143, 121), "sched_getscheduler": (145, 120), "sched_get_priority_max": (146, 125),
    "sched_get_priority_min": (147, 126), "dup": (32, 23), "dup2": (33, None), "dup3": (292, 24),
    "nanosleep": (35, 101), "clock_nanosleep": (230, 115), "clock_gettime": (228, 113), "clock_getres": (229, 114),
    "gettimeofday": (96, 169), "time": (201, None), "times": (100, 153), "getitimer": (36, 102),
    "setitimer": (38, 103), "alarm": (37, None), "timer_create": (222, 107), "timer_settime": (223, 110),
    "timer_gettime": (224, 108), "timer_getoverrun": (225, 109), "timer_delete": (226, 111),
    "timerfd_create": (283, 85), "timerfd_settime": (286, 86), "timerfd_gettime": (287, 87), "getpid": (39, 172),
    "getppid": (110, 173), "gettid": (186, 178), "getuid": (102, 174), "geteuid": (107, 175), "getgid": (104, 176),
    "getegid": (108, 177), "getresuid": (118, 148), "getresgid": (120, 150), "getgroups": (115, 158),
    "getpgrp": (111, None), "getpgid": (121, 155), "getsid": (124, 156), "getpriority": (140, 141),
    "socketpair": (53, 199), "recvfrom": (45, 207), "recvmsg": (47, 212), "shutdown": (48, 210),
    "getsockname": (51, 204), "getpeername": (52, 205), "getsockopt": (55, 209), "execve": (59, 221),
    "exit": (60, 93), "exit_group": (231, 94), "wait4": (61, 260), "waitid": (247, 95), "uname": (63, 160),
    "sysinfo": (99, 179), "getrusage": (98, 165), "getrlimit": (97, 163), "setrlimit": (160, 164),
    "getcpu": (309, 168), "capget": (125, 90), "flock": (73, 32), "fsync": (74, 82), "fdatasync": (75, 83),
    "ftruncate": (77, 46), "fallocate": (285, 47), "fadvise64": (221, 223), "sendfile": (40, 71),
    "copy_file_range": (326, 285), "splice": (275, 76), "tee": (276, 77), "getdents64": (217, 61), "getcwd": (79, 17),
    "chdir": (80, 49), "fchdir": (81, 50), "mkdir": (83, None), "mkdirat": (258, 34), "rmdir": (84, None),
    "unlink": (87, None), "unlinkat": (263, 35), "rename": (82, None), "renameat": (264, 38), "renameat2": (316, 276),
    "link": (86, None), "linkat": (265, 37), "symlink": (88, None), "symlinkat": (266, 36), "readlink": (89, None),
    "readlinkat": (267, 78), "umask": (95, 166), "statfs": (137, 43), "fstatfs": (138, 44),
    "epoll_create": (213, None), "epoll_create1": (291, 20), "epoll_ctl": (233, 21), "epoll_wait": (232, None),
    "epoll_pwait": (281, 22), "epoll_pwait2": (441, 441), "eventfd": (284, None), "eventfd2": (290, 19),
    "close_range": (436, 436), "futex": (202, 98), "futex_waitv": (449, 449), "get_robust_list": (274, 100),
    "set_robust_list": (273, 99), "set_tid_address": (218, 96), "rseq": (334, 293), "membarrier": (324, 283),
    "getrandom": (318, 278), "arch_prctl": (158, None), "get_mempolicy": (239, 236),
}
# Without a mount namespace these would change files of other users, which Landlock does not prevent.
_ALLOWED_WITH_OWN_MOUNTS = {
    "truncate": (76, 45), "chmod": (90, None), "fchmod": (91, 52), "fchmodat": (268, 53), "fchmodat2": (452, 452),
    "utime": (132, None), "utimes": (235, None), "utimensat": (280, 88), "futimesat": (261, None),
    "setxattr": (188, 5), "lsetxattr": (189, 6), "fsetxattr": (190, 7), "removexattr": (197, 14),
    "lremovexattr": (198, 15), "fremovexattr": (199, 16), "getxattr": (191, 8), "lgetxattr": (192, 9),
    "fgetxattr": (193, 10), "listxattr": (194, 11), "llistxattr": (195, 12), "flistxattr": (196, 13),
}
_DEPENDS = {
    "clone": (56, 220), "clone3": (435, 435), "prlimit64": (302, 261), "prctl": (157, 167), "ioctl": (16, 29),
    "fcntl": (72, 25), "sendto": (44, 206),
}
_NEWER = 463
"""Calls from this number on fail as if missing, as on an older kernel, so that the C library uses another one."""
_ARCHITECTURES = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
# Of prctl: the names of threads and of memory. Of ioctl: is it a terminal, how many bytes are there, do not block,
# close on exec. Of fcntl not: signals to others when a file is ready (F_SETOWN, F_SETSIG, F_SETOWN_EX), leases.
_PRCTL = (3, 15, 16, 23, 0x53564D41)
_IOCTL = (0x5401, 0x802C542A, 0x5413, 0x541B, 0x5421, 0x5450, 0x5451)
_NOT_FCNTL = (8, 10, 15, 1024, 1026)

libc = ctypes.CDLL(None, use_errno=True)


def main() -> int:
    """Read the job from standard input, run it; the exit status is the program's, 128 + n after signal n."""
    job = json.load(sys.stdin.buffer)
    setup = job["setup_fd"]
    os.set_inheritable(setup, False)  # closed when the program starts, so that it cannot write here
    _call("prctl", _PR_SET_PDEATHSIG, signal.SIGKILL)
    signal.alarm(int(job["wall_seconds"]) + 10)  # in case the process that watches the clock has ended
    try:
        if job["isolation"] == "namespaces":
            _enter_namespaces()
        child = os.fork()
    except OSError as error:
        os.write(setup, str(error).encode())
        return SETUP_FAILED
    if child:
        return _exit_status(child)
    os._exit(_first_process(job))


def _first_process(job: dict) -> int:
    try:
        _call("prctl", _PR_SET_PDEATHSIG, signal.SIGKILL)
        if job["isolation"] == "namespaces":
            _rearrange_files(job["directory"], job["disk_bytes"], job["entries"])
        child = os.fork()
        if child:
            return _exit_status(child)
        _become_program(job)
    except Exception as error:
        os.write(job["setup_fd"], str(error).encode())
    return SETUP_FAILED


def _exit_status(child: int) -> int:
    while True:
        pid, status = os.wait()
        if pid == child:
            code = os.waitstatus_to_exitcode(status)
            return code if code >= 0 else 128 - code


def _become_program(job: dict) -> None:
    _call("prctl", _PR_SET_PDEATHSIG, signal.SIGKILL)
    source = os.memfd_create("program", 0)
    os.write(source, f"{job['token']}\n".encode())
    with open(source, "wb", closefd=False) as file:
        file.write(job["program"].encode("utf-8", "surrogatepass"))
    os.lseek(source, 0, os.SEEK_SET)
    os.set_inheritable(source, True)
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.chdir(job["directory"])
    os.umask(0o077)
    for name, value in job["limits"].items():
        resource.setrlimit(getattr(resource, name), (value, value))
    _drop_capabilities()
    _call("prctl", _PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    abi = libc.syscall(_LANDLOCK_CREATE, None, 0, 1)
    if abi <= 0:  # a read-only mount alone lets a program read, and print, every secret of its user
        raise OSError("this kernel has no Landlock")
    _restrict_files(abi, job["directory"], job["readable"])
    if platform.machine() not in _ARCHITECTURES:
        raise OSError(f"system calls are known for {' and '.join(_ARCHITECTURES)}, not for {platform.machine()}")
    _restrict_calls(platform.machine(), mounts_are_own=job["isolation"] == "namespaces")
    python = job["python"]
    os.execve(python, [python, "-I", "-c", RUNNER, str(job["status_fd"]), str(source)], job["environment"])


def _enter_namespaces() -> None:
    user, group = os.geteuid(), os.getegid()
    _call("unshare", _NAMESPACES)
    for name, text in (("setgroups", "deny"), ("uid_map", f"65534 {user} 1"), ("gid_map", f"65534 {group} 1")):
        with open(f"/proc/self/{name}", "w") as file:
            file.write(text)


def _rearrange_files(directory: str, disk_bytes: int, entries: int) -> None:
    """Make everything read-only, mount a writable file system in memory, and hide /proc."""
    private, recursive, read_only = 1 << 18, 0x8000, 1
    attributes = ctypes.create_string_buffer(struct.pack("=QQQQ", read_only, 0, private, 0))
    _check(libc.syscall(_MOUNT_SETATTR, -100, b"/", recursive, attributes, 32), "mount_setattr")
    no_devices_or_rights = 2 | 4
    own = f"size={disk_bytes},nr_inodes={entries},mode=0700"
    for place, options in ((directory, own), ("/proc", "size=4096,mode=0555")):
        _call("mount", b"tmpfs", place.encode(), b"tmpfs", no_devices_or_rights, options.encode())


def _restrict_files(abi: int, directory: str, readable: list[str]) -> None:
    """Landlock: read below `readable`, anything below `directory`, nothing elsewhere; from ABI 4 on no TCP either."""
    files = (1 << 13) - 1 | (1 << 13 if abi >= 2 else 0) | (1 << 14 if abi >= 3 else 0)
    attributes = struct.pack("=Q", files) if abi < 4 else struct.pack("=QQ", files, 3)
    buffer = ctypes.create_string_buffer(attributes, len(attributes))
    ruleset = _check(libc.syscall(_LANDLOCK_CREATE, buffer, len(attributes), 0), "landlock_create_ruleset")
    of_a_file = _EXECUTE | 1 << 1 | _READ_FILE | (files & 1 << 14)
    rules = [(directory, files)] + [(path, _READ_FILE | _READ_DIRECTORY | _EXECUTE) for path in readable]
    for path, rights in (*rules, (os.devnull, _READ_FILE | 1 << 1), ("/dev/urandom", _READ_FILE)):
        try:
            opened = os.open(path, os.O_PATH | os.O_CLOEXEC)
        except OSError:
            continue
        rights &= files if os.path.isdir(path) else of_a_file
        rule = ctypes.create_string_buffer(struct.pack("=Qi", rights, opened), 12)
        _check(libc.syscall(_LANDLOCK_ADD, ruleset, 1, rule, 0), f"landlock_add_rule {path}")
        os.close(opened)
    _check(libc.syscall(_LANDLOCK_RESTRICT, ruleset, 0), "landlock_restrict_self")
    os.close(ruleset)


def _drop_capabilities() -> None:
    """Drop all capabilities, now and after execve; root would otherwise keep all of them with Landlock."""
    for capability in range(64):
        if libc.prctl(*map(ctypes.c_ulong, (_PR_CAPBSET_DROP, capability, 0, 0, 0))) < 0:
            break  # there is no capability of this number, or none is held
    libc.prctl(*map(ctypes.c_ulong, (_PR_CAP_AMBIENT, _CLEAR_ALL, 0, 0, 0)))
    header, none = struct.pack("=Ii", 0x20080522, 0), bytes(24)
    _check(libc.capset(ctypes.create_string_buffer(header, 8), ctypes.create_string_buffer(none, 24)), "capset")


def _restrict_calls(machine: str, *, mounts_are_own: bool) -> None:
    """seccomp: all calls but those of `call_filter` fail."""
    code = b"".join(struct.pack("=HBBI", *step) for step in call_filter(machine, mounts_are_own=mounts_are_own))
    buffer = ctypes.create_string_buffer(code, len(code))
    program = ctypes.create_string_buffer(struct.pack("@HP", len(code) // 8, ctypes.addressof(buffer)))
    _call("prctl", _PR_SET_SECCOMP, _SECCOMP_MODE_FILTER, program, 0, 0)


def call_filter(machine: str, *, mounts_are_own: bool) -> list[tuple[int, int, int, int]]:
    """The filter as instructions (code, jump if true, jump if false, operand) of classic BPF over seccomp_data."""
    load, equal, at_least, has_bits, answer = 0x20, 0x15, 0x35, 0x45, 0x06
    allow, kill = (answer, 0, 0, 0x7FFF0000), (answer, 0, 0, 0x80000000)
    deny, absent = (answer, 0, 0, 0x00050001), (answer, 0, 0, 0x00050026)  # EPERM, ENOSYS
    number, architecture = (load, 0, 0, 0), (load, 0, 0, 4)
    column = list(_ARCHITECTURES).index(machine)

    def argument(index: int, half: int = 0) -> tuple[int, int, int, int]:
        return load, 0, 0, 16 + 8 * index + 4 * half

    def one_of(index: int, values: tuple[int, ...], then: tuple, otherwise: tuple) -> list[tuple[int, int, int, int]]:
        return [argument(index), *(step for value in values for step in ((equal, 0, 1, value), then)), otherwise]

    steps = [architecture, (equal, 1, 0, _ARCHITECTURES[machine]), kill, number, (at_least, 0, 1, 0x40000000), deny]
    for calls in (_ALLOWED, _ALLOWED_WITH_OWN_MOUNTS if mounts_are_own else {}):
        for numbers in calls.values():
            if numbers[column] is not None:
                steps += [(equal, 0, 1, numbers[column]), allow]
    depends = {
        "clone": [argument(0), (has_bits, 0, 1, _CLONE_THREAD), allow, deny],  # threads, and no processes
        "clone3": [absent],  # the C library then takes clone, whose flags can be seen
        "prlimit64": one_of(0, (0,), allow, deny),  # its own limits
        "prctl": one_of(0, _PRCTL, allow, deny),
        "ioctl": one_of(1, _IOCTL, allow, deny),
        "fcntl": one_of(1, _NOT_FCNTL, deny, allow),
        # To its own socket pair, and to no address: a datagram could reach a socket of the file system.
        "sendto": [argument(4), (equal, 0, 3, 0), argument(4, 1), (equal, 0, 1, 0), allow, deny]}
    for name, body in depends.items():
        steps += [(equal, 0, len(body), _DEPENDS[name][column]), *body]
    return [*steps, (at_least, 0, 1, _NEWER), absent, deny]


def _call(name: str, *arguments) -> int:
    # As unsigned longs: variadic functions get no conversion.
    given = [ctypes.c_ulong(argument) if isinstance(argument, int) else argument for argument in arguments]
    return _check(getattr(libc, name)(*given), name)


def _check(result: int, what: str) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")
    return result


if __name__ == "__main__":
    sys.exit(main())
