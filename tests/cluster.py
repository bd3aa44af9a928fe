"""The private cluster of slurm/lab, and the command line of a driver on it. For what runs searches on a real Slurm."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from searches import Setup

TESTS = Path(__file__).parent
REPOSITORY = TESTS.parent
NEEDED = ("slurmctld", "slurmd", "slurmdbd", "munged", "mariadbd")
MISSING = [name for name in NEEDED if shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin:/sbin") is None]

LIGHT = ("probe=false", "retries=3")


class Lab:
    """The private cluster."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        with socket.socket() as probe:  # a free range of ports, most likely
            probe.bind(("127.0.0.1", 0))
            self.port = 20000 + probe.getsockname()[1] % 10000
        self.start()

    def start(self) -> None:
        """Start it, or what of it has died."""
        command = [sys.executable, REPOSITORY / "slurm/lab/lab.py", "start", self.folder, "--port", str(self.port)]
        subprocess.run(command, check=True, capture_output=True, timeout=120)

    def stop(self) -> None:
        command = [sys.executable, REPOSITORY / "slurm/lab/lab.py", "stop", self.folder, "--purge"]
        subprocess.run(command, check=True, timeout=120)

    def kill(self, daemon: str) -> None:
        os.kill(int((self.folder / "run" / f"{daemon}.pid").read_text().split()[0]), signal.SIGKILL)

    def processes(self) -> dict[int, tuple[str, str]]:
        """What its jobs have running, as process id: (program, node)."""
        found = {}
        mark = f"SLURM_CONF={self.folder}/etc/slurm.conf".encode()
        for entry in Path("/proc").iterdir():
            with suppress(OSError):  # it has ended, or is another user's
                variables = (entry / "environ").read_bytes().split(b"\0") if entry.name.isdigit() else []
                nodes = [value for name, _, value in (line.partition(b"=") for line in variables) if name == b"SLURMD_NODENAME"]
                if mark in variables and nodes and b"SLURM_JOB_ID=" in b"\0".join(variables):
                    found[int(entry.name)] = ((entry / "comm").read_text().strip(), nodes[0].decode())
        return found


def call(*words: str) -> str:
    """A command of Slurm; some need to be tried again while the controller is busy."""
    for _ in range(20):
        done = subprocess.run(words, capture_output=True, text=True, timeout=60)
        if done.returncode == 0:
            return done.stdout.strip()
        time.sleep(0.5)
    raise AssertionError(f"{words}: {done.stderr}")


def wait_for(what: Callable[[], Any], seconds: float = 90) -> Any:
    end = time.monotonic() + seconds
    while not (found := what()):
        if time.monotonic() > end:
            raise AssertionError(f"it did not happen\n{call('squeue', '-a')}\n{call('sinfo')}")
        time.sleep(0.1)
    return found


@contextmanager
def private_cluster() -> Iterator[Lab]:
    # A short path in memory: sockets lie there, and the disk of a busy machine is slow.
    parent = Path("/dev/shm") if os.access("/dev/shm", os.W_OK) else Path("/tmp")
    lab = Lab(parent / f"hpcc-{os.getpid()}")
    os.environ["SLURM_CONF"] = str(lab.folder / "etc" / "slurm.conf")
    try:
        yield lab
    finally:
        del os.environ["SLURM_CONF"]
        lab.stop()


def command(setup: Setup, *more: str) -> list[str]:
    lines = f'["export PYTHONPATH={REPOSITORY}:{TESTS}"]'
    own = ["launcher=slurm", "cluster=lab", "cluster.mem_gb=0.5", f"cluster.setup={lines}", "+launcher.worker=light.run"]
    own += [
        "cluster.gpus_per_node=0",
        "launcher.poll_seconds=0.3",
        "launcher.settle_seconds=2",
        "launcher.lost_seconds=6",
        *LIGHT,
    ]
    return [sys.executable, "-m", "hpc_compress.cli", "search", *setup.overrides, *own, *more]
