"""The filter of system calls, run by an interpreter of classic BPF: nothing is called, so nothing can be changed."""

import re
from pathlib import Path

import pytest

from ctllm_jax.evaluation.code import sandbox_child
from ctllm_jax.evaluation.code.sandbox_child import call_filter

HEADERS = {"x86_64": "/usr/include/x86_64-linux-gnu/asm/unistd_64.h", "aarch64": "/usr/include/asm-generic/unistd.h"}
AUDIT = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
ALLOW, EPERM, ENOSYS, KILL = 0x7FFF0000, 0x00050001, 0x00050026, 0x80000000
HARMFUL = """sethostname setdomainname chroot mount umount2 pivot_root mount_setattr move_mount open_tree fsopen fsmount
    reboot clock_settime settimeofday adjtimex clock_adjtime init_module finit_module delete_module kexec_load swapon
    swapoff memfd_create memfd_secret socket connect bind listen accept sendmsg ptrace bpf perf_event_open userfaultfd
    keyctl add_key request_key setuid setresuid setgid setgroups capset setns unshare kill tkill tgkill rt_sigqueueinfo
    setpriority sched_setscheduler sched_setattr ioprio_set quotactl syslog acct vhangup iopl ioperm io_uring_setup
    io_uring_enter process_vm_readv process_vm_writev pidfd_open pidfd_getfd pidfd_send_signal kcmp shmget shmat semget
    msgget mq_open mknod mknodat setsid setpgid personality execveat fork vfork fanotify_init inotify_init
    name_to_handle_at open_by_handle_at lookup_dcookie nfsservctl migrate_pages move_pages mlock mlockall
    landlock_restrict_self seccomp modify_ldt chown fchown lchown fchownat""".split()
ON_FILES_OF_OTHERS = "chmod fchmod fchmodat utimensat utimes truncate setxattr fsetxattr removexattr".split()


def answer(steps, call, *arguments, audit):
    """What the filter answers to a call: the value that its return instruction holds."""
    words = {0: call, 4: audit}
    for index, argument in enumerate(arguments):
        words |= {16 + 8 * index: argument & 0xFFFFFFFF, 20 + 8 * index: argument >> 32}
    accumulator, place = 0, 0
    while True:
        code, if_true, if_false, operand = steps[place]
        place += 1
        if code == 0x06:
            return operand
        if code == 0x20:
            accumulator = words.get(operand, 0)
        else:
            holds = {0x15: accumulator == operand, 0x35: accumulator >= operand, 0x45: accumulator & operand}
            place += if_true if holds[code] else if_false


def numbers(machine):
    """Name -> number, as the kernel's own header has them."""
    path = Path(HEADERS[machine])
    if not path.is_file():
        pytest.skip(f"no {path} here")
    text = path.read_text()
    found = {name: int(number) for name, number in re.findall(r"#define __NR(?:3264)?_(\w+)\s+(\d+)", text)}
    return found | {name: found[other] for name, other in re.findall(r"#define __NR_(\w+) __NR3264_(\w+)", text)
                    if other in found}


@pytest.mark.parametrize("mounts_are_own", [True, False])
@pytest.mark.parametrize("machine", AUDIT)
def test_what_could_change_the_machine_is_denied_by_the_filter(machine, mounts_are_own):
    steps, known = call_filter(machine, mounts_are_own=mounts_are_own), numbers(machine)
    assert len(known) > 200
    assert all(0 <= jump <= 255 and len(steps) < 4096 for _, *jumps, _ in steps for jump in jumps)

    def of(name, *arguments):
        return answer(steps, known[name], *arguments, audit=AUDIT[machine])

    present = [name for name in HARMFUL if name in known]
    assert len(present) > 75 and [name for name in present if of(name) != EPERM] == []
    for name in set(ON_FILES_OF_OTHERS) & known.keys():
        assert of(name) == (ALLOW if mounts_are_own else EPERM), name
    for name in ("read", "write", "openat", "mmap", "futex", "exit_group", "execve", "clock_gettime", "getrandom"):
        assert of(name) == ALLOW, name


@pytest.mark.parametrize("machine", AUDIT)
def test_the_numbers_are_the_kernels(machine):
    known, column = numbers(machine), list(AUDIT).index(machine)
    tables = (sandbox_child._ALLOWED, sandbox_child._ALLOWED_WITH_OWN_MOUNTS, sandbox_child._DEPENDS)
    for name, each in ((name, each) for table in tables for name, each in table.items()):
        assert known.get(name, each[column]) == each[column], name  # an older header lacks the newest calls
        assert each[column] is not None or name not in known


@pytest.mark.parametrize(("name", "arguments", "expected"), [
    ("clone", (0x3D0F00,), ALLOW), ("clone", (17,), EPERM), ("clone", (0x10000000,), EPERM), ("clone3", (), ENOSYS),
    ("prlimit64", (0, 9, 1), ALLOW), ("prlimit64", (1, 9, 1), EPERM), ("prctl", (15,), ALLOW), ("prctl", (1,), EPERM),
    ("prctl", (22, 0), EPERM), ("fcntl", (5, 3), ALLOW), ("fcntl", (5, 8, 1), EPERM), ("fcntl", (5, 10, 9), EPERM),
    ("fcntl", (5, 15, 1), EPERM), ("ioctl", (1, 0x5401), ALLOW), ("ioctl", (1, 0x5412), EPERM),
    ("ioctl", (1, 0x8901), EPERM), ("sendto", (3, 1, 1, 0, 0, 0), ALLOW), ("sendto", (3, 1, 1, 0, 1, 8), EPERM),
    ("sendto", (3, 1, 1, 0, 1 << 32, 8), EPERM)])
@pytest.mark.parametrize("machine", AUDIT)
def test_arguments_decide(machine, name, arguments, expected):
    steps = call_filter(machine, mounts_are_own=True)
    number = sandbox_child._DEPENDS[name][list(AUDIT).index(machine)]
    assert answer(steps, number, *arguments, audit=AUDIT[machine]) == expected


@pytest.mark.parametrize("machine", AUDIT)
def test_other_doors_are_closed(machine):
    steps = call_filter(machine, mounts_are_own=False)
    assert answer(steps, 0, audit=0x40000003) == KILL, "the calls of 32 bits have other numbers"
    assert answer(steps, 0x40000000 | 1, audit=AUDIT[machine]) == EPERM, "those of x32, too"
    assert {answer(steps, number, audit=AUDIT[machine]) for number in (463, 500, 10**6)} == {ENOSYS}
    allowed = {number for number in range(2000) if answer(steps, number, audit=AUDIT[machine]) == ALLOW}
    column = list(AUDIT).index(machine)
    listed = {each[column] for each in sandbox_child._ALLOWED.values()} | {
        each[column] for name, each in sandbox_child._DEPENDS.items() if name in ("prlimit64", "sendto", "fcntl")}
    assert allowed == listed - {None}
