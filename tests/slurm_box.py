"""A real SLURM on this machine: a controller and two virtual nodes, n1 and n2, of four CPUs each; and
a partition of nodes with GPUs that are down, to ask for. Needs Debian's packages slurm-wlm and munge; any
user can start it."""

import getpass
import os
import shutil
import signal
import socket
import subprocess
import time
from pathlib import Path

from prepretrain.distributed import ports

CONF = """ClusterName=box
# the port where processes meet follows from it, and another box may be on this machine
FirstJobId={first}
SlurmctldHost={host}(127.0.0.1)
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
CredType=cred/munge
# cred_expire is also how long a requeued job waits before it starts again; below 10 it is 120
AuthInfo=socket={place}/run/munge.sock,cred_expire=10
StateSaveLocation={place}/state
SlurmdSpoolDir={place}/spool-%n
SlurmctldPidFile={place}/run/slurmctld.pid
SlurmdPidFile={place}/run/slurmd-%n.pid
SlurmctldLogFile={place}/log/slurmctld.log
SlurmdLogFile={place}/log/slurmd-%n.log
SlurmctldPort={port}
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=sched_min_interval=1,bf_interval=1,batch_sched_delay=0
{preemption}PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
JobCompType=jobcomp/none
JobRequeue=1
ReturnToService=2
KillWait=5
MinJobAge=86400
SlurmctldTimeout=30
SlurmdTimeout=30
MailProg=/bin/true
GresTypes=gpu
SlurmdParameters=config_overrides
"""
NODE = (
    "NodeName={name} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs=4 Boards=1 "
    "SocketsPerBoard=1 CoresPerSocket=4 ThreadsPerCore=1 RealMemory=8000 {more}\n"
)
PARTITIONS = """PartitionName=debug Nodes=n1,n2 Default=YES MaxTime=INFINITE State=UP PriorityTier=1 PreemptMode=REQUEUE GraceTime=30
PartitionName=urgent Nodes=n1,n2 MaxTime=INFINITE State=UP PriorityTier=10 PreemptMode=OFF
PartitionName=gpu Nodes=g1,g2 MaxTime=INFINITE State=UP
"""
DAEMONS = ("slurmd-n1", "slurmd-n2", "slurmctld", "munged")


class Box:
    """Started where `folder` is; `environment` is what its clients need."""

    def __init__(self, folder: Path, *, user_signal: bool = True):
        """user_signal: a job that is preempted gets the signal that it asked for, else SIGTERM."""
        self.folder, found = folder, set()
        while len(found) < 5:
            found.add(ports.free())
        controller, *nodes = found
        for name in ("state", "spool-n1", "spool-n2", "log", "run"):
            (folder / name).mkdir(parents=True, exist_ok=True)
        for place in (folder, folder / "run"):
            place.chmod(0o755)  # munged refuses a socket that others cannot reach
        (folder / "log").chmod(0o700)
        key = folder / "munge.key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o600)
        host = socket.gethostname().partition(".")[0]
        asked = "SlurmctldParameters=preempt_send_user_signal\n" if user_signal else ""
        text = CONF.format(
            first=1000 + int.from_bytes(os.urandom(3), "big"),
            host=host,
            user=getpass.getuser(),
            place=folder,
            port=controller,
            preemption=asked,
        )
        # A job on a pretended GPU that loses its node leaves it in use for ever ("dealloc of node n1 bad
        # node_offset", SLURM 22.05), and later jobs wait for it: those with GPUs are never up.
        for name, port in zip(("n1", "n2", "g1", "g2"), nodes, strict=True):
            more = "State=UNKNOWN" if name[0] == "n" else "Gres=gpu:2 State=DOWN"
            text += NODE.format(name=name, host=host, port=port, more=more)
        (folder / "slurm.conf").write_text(text + PARTITIONS)
        self.environment = {"SLURM_CONF": str(folder / "slurm.conf"), "MASTER_ADDR": "127.0.0.1"}

    def start(self) -> None:
        """Returns when both nodes wait for jobs."""
        run, log = self.folder / "run", self.folder / "log"
        self._run(
            "munged",
            f"--key-file={self.folder}/munge.key",
            f"--socket={run}/munge.sock",
            f"--pid-file={run}/munged.pid",
            f"--log-file={log}/munged.log",
            f"--seed-file={run}/munged.seed",
        )
        self._run("slurmctld", "-c")
        for name in ("n1", "n2"):
            self.start_node(name)
        self.wait_idle()

    def start_node(self, name: str, *inside: str) -> None:
        """A node's daemon, by itself or run by the command `inside`."""
        self._run(*inside, "slurmd", "-N", name)

    def wait_idle(self, seconds: float = 200) -> None:
        """Until both nodes wait for jobs."""
        end = time.time() + seconds
        while self.ask("sinfo", "-h", "-N", "-p", "debug", "-t", "idle", "-o", "%N").split() != [
            "n1",
            "n2",
        ]:
            if time.time() > end:
                raise RuntimeError(f"the nodes do not come up: {self.ask('sinfo')}")
            time.sleep(0.1)

    def kill_node(self, name: str) -> None:
        """As if its plug were pulled: its daemon and all that it started, at once."""
        pid = int((self.folder / "run" / f"slurmd-{name}.pid").read_text())
        for one in [pid, *self._steps(name)]:
            try:
                os.kill(one, signal.SIGKILL)
            except ProcessLookupError:
                pass

    def _steps(self, name: str) -> list[int]:
        """Processes that a node started: the daemons of its steps, and those whose environment says
        so."""
        mark, found = f"SLURMD_NODENAME={name}\0".encode(), []
        conf = f"SLURM_CONF={self.folder}/slurm.conf\0".encode()
        for path in Path("/proc").glob("[0-9]*/environ"):
            try:
                text = path.read_bytes() + b"\0"
            except OSError:
                continue
            if mark in text and conf in text:
                found.append(int(path.parts[2]))
        return found

    def ask(self, *command: str) -> str:
        """What a client's command prints. Raises CalledProcessError with its status."""
        return self._run(*command).stdout.strip()

    def _run(self, *command: str) -> subprocess.CompletedProcess:
        place = f"{os.environ['PATH']}:/usr/sbin:/sbin"
        environment = {**os.environ, **self.environment, "PATH": place}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=100)
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)}: {done.stderr or done.stdout}")
        return done

    def stop(self) -> None:
        """Ends all jobs and daemons."""
        try:
            self.ask("scancel", "--user", getpass.getuser())
        except RuntimeError:
            pass
        for name in DAEMONS:
            path = self.folder / "run" / f"{name}.pid"
            if path.exists():
                _end(int(path.read_text()))
        for name in ("n1", "n2"):
            for pid in self._steps(name):
                _end(pid)


def _end(pid: int) -> None:
    for number in (signal.SIGTERM, signal.SIGKILL):
        for _ in range(15):
            try:
                os.kill(pid, number)
            except ProcessLookupError:
                return
            time.sleep(0.1)


def missing() -> str | None:
    """What keeps a box from starting here."""
    path = f"{os.environ['PATH']}:/usr/sbin:/sbin"
    lacking = [
        name for name in ("slurmctld", "slurmd", "munged") if not shutil.which(name, path=path)
    ]
    return f"no {', '.join(lacking)}: apt install slurm-wlm munge" if lacking else None
