"""What stands between a program of a model and this machine; run as a script by `sandbox`, with a clean interpreter.

Three processes: this one makes the namespaces, its child is the first process of them (whose end is the end of all in
them), and the child's child bars its own way out and becomes the program. Only the standard library; Linux only.
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
_MOUNT_SETATTR, _LANDLOCK_CREATE, _LANDLOCK_ADD, _LANDLOCK_RESTRICT = 442, 444, 445, 446
_READ_FILE, _READ_DIRECTORY, _EXECUTE = 1 << 2, 1 << 3, 1 << 0

# Denied: new processes, sockets, signals and a look into other processes, memory that outlives a process, other ways to
# hide or to gain rights.
_DENIED = {
    "x86_64": {"fork": 57, "vfork": 58, "socket": 41, "connect": 42, "kill": 62, "tkill": 200, "tgkill": 234,
               "ptrace": 101, "setpgid": 109, "setsid": 112, "mount": 165, "umount2": 166, "rt_sigqueueinfo": 129,
               "rt_tgsigqueueinfo": 297, "keyctl": 250, "unshare": 272, "process_vm_readv": 310,
               "process_vm_writev": 311, "bpf": 321, "setns": 308, "personality": 135, "shmget": 29, "semget": 64,
               "msgget": 68, "mq_open": 240},
    "aarch64": {"socket": 198, "connect": 203, "kill": 129, "tkill": 130, "tgkill": 131, "ptrace": 117,
                "setpgid": 154, "setsid": 157, "mount": 40, "umount2": 39, "rt_sigqueueinfo": 138,
                "rt_tgsigqueueinfo": 240, "keyctl": 219, "unshare": 97, "process_vm_readv": 270,
                "process_vm_writev": 271, "bpf": 280, "setns": 268, "personality": 92, "shmget": 194, "semget": 190,
               "msgget": 186, "mq_open": 180},
}
_DENIED_EVERYWHERE = (424, 425, 426, 427, 438)  # pidfd_send_signal, io_uring_*, pidfd_getfd
# Without a mount namespace also what Landlock does not see: truncate (before its ABI 3), chmod, chown, attributes and
# times of files anywhere, and setpriority.
_DENIED_TO_FILES = {
    "x86_64": (76, 90, 91, 92, 93, 94, 132, 141, 188, 189, 190, 235, 260, 261, 268, 280, 452),
    "aarch64": (5, 6, 7, 45, 52, 53, 54, 55, 88, 140, 452),
}
_ARCHITECTURES = {"x86_64": (0xC000003E, 56, 302), "aarch64": (0xC00000B7, 220, 261)}  # audit id, clone, prlimit64
_CLONE3 = 435

libc = ctypes.CDLL(None, use_errno=True)


def main() -> int:
    """Read the job from standard input, run it; the exit status is the program's, 128 + n after signal n."""
    job = json.load(sys.stdin.buffer)
    status = job["status_fd"]
    _call("prctl", _PR_SET_PDEATHSIG, signal.SIGKILL)
    signal.alarm(int(job["wall_seconds"]) + 10)  # should the one that watches the clock be gone
    try:
        if job["isolation"] == "namespaces":
            _enter_namespaces()
        child = os.fork()
    except OSError as error:
        os.write(status, f"setup: {error}".encode())
        return SETUP_FAILED
    if child:
        return _exit_status(child)
    os._exit(_first_process(job))


def _first_process(job: dict) -> int:
    try:
        _call("prctl", _PR_SET_PDEATHSIG, signal.SIGKILL)
        if job["isolation"] == "namespaces":
            _rearrange_files(job["directory"], job["disk_bytes"])
        child = os.fork()
        if child:
            return _exit_status(child)
        _become_program(job)
    except Exception as error:
        os.write(job["status_fd"], f"setup: {error}".encode())
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


def _rearrange_files(directory: str, disk_bytes: int) -> None:
    """Everything read-only; a file system in memory where the program may write; nothing to see in /proc."""
    private, recursive, read_only = 1 << 18, 0x8000, 1
    attributes = ctypes.create_string_buffer(struct.pack("=QQQQ", read_only, 0, private, 0))
    _check(libc.syscall(_MOUNT_SETATTR, -100, b"/", recursive, attributes, 32), "mount_setattr")
    no_devices_or_rights = 2 | 4
    for place, options in ((directory, f"size={disk_bytes},mode=0700"), ("/proc", "size=4096,mode=0555")):
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


def _restrict_calls(machine: str, *, mounts_are_own: bool) -> None:
    """seccomp: the calls above fail with EPERM; threads may be made, processes may not."""
    load, equal, at_least, has_bits, answer = 0x20, 0x15, 0x35, 0x45, 0x06
    allow, deny, absent, kill = 0x7FFF0000, 0x00050001, 0x00050026, 0x80000000
    number, architecture, first_argument = 0, 4, 16
    audit, clone, prlimit = _ARCHITECTURES[machine]
    denied = sorted({*_DENIED[machine].values(), *_DENIED_EVERYWHERE,
                     *(() if mounts_are_own else _DENIED_TO_FILES[machine])})
    steps = [(load, 0, 0, architecture), (equal, 1, 0, audit), (answer, 0, 0, kill), (load, 0, 0, number),
             (at_least, 0, 1, 0x40000000), (answer, 0, 0, deny)]
    for call in denied:
        steps += [(equal, 0, 1, call), (answer, 0, 0, deny)]
    steps += [(equal, 0, 1, _CLONE3), (answer, 0, 0, absent)]  # glibc then takes clone, whose flags can be seen
    steps += [(equal, 0, 4, clone), (load, 0, 0, first_argument), (has_bits, 1, 0, _CLONE_THREAD),
              (answer, 0, 0, deny), (answer, 0, 0, allow)]
    steps += [(equal, 0, 4, prlimit), (load, 0, 0, first_argument), (equal, 1, 0, 0), (answer, 0, 0, deny),
              (answer, 0, 0, allow), (answer, 0, 0, allow)]
    code = b"".join(struct.pack("=HBBI", *step) for step in steps)
    buffer = ctypes.create_string_buffer(code, len(code))
    program = ctypes.create_string_buffer(struct.pack("@HP", len(steps), ctypes.addressof(buffer)))
    _call("prctl", _PR_SET_SECCOMP, _SECCOMP_MODE_FILTER, program, 0, 0)


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
