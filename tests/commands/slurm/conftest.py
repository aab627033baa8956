"""A real SLURM of this machine alone, where its packages are installed: slurmctld, slurmd and munge."""

import os
import platform
import shutil
import socket
import subprocess
import time

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


def free_ports(count):
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


@pytest.fixture(scope="session")
def slurm(tmp_path_factory):
    """Start SLURM with two cores, and yield the environment that its commands need; skip where it is not installed."""
    programs = [shutil.which(name) for name in ("slurmctld", "slurmd", "munged")]
    if os.geteuid() != 0 or None in programs:
        pytest.skip("SLURM is not installed here: apt-get install slurm-wlm munge")
    folder = tmp_path_factory.mktemp("slurm")
    for trusted in (folder, *folder.parents[:2]):
        trusted.chmod(0o755)  # munge and SLURM trust no folder that others can write to
    (folder / "state").mkdir()
    (folder / "spool").mkdir()
    config = folder / "slurm.conf"
    config.write_text(CONFIG.format(host=platform.node(), folder=folder, ports=free_ports(2)))
    key = folder / "munge.key"
    key.write_bytes(os.urandom(128))
    key.chmod(0o400)
    own = {name: value for name, value in os.environ.items() if not name.startswith("SLURM")}
    environment = own | {"SLURM_CONF": str(config)}
    munged = [
        "munged",
        "--foreground",
        "--force",
        f"--key-file={key}",
        f"--socket={folder}/munge.socket",
        f"--log-file={folder}/munged.log",
        f"--pid-file={folder}/munged.pid",
        f"--seed-file={folder}/munge.seed",
    ]
    processes = []
    try:
        for command in (munged, ["slurmctld", "-D", "-i"], ["slurmd", "-D"]):
            null = subprocess.DEVNULL
            processes.append(subprocess.Popen(command, env=environment, stdout=null, stderr=null))
            time.sleep(1)
        deadline = time.monotonic() + 60
        ask = ["sinfo", "-h", "-o", "%T"]
        state = ""
        while state != "idle":
            logs = "\n".join(path.read_text()[-1000:] for path in folder.glob("*.log"))
            assert time.monotonic() < deadline, f"SLURM did not start:\n{logs}"
            time.sleep(0.5)
            done = subprocess.run(ask, env=environment, capture_output=True, text=True, check=False)
            state = done.stdout.strip()
        yield environment
    finally:
        cancel = ["scancel", "--user=root"]
        subprocess.run(cancel, env=environment, capture_output=True, check=False, timeout=30)
        for process in reversed(processes):
            process.terminate()
        for process in processes:
            process.wait(30)
