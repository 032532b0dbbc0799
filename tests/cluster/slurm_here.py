"""A SLURM of two virtual nodes on this machine, without systemd: munged, slurmctld and two slurmd in one folder."""

import os
import shutil
import socket
import subprocess
import time
from pathlib import Path

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol")
SEARCHED = os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/sbin"])


def missing():
    """What keeps a SLURM from running here, in words; empty if nothing does."""
    absent = [name for name in PROGRAMS if shutil.which(name, path=SEARCHED) is None]
    if absent:
        return f"not installed: {', '.join(absent)}"
    if subprocess.run(["unshare", "--mount", "true"], capture_output=True).returncode:
        return "slurmd needs root, and its nodes a mount of their own"
    return ""


class Slurm:
    """The daemons, from `with` to its end; the nodes are n1 and n2."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.environment = {**os.environ, "SLURM_CONF": str(folder / "slurm.conf"), "PATH": SEARCHED}
        self._daemons = []

    def __enter__(self):
        try:
            self._begin()
        except BaseException:
            self.__exit__()
            raise
        return self

    def _begin(self):
        folder, host = self.folder, socket.gethostname().split(".")[0]
        ports = free_ports(3)
        for name in ("state", "dn1", "dn2"):
            (folder / name).mkdir()
        folder.chmod(0o755)  # munged wants its socket to be reached by all
        key = folder / "munge.key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o400)
        socket_path = folder / "munge.socket"
        shared = f"NodeAddr=127.0.0.1 CPUs={os.cpu_count()} RealMemory=1000 State=UNKNOWN"
        (folder / "slurm.conf").write_text(f"""\
ClusterName=here
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={socket_path},cred_expire=5
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/d%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdParameters=config_overrides
ReturnToService=2
SchedulerParameters=batch_sched_delay=0
MpiDefault=none
KillWait=60
NodeName=n1 NodeHostname={host} Port={ports[1]} {shared}
NodeName=n2 NodeHostname={host} Port={ports[2]} {shared}
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP
""")
        self._start("munged", "--foreground", "--force", f"--socket={socket_path}", f"--key-file={key}",
                    f"--pid-file={folder}/munged.pid", f"--log-file={folder}/munged.log",
                    f"--seed-file={folder}/munge.seed")
        self.wait_for(socket_path.exists, "munged to listen")
        self._start("slurmctld", "-D", "-i", "-c")
        # The nodes' names are known where they run, and nowhere else: a mount of their own over /etc/hosts.
        (folder / "hosts").write_text(Path("/etc/hosts").read_text() + "127.0.0.1 n1 n2\n")
        for node in ("n1", "n2"):
            self._start("unshare", "--mount", "bash", "-c", 'mount --bind "$0" /etc/hosts && exec slurmd -D -c -N "$1"',
                        folder / "hosts", node)
        self.wait_for(lambda: self.call("sinfo", "-h", "-o", "%t", check=False).split() == ["idle"], "idle nodes")

    def __exit__(self, *exception):
        self.call("scancel", "--user=root", "--signal=KILL", check=False)
        for process in reversed(self._daemons):
            process.terminate()
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

    def call(self, *words, check=True, **options):
        """What a command of SLURM prints."""
        done = subprocess.run([shutil.which(words[0], path=SEARCHED), *map(str, words[1:])], env=self.environment,
                              capture_output=True, text=True, timeout=60, **options)
        assert not check or done.returncode == 0, (words, done.stdout, done.stderr)
        return done.stdout.strip()

    def state(self, job):
        """RUNNING, PENDING, COMPLETED, FAILED …, and the exit status."""
        shown = dict(word.partition("=")[::2] for word in self.call("scontrol", "show", "job", "-o", job).split())
        return shown["JobState"], int(shown["ExitCode"].partition(":")[0]), int(shown["Restarts"])

    def wait_for(self, condition, what, *, seconds=60):
        """Until `condition()`."""
        until = time.monotonic() + seconds
        while not condition():
            assert all(process.poll() is None for process in self._daemons), self.logs()
            assert time.monotonic() < until, f"waited {seconds} s for {what}\n{self.logs()}"
            time.sleep(0.2)

    def logs(self):
        """The last lines of every daemon."""
        return "\n".join(f"== {path.name}\n{path.read_text()[-2000:]}" for path in sorted(self.folder.glob("*.log")))

    def _start(self, name, *options):
        with open(self.folder / f"{name}.out.log", "ab") as output:
            self._daemons.append(subprocess.Popen([shutil.which(name, path=SEARCHED), *options], env=self.environment,
                                                  stdout=output, stderr=output, start_new_session=True))


def free_ports(count):
    """Ports that nobody listens on."""
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports
