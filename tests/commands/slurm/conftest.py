"""A real SLURM of this machine alone, where its packages are installed: slurmctld, slurmd and munge."""

import os
import platform
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator

import pytest

CONFIG = """
ClusterName=coin
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
MpiDefault=none
SlurmctldPort={ports[0]}
SlurmdPort={ports[1]}
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
ReturnToService=2
JobAcctGatherType=jobacct_gather/none
NodeName={host} NodeAddr=127.0.0.1 CPUs=2 State=UNKNOWN
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


def free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for each in sockets:
        each.bind(("127.0.0.1", 0))
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


@pytest.fixture(scope="session")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """Start SLURM with two cores, and yield the environment that its commands need; skip where it is not installed."""
    if os.geteuid() != 0 or not all(
        shutil.which(name) for name in ("slurmctld", "slurmd", "munged")
    ):
        pytest.skip("SLURM is not installed here: apt-get install slurm-wlm munge")
    folder = tmp_path_factory.mktemp("slurm")
    folder.chmod(0o755)
    for parent in (folder.parent, folder.parent.parent):
        parent.chmod(0o755)  # munge and SLURM trust no folder that others can write to
    (folder / "state").mkdir()
    (folder / "spool").mkdir()
    config = folder / "slurm.conf"
    config.write_text(CONFIG.format(host=platform.node(), folder=folder, ports=free_ports(2)))
    key = folder / "munge.key"
    key.write_bytes(os.urandom(128))
    key.chmod(0o400)
    environment = {
        name: value for name, value in os.environ.items() if not name.startswith("SLURM")
    }
    environment["SLURM_CONF"] = str(config)
    munged = [
        "munged",
        "--foreground",
        "--force",
        f"--key-file={key}",
        f"--socket={folder}/munge.socket",
    ]
    munged += [
        f"--log-file={folder}/munged.log",
        f"--pid-file={folder}/munged.pid",
        f"--seed-file={folder}/munge.seed",
    ]
    commands = [munged, ["slurmctld", "-D", "-i"], ["slurmd", "-D"]]
    processes = []
    try:
        for command in commands:
            quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
            processes.append(subprocess.Popen(command, env=environment, **quiet))  # type: ignore[call-overload]
            time.sleep(1)
        deadline = time.monotonic() + 60
        idle = ["sinfo", "-h", "-o", "%T"]
        while (
            subprocess.run(
                idle, env=environment, capture_output=True, text=True, check=False
            ).stdout.strip()
            != "idle"
        ):
            logs = "\n".join(path.read_text()[-1000:] for path in folder.glob("*.log"))
            assert time.monotonic() < deadline, f"SLURM did not start:\n{logs}"
            time.sleep(0.5)
        yield environment
    finally:
        subprocess.run(
            ["scancel", "--user=root"],
            env=environment,
            capture_output=True,
            check=False,
            timeout=30,
        )
        for process in reversed(processes):
            process.terminate()
        for process in processes:
            process.wait(30)
