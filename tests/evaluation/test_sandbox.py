"""Programs that misbehave in every way we could think of: none gets out, none stays, none passes."""

import dataclasses
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from ctllm_jax.config.errors import UserError
from ctllm_jax.evaluation.code import sandbox
from ctllm_jax.evaluation.code.sandbox import Limits, run_program, run_programs

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the sandbox is made of Linux's means")

# PATIENT is for programs that end by themselves: on a busy machine they may need more than a second of CPU time.
PATIENT = Limits(wall_seconds=60, cpu_seconds=30, memory_bytes=256 << 20, file_bytes=1 << 20, output_bytes=10_000)
SHORT = Limits(wall_seconds=5, cpu_seconds=1, memory_bytes=256 << 20, file_bytes=1 << 20, output_bytes=10_000)


def works(isolation):
    try:
        return run_program("", isolation=isolation).passed
    except RuntimeError:
        return False


@pytest.fixture(scope="module", params=["namespaces", "landlock"])
def isolation(request):
    """Both ways, each where this machine allows it."""
    if not works(request.param):
        pytest.skip(f"this machine allows no {request.param}")
    return request.param


def run(program, isolation, limits=SHORT):
    return run_program(program, limits=limits, isolation=isolation)


def test_this_machine_has_a_sandbox():
    assert sandbox.find_isolation() in ("namespaces", "landlock")


@pytest.mark.parametrize("program", [
    "", "assert sorted([2, 1]) == [1, 2]", "print('中文', end='')", "import sys; assert sys.argv == ['-c']",
    "from typing import List\nimport math, re, heapq, collections, itertools, functools, json, decimal, datetime",
    "import threading\nthread = threading.Thread(target=print, args=('hi',))\nthread.start(); thread.join()",
    "open('x', 'w').write('1'); assert open('x').read() == '1'\nimport tempfile; tempfile.NamedTemporaryFile()",
    "import numpy; assert numpy.ones((50, 50)).sum() == 2500",
    "if __name__ == '__main__':\n    ran = True\nassert ran", "import os; assert os.urandom(4) and os.getcwd()",
    "import threading, time\nthreading.Thread(target=time.sleep, args=(600,)).start()",  # left behind: not waited for
    "s = '\\ud800'",
])
def test_honest_programs_pass(program, isolation):
    outcome = run(program, isolation, PATIENT)
    assert outcome.passed, outcome.output


@pytest.mark.parametrize(("program", "said"), [
    ("assert 1 == 2", "AssertionError"), ("def f(:", "SyntaxError"), ("raise KeyError('x')", "KeyError: 'x'"),
    ("import sys; sys.exit(0)", ""), ("import os; os._exit(0)", ""), ("raise SystemExit", ""), ("quit()", ""),
    ("import os; os.execv('/bin/true', ['true'])", ""), ("import os; os.abort()", ""),
    ("import os; os.closerange(0, 100); raise SystemExit", ""), ("import no_such_module", "ModuleNotFoundError"),
    ("print('passed')\nimport os; os.write(3, b'passed'); os._exit(0)", ""),
    ("def f(n): return f(n + 1)\nf(0)", "RecursionError"), ("x = '\0'", "null bytes"),
])
def test_what_does_not_reach_its_last_line_fails(program, said, isolation):
    outcome = run(program, isolation, PATIENT)
    assert outcome.status == "failed" and said in outcome.output, outcome


@pytest.mark.parametrize("program", [
    "while True: pass", "import time; time.sleep(60)",
    "import os, time\nfor number in range(3): os.close(number)\ntime.sleep(60)",
    "import signal, time\nfor n in (15, 2, 1, 14): signal.signal(n, signal.SIG_IGN)\nwhile True: time.sleep(1)",
    "import threading\nthreads = [threading.Thread(target=lambda: sum(iter(int, 1))) for _ in range(3)]\n"
    "for thread in threads: thread.start()\nfor thread in threads: thread.join()",
    "import select; select.select([], [], [])",
])
def test_what_does_not_end_is_ended(program, isolation):
    limits = Limits(wall_seconds=1.2, cpu_seconds=1, memory_bytes=256 << 20)
    assert run(program, isolation, limits).status == "timed out"


def test_output_is_bounded(isolation):
    outcome = run("while True: print('x' * 1000)", isolation)
    assert outcome.status == "too much output" and len(outcome.output) == SHORT.output_bytes
    assert run("import sys\nwhile True: sys.stderr.write('y')", isolation).status == "too much output"


@pytest.mark.parametrize(("program", "said"), [
    ("x = bytearray(1 << 30)", "MemoryError"),
    ("x = []\nwhile True: x.append('x' * 10**6 + str(len(x)))", "MemoryError"),
    ("open('big', 'wb').write(b'x' * (2 << 20))", "OSError: [Errno 27]"),
    ("files = [open(str(number), 'w') for number in range(1000)]", "OSError: [Errno 24]"),
    ("import resource; resource.setrlimit(resource.RLIMIT_AS, (-1, -1))", "not allowed"),
    ("import resource, os; resource.prlimit(os.getppid(), resource.RLIMIT_CPU, (0, 0))", "PermissionError"),
])
def test_memory_and_files_are_bounded(program, said, isolation):
    outcome = run(program, isolation, PATIENT)
    assert outcome.status == "failed" and said in outcome.output, outcome


def test_all_files_together_are_bounded():
    if not works("namespaces"):
        pytest.skip("this machine allows no namespaces; Landlock bounds each file")
    outcome = run("for number in range(20): open(str(number), 'wb').write(b'x' * 1000000)", "namespaces")
    assert "No space left on device" in outcome.output


FORKS = {
    "fork": "import os\nos.fork()",
    "subprocess": "import subprocess; subprocess.run(['true'])",
    "system": "import os; assert os.system('true') == 0",
    "spawn": "import multiprocessing\nmultiprocessing.get_context('spawn').Process(target=print).start()",
    "clone": "import ctypes, signal\nlibc = ctypes.CDLL(None)\n"
             "assert libc.syscall(56 if __import__('platform').machine() == 'x86_64' else 220, signal.SIGCHLD, 0, 0, 0,"
             " 0) >= 0",
    "clone3": "import ctypes\nassert ctypes.CDLL(None).syscall(435, ctypes.create_string_buffer(88), 88) >= 0",
    "daemon": "import os, time\nif os.fork() == 0:\n    os.setsid()\n    if os.fork() == 0:\n        time.sleep(60)",
    "leave the group": "import os; os.setsid()",
}


@pytest.mark.parametrize("kind", FORKS)
def test_no_process_is_made(kind, isolation):
    mark = f"sandbox-test-{os.getpid()}"
    outcome = run(f"# {mark}\n{FORKS[kind]}", isolation)
    assert outcome.status == "failed", outcome
    assert not children()


def children():
    """Processes below this one, however deep."""
    below, found = {os.getpid()}, []
    for _ in range(4):
        for path in Path("/proc").glob("[0-9]*/stat"):
            try:
                fields = path.read_text().rpartition(")")[2].split()
            except OSError:
                continue
            if int(fields[1]) in below and int(path.parent.name) not in below and fields[0] != "Z":
                below.add(int(path.parent.name))
                found.append((path.parent / "cmdline").read_text())
    return [command for command in found if "sandbox" in command or "-I" in command.split("\0")]


def test_no_network(isolation):
    with socket.socket() as listener, tempfile.TemporaryDirectory(dir="/tmp") as folder:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        listener.settimeout(0.2)
        port = listener.getsockname()[1]
        local = socket.socket(socket.AF_UNIX)
        local.bind(f"{folder}/s")
        local.listen()
        for program in (f"import socket; socket.create_connection(('127.0.0.1', {port}), 2)",
                        f"import urllib.request; urllib.request.urlopen('http://127.0.0.1:{port}', timeout=2)",
                        f"import socket; socket.socket(socket.AF_UNIX).connect({folder + '/s'!r})",
                        "import socket; socket.socket(socket.AF_INET, socket.SOCK_DGRAM)",
                        "import ctypes\nassert ctypes.CDLL(None).syscall(425, 8, bytes(120)) >= 0"):
            outcome = run(program, isolation)
            assert outcome.status == "failed", outcome
        with pytest.raises(TimeoutError):
            listener.accept()
        local.close()


def test_nothing_is_written_elsewhere(isolation, tmp_path):
    victim = tmp_path / "victim"
    victim.write_text("whole")
    victim.chmod(0o666)
    tmp_path.chmod(0o777)
    before = set(os.listdir(tempfile.gettempdir()))
    for program in (f"open({str(victim)!r}, 'w').write('broken')", f"import os; os.remove({str(victim)!r})",
                    f"import os; os.rename({str(victim)!r}, 'stolen')", f"import os; os.truncate({str(victim)!r}, 0)",
                    f"import os; os.chmod({str(victim)!r}, 0)", f"import os; os.utime({str(victim)!r}, (0, 0))",
                    f"import os; os.setxattr({str(victim)!r}, 'user.a', b'b')",
                    f"open({str(tmp_path / 'new')!r}, 'w')", f"import os; os.mkdir({str(tmp_path / 'new')!r})",
                    "open('/tmp/sandbox-test-new', 'w')", "open('/dev/shm/sandbox-test-new', 'w')",
                    f"import os; os.symlink({str(victim)!r}, 'link'); open('link', 'w')",
                    f"import os; os.chdir('..'); open({os.path.relpath(victim, tempfile.gettempdir())!r}, 'a')",
                    "import sys; open(sys.prefix + '/sandbox-test-new', 'w')"):
        outcome = run(program, isolation)
        assert outcome.status == "failed", (program, outcome)
        assert "PermissionError" in outcome.output or "Read-only file system" in outcome.output \
            or "cross-device" in outcome.output, (program, outcome.output)
    assert victim.read_text() == "whole" and os.listdir(tmp_path) == ["victim"]
    assert victim.stat().st_mode & 0o777 == 0o666 and victim.stat().st_mtime > 0 and not os.listxattr(victim)
    assert run("open('left', 'w').write('x' * 1000)", isolation).passed
    left = [name for name in set(os.listdir(tempfile.gettempdir())) - before if name.startswith("sandbox-")]
    assert not left and not Path("/dev/shm/sandbox-test-new").exists()


def test_nothing_is_learned(isolation, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    (tmp_path / "key").write_text("secret")
    outcome = run("import os; print(sorted(os.environ))", isolation)
    assert outcome.passed and set(eval(outcome.output)) <= {
        "HOME", "LANG", "LC_CTYPE", "OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "PATH", "PYTHONHASHSEED", "TMPDIR",
        "LD_LIBRARY_PATH"}
    for program in (f"print(open({str(tmp_path / 'key')!r}).read())",
                    f"import os; print(os.listdir({str(tmp_path)!r}))",
                    f"print(open('/proc/{os.getpid()}/environ').read())",
                    "import os; print(open(f'/proc/{os.getppid()}/environ').read())",
                    "print(open('/etc/passwd').read())", "import os; print(os.listdir(os.path.expanduser('~root')))"):
        outcome = run(program, isolation)
        assert outcome.status == "failed" and "secret" not in outcome.output, outcome
        assert "PermissionError" in outcome.output or "FileNotFoundError" in outcome.output, outcome
    # Open files of ours: none but what the program was handed.
    with open(tmp_path / "key") as held:
        os.set_inheritable(held.fileno(), True)
        outcome = run("import os\nfor number in range(3, 64):\n    try: print(number, os.read(number, 100))\n"
                      "    except OSError: pass", isolation)
        assert "secret" not in outcome.output


GUARD = ["unshare", "--user", "--map-root-user", "--mount", "--uts", "--ipc", "--net", "--pid", "--fork",
         "--kill-child"]
GUARDED = """
import dataclasses, json, os, subprocess, sys
from ctllm_jax.evaluation.code.sandbox import Limits, run_program
isolation, limits, programs = json.load(sys.stdin)
other = subprocess.Popen(["sleep", "60"])
programs = [program.replace("ME", str(os.getpid())).replace("OTHER", str(other.pid)) for program in programs]
outcomes = [dataclasses.asdict(run_program(program, limits=Limits(**limits), isolation=isolation))
            for program in programs]
alive = other.poll() is None
other.kill()
json.dump([outcomes, alive, os.uname().nodename], sys.stdout)
"""


def run_guarded(programs, isolation):
    """Outcomes of programs that would harm the machine if the sandbox failed: all in namespaces of the test's own.

    Returns (outcomes, whether another process of the same user lives, the host's name after them).
    """
    job = json.dumps([isolation, dataclasses.asdict(SHORT), programs])
    done = subprocess.run([*GUARD, sys.executable, "-c", GUARDED], input=job, capture_output=True, text=True)
    if done.returncode and "unshare" in done.stderr:
        pytest.skip("no user namespaces here, and nowhere else may this be tried")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_nobody_is_killed(isolation):
    programs = ["import os, signal; os.kill(os.getppid(), signal.SIGKILL)", "import os; os.kill(ME, 9)",
                "import os; os.kill(OTHER, 9)", "import os; os.kill(-1, 9)", "import os; os.killpg(0, 9)",
                "import signal; signal.pthread_kill(OTHER, 9)",
                "import os, signal; signal.pidfd_send_signal(os.pidfd_open(os.getppid()), signal.SIGKILL)",
                # A file that is ready sends a signal of the program's choice to a process of its choice.
                "import fcntl, socket\none, two = socket.socketpair()\nfcntl.fcntl(one, 10, 9)",
                "import fcntl, socket\none, two = socket.socketpair()\nfcntl.fcntl(one, fcntl.F_SETOWN, OTHER)"]
    outcomes, alive, _ = run_guarded(programs, isolation)
    assert alive
    for program, outcome in zip(programs, outcomes, strict=True):
        assert outcome["status"] == "failed", (program, outcome)


def test_rights_are_not_regained(isolation):
    """Arguments are wrong besides, so that the kernel would answer with another error than the filter's EPERM."""
    calls = ["unshare(0x10000000)", "setns(-1, 0)", "ptrace(99, 1, 0, 0)", "mount(0, 0, 0, 0, 0)", "umount2(0, 0)",
             "syscall(0x40000000 | 57)", "shmget(5, 0, 0)", "sethostname(0, -1)", "setdomainname(0, -1)", "chroot(0)",
             "clock_settime(999, bytes(16))", "swapon(0, 0)", "syscall(317, 99, 0, 0)", "acct(1)", "memfd_create(0, 0)",
             "capset(0, 0)", "setresuid(-2, -2, -2)", "prctl(1, 0)", "personality(8)", "socket(99, 0, 0)", "nice(-5)"]
    program = "import ctypes\nlibc = ctypes.CDLL(None, use_errno=True)\n" + "".join(
        f"print(libc.{call}, ctypes.get_errno())\n" for call in calls)
    [outcome], _, name = run_guarded([program], isolation)
    assert dict(zip(calls, outcome["output"].splitlines(), strict=True)) == dict.fromkeys(calls, "-1 1")
    assert name == os.uname().nodename


def test_no_capability_is_left(isolation):
    program = ("import ctypes\nlibc = ctypes.CDLL(None)\nheader = (ctypes.c_uint32 * 2)(0x20080522, 0)\n"
               "held = (ctypes.c_uint32 * 6)()\nassert libc.capget(header, held) == 0\n"
               "print(list(held), {libc.prctl(23, number, 0, 0, 0) for number in range(41)})")
    assert run(program, isolation).output == "[0, 0, 0, 0, 0, 0] {0}\n"


def test_no_datagram_reaches_a_socket_of_the_machine(isolation, tmp_path):
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listener:
        listener.bind(str(tmp_path / "log"))
        listener.setblocking(False)
        outcome = run("import socket\none, two = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)\n"
                      f"one.send(b'own'); assert two.recv(3) == b'own'\none.sendto(b'x', {str(tmp_path / 'log')!r})",
                      isolation)
        assert outcome.status == "failed" and "PermissionError" in outcome.output
        with pytest.raises(BlockingIOError):
            listener.recv(1)


@pytest.mark.parametrize("program", ["print(1)\nfor fd in range(3, 64):\n    try: os.write(fd, b'boo: no sandbox')\n"
                                     "    except OSError: pass\nos._exit(125)", "os.write(3, b'\\xff' * 5000)"])
def test_what_a_program_writes_to_the_sandbox_fails_it_alone(program, isolation):
    assert run(f"import os\n{program}", isolation).status in ("failed", "passed")


@pytest.mark.parametrize("program", [
    "while True: os.mkdir('d'); os.chdir('d')", "for n in range(10**9): os.mkdir(str(n), 0)",
    "os.closerange(0, 3)\nfor n in range(10**9): os.symlink('/', str(n))"])
def test_a_bomb_of_folders_is_stopped_and_removed(program, isolation, tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    outcome = run(f"import os\n{program}", isolation)
    assert outcome.status == ("too many files" if isolation == "landlock" else "failed"), outcome
    assert not list(tmp_path.iterdir())


def test_folders_of_any_depth_and_permissions_are_removed(tmp_path):
    top = tmp_path / "top"
    top.mkdir()
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "kept").write_text("")
    here = os.open(top, os.O_RDONLY)
    for _ in range(1200):  # deeper than Python recurses, and longer than a path may be
        os.mkdir("deep", dir_fd=here)
        below = os.open("deep", os.O_RDONLY, dir_fd=here)
        os.close(here)
        here = below
    os.symlink(outside, "link", dir_fd=here)
    os.mkdir("closed", 0, dir_fd=here)
    os.close(here)
    for number in range(50):
        (top / f"{number}").mkdir()
        (top / f"{number}" / "file").write_text("")
        (top / f"{number}").chmod(0)
    sandbox.remove_folder(str(top))
    assert not top.exists() and (outside / "kept").exists()


def test_many_at_once_in_their_order():
    programs = [f"assert {number} % 3" for number in range(12)]
    outcomes = run_programs(programs, workers=4)
    assert [outcome.passed for outcome in outcomes] == [bool(number % 3) for number in range(12)]


def test_the_program_ends_with_us(tmp_path):
    # The process that waits for it is killed: nothing of the sandbox may stay.
    program = ("from ctllm_jax.evaluation.code.sandbox import *\nfind_isolation(); print('ready', flush=True)\n"
               "run_program('import time; time.sleep(970)', limits=Limits(wall_seconds=900))")
    waiting = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE,
                               env={**os.environ, "TMPDIR": str(tmp_path)})
    assert waiting.stdout.readline() == b"ready\n"
    deadline = time.monotonic() + 120
    while not (inside := [path for path in Path("/proc").glob("[0-9]*/cmdline") if b"sandbox_child" in read(path)]):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    time.sleep(0.5)
    waiting.kill()
    waiting.wait()
    waiting.stdout.close()
    while any(b"sandbox_child" in read(path) for path in inside):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def read(path):
    try:
        return path.read_bytes()
    except OSError:
        return b""


def test_where_there_is_no_sandbox_nothing_runs(monkeypatch):
    def fail(program, **options):
        raise RuntimeError(f"the sandbox ({options['isolation']}) does not work here: unshare: Operation not permitted")

    monkeypatch.setattr(sandbox, "run_program", fail)
    sandbox.find_isolation.cache_clear()
    try:
        with pytest.raises(UserError, match=r"namespaces\) does not work here: unshare.*landlock\) does not work"):
            run_programs(["print(1)"])
    finally:
        sandbox.find_isolation.cache_clear()
