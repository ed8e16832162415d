"""A real Slurm of one node, started in a folder of its own: munged, slurmctld, slurmd; no service, no accounting."""

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "squeue", "scancel", "scontrol")
CONFIG = """\
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.sock,cred_expire=5
CommunicationParameters=NoCtldInAddrAny,NoInAddrAny
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=batch_sched_delay=0,sched_min_interval=200000,bf_interval=2
ReturnToService=2
MpiDefault=none
KillWait=3
SlurmdTimeout=5
InactiveLimit=0
MinJobAge=300
SlurmctldPort={ctld}
SlurmdPort={slurmd}
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
NodeName={host} NodeAddr=127.0.0.1 CPUs=2 RealMemory=1000
PartitionName=p Nodes=ALL Default=YES MaxTime=60 State=UP
"""


def missing() -> str | None:
    """Return why no Slurm can be started here, None where one can."""
    paths = os.environ["PATH"] + ":/usr/sbin:/sbin"
    lacking = [name for name in PROGRAMS if shutil.which(name, path=paths) is None]
    if lacking:
        return f"no Slurm here ({', '.join(lacking)} missing): sh scripts/slurm/install.sh"
    return None if os.geteuid() == 0 else "a Slurm of one's own is started by root only"


@dataclass
class Cluster:
    """The running programs; `environment` is what clients need."""

    folder: Path
    processes: dict[str, subprocess.Popen] = field(default_factory=dict)

    @property
    def environment(self) -> dict[str, str]:
        return {"SLURM_CONF": str(self.folder / "slurm.conf"), "PATH": f"{os.environ['PATH']}:/usr/sbin:/sbin"}

    def start(self, name: str, *words: str) -> None:
        with open(self.folder / f"{name}.out", "ab") as out:
            self.processes[name] = subprocess.Popen(
                [name, *words],
                env=os.environ | self.environment,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
            )

    def start_node(self) -> None:
        """Start slurmd, and wait until the node takes jobs."""
        self.start("slurmd", "-D", "-c")
        self.until(lambda: self.ask("sinfo", "-h", "-o", "%T").strip() in ("idle", "mixed", "allocated"))

    def kill_node(self) -> None:
        """Kill slurmd and all that it has started, as a power cut would."""
        daemon = self.processes["slurmd"]
        steps = self.steps()
        daemon.kill()
        daemon.wait()
        for pid in steps:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def steps(self) -> list[int]:
        """Return slurmstepd's processes of this cluster, and all below them."""
        import psutil

        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                if process.name() == "slurmstepd" and str(self.folder) in process.environ().get("SLURM_CONF", ""):
                    found += [process.pid, *(child.pid for child in process.children(recursive=True))]
        return found

    def run(self, *command: str) -> subprocess.CompletedProcess:
        return subprocess.run(command, env=os.environ | self.environment, capture_output=True, text=True, timeout=60)

    def ask(self, *command: str) -> str:
        """Return what a Slurm command prints."""
        done = self.run(*command)
        assert done.returncode == 0, f"{command}: {done.returncode}: {done.stdout} {done.stderr}"
        return done.stdout

    def until(self, holds, *, seconds: float = 300.0, every_s: float = 0.2) -> None:
        """Wait until `holds()` is true."""
        deadline = time.monotonic() + seconds
        while not holds():
            assert time.monotonic() < deadline, self.state()
            time.sleep(every_s)

    def state(self) -> str:
        return self.ask("squeue", "-t", "all", "-r") + self.ask("sinfo")


@contextlib.contextmanager
def running(folder: Path) -> Iterator[Cluster]:
    """Run a cluster in the folder; at the end nothing of it is left."""
    folder.mkdir()
    (folder / "state").mkdir()
    (folder / "spool").mkdir()
    host = socket.gethostname().partition(".")[0]
    ctld, slurmd = free_ports(2)
    (folder / "slurm.conf").write_text(CONFIG.format(folder=folder, host=host, ctld=ctld, slurmd=slurmd))
    (folder / "key").write_bytes(os.urandom(1024))
    (folder / "key").chmod(0o400)
    cluster = Cluster(folder)
    files = {"key-file": "key", "socket": "munge.sock", "pid-file": "munged.pid", "log-file": "munged.log"}
    files["seed-file"] = "seed"
    try:
        cluster.start("munged", "-F", "--force", *(f"--{name}={folder / file}" for name, file in files.items()))
        cluster.until((folder / "munge.sock").exists)
        cluster.start("slurmctld", "-D", "-c")
        cluster.until(lambda: _answers(cluster))
        cluster.start_node()
        yield cluster
    finally:
        with contextlib.suppress(Exception):
            cluster.ask("scancel", "--user=root")
            cluster.until(lambda: not cluster.steps(), seconds=20)
        for pid in cluster.steps():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        for process in reversed(cluster.processes.values()):
            process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(10)
            process.kill()


def _answers(cluster: Cluster) -> bool:
    done = subprocess.run(["scontrol", "ping"], env=os.environ | cluster.environment, capture_output=True, text=True)
    return "UP" in done.stdout


def free_ports(number: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(number)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]
