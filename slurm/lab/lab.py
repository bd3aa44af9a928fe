#!/usr/bin/env python3
"""Start and stop a private Slurm cluster of simulated nodes on this host, for development and tests.

It is the real Slurm, not an imitation: one munged, one MariaDB with slurmdbd for accounting, one slurmctld, and a slurmd
for each node, which all believe that they have more processors than the host, and GPUs where there are none. What it
can't show is speed and isolation: all nodes share the host's processors, memory, /tmp and name (`SLURMD_NODENAME` tells
them apart), and CPUs and GPUs are counted but not fenced off.

A lab is a folder:

    env                 to be sourced: SLURM_CONF, by which sbatch, squeue, sacct and submitit find this cluster
    etc/                lab.json with the settings, and what was made of the templates beside this script
    run/DAEMON.pid      process id and birth of munged, mariadbd, slurmdbd, slurmctld, slurmd-n1, slurmd-n2 ...
    log/DAEMON.out      what the daemon has said since it was last started; Slurm's keep all of it in DAEMON.log
    state/ db/ dev/     memory of the daemons, database, GPU devices

Nothing is written elsewhere, and nothing is asked of systemd, cgroups or a network other than 127.0.0.1.

This script knows Slurm and Linux' /proc. It knows nothing of hpc_compress and needs only Python's standard library.
"""

import argparse
import contextlib
import fcntl
import json
import os
import pwd
import re
import shlex
import shutil
import signal
import socket
import string
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

TEMPLATES = Path(__file__).absolute().parent
SYSTEM_PATH = ":/usr/sbin:/sbin"  # the daemons lie where a plain user's shell does not look
DAEMONS = ("munged", "mariadbd", "slurmdbd", "slurmctld", "slurmd")
PROGRAMS = (*DAEMONS, "mariadb-install-db", "sacctmgr", "sinfo", "squeue", "scancel")
INSTALL = "apt-get install --no-install-recommends slurm-wlm munge slurmdbd slurm-wlm-mysql-plugin mariadb-server"
LONGEST_FOLDER = 64  # a socket's path has at most 107 characters, and slurmstepd's name below FOLDER takes up to 40

HELP = """Start and stop a private Slurm cluster of simulated nodes with fake GPUs on this host.

  python lab.py start                      # 4 nodes of 8 CPUs and 2 GPUs each, in /tmp/hpc_compress_lab
  source /tmp/hpc_compress_lab/env         # from here on, Slurm's commands mean this cluster
  sbatch --array=0-7 --wrap 'srun hostname'
  python lab.py stop --purge

Runs as root or as a plain user; jobs run as that user. A folder on /dev/shm is fastest. To run several labs side by
side, give each its own folder and --port."""

RECIPES = """How to make things go wrong, so that a test can see what becomes of them (after `source FOLDER/env`):

  a task dies                 kill -9 its process; or let it use more than its --mem (FAILED; OUT_OF_MEMORY needs cgroups)
  the time limit              sbatch --time=1; Slurm looks every 30 s, so it takes 60 to 95 s
  preemption                  sbatch -p urgent -w n1 --gres=gpu:a100:2 ...  (requeues main's jobs after 5 to 15 s;
                              one that ends by itself after the first 5 s shows as TIMEOUT)
  a node is taken away        scontrol update nodename=n1 state=down reason=test      and later state=resume
  a node falls silent         kill -9 $(cut -d' ' -f1 FOLDER/run/slurmd-n1.pid); NODE_FAIL in 15 to 30 s. The
                              task's process lives on, so a requeued task runs twice
  controller or accounting    kill -9 $(cut -d' ' -f1 FOLDER/run/slurmctld.pid), or slurmdbd.pid. A job submitted in
  is gone                     the last seconds before that is forgotten, and its id given away again
  suspension                  scontrol suspend JOB        scontrol resume JOB
  submissions are refused     sacctmgr -i modify qos normal set MaxSubmitJobsPerUser=5       (-1 lifts the limit)

`start` with the same folder brings back what was killed, and touches nothing that is alive. A requeued job waits 15 s
(120 s on most clusters); `scontrol update jobid=JOB starttime=now` ends the wait. `sacct` may trail by some seconds."""


class UsageError(Exception):
    """What the caller can put right: exit status 2."""


class DaemonError(Exception):
    """What went wrong in a daemon: exit status 1."""


@dataclass(frozen=True)
class Lab:
    """The settings of one cluster, as kept in FOLDER/etc/lab.json. Ports follow from the first one."""

    folder: Path
    first_job_id: int
    nodes: int = 4
    cpus: int = 8  # of each node
    gpus: int = 2  # of each node
    memory_mb: int = 8192  # of each node
    port: int = 17000  # the controller's; accounting takes the next, and the nodes those from port + 11 on
    max_array: int = 1001  # largest index of an array job, plus one

    @property
    def daemons(self) -> list[str]:
        return ["munged", "mariadbd", "slurmdbd", "slurmctld", *(f"slurmd-{node}" for node in self.node_names)]

    @property
    def node_names(self) -> list[str]:
        return [f"n{number}" for number in range(1, self.nodes + 1)]

    @property
    def ports(self) -> dict[str, int]:
        nodes = {f"slurmd-{node}": self.port + 10 + number for number, node in enumerate(self.node_names, 1)}
        return {"slurmctld": self.port, "slurmdbd": self.port + 1, **nodes}

    @property
    def conf(self) -> Path:
        return self.folder / "etc" / "slurm.conf"

    @property
    def database_socket(self) -> Path:
        return self.folder / "run" / "mariadb.socket"

    @property
    def munge_socket(self) -> Path:
        return self.folder / "run" / "munge.socket"

    def pid_file(self, daemon: str) -> Path:
        return self.folder / "run" / f"{daemon}.pid"

    def environment(self) -> dict[str, str]:
        """Ours without what another cluster or an enclosing job has left in it."""
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM", "SBATCH_", "SRUN_"))}
        path = os.environ.get("PATH", os.defpath) + SYSTEM_PATH
        return {**kept, "PATH": path, "SLURM_CONF": str(self.conf), "MYSQL_UNIX_PORT": str(self.database_socket)}


def main() -> None:
    arguments = _parser().parse_args()
    try:
        arguments.action(arguments)
    except (UsageError, DaemonError) as error:
        print(f"lab: {error}", file=sys.stderr)
        sys.exit(2 if isinstance(error, UsageError) else 1)


def _parser() -> argparse.ArgumentParser:
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="lab.py", description=HELP, epilog=RECIPES, formatter_class=form)
    commands = parser.add_subparsers(required=True, metavar="start | stop")
    start_ = commands.add_parser(
        "start",
        help="start a lab, or revive what has died in it",
        description="Start a lab, or revive what has died in it. The folder remembers the options; change them after a stop.",
    )
    start_.set_defaults(action=_start)
    _add_folder(start_)
    for name, meaning in {
        "nodes": "how many nodes, n1, n2 ...",
        "cpus": "CPUs of each node; the host may have fewer",
        "gpus": "fake GPUs of each node, at least 1: --gres=gpu:a100:1",
        "memory_mb": "memory of each node in MB, divided by its CPUs where a job gives no --mem",
        "port": "first port on 127.0.0.1; the lab uses this one, the next, and from PORT+11 on one for each node",
        "max_array": "MaxArraySize, the largest array index plus one",
    }.items():
        flag, default = "--" + name.removesuffix("_mb").replace("_", "-"), getattr(Lab, name)
        start_.add_argument(flag, dest=name, type=int, metavar="N", help=f"{meaning} (default {default})")
    stop_ = commands.add_parser(
        "stop",
        help="end a lab with its jobs",
        description="Cancel the jobs of a lab, end its daemons and what its jobs have left running. Other labs go on.",
    )
    stop_.set_defaults(action=_stop)
    _add_folder(stop_)
    stop_.add_argument("--purge", action="store_true", help="delete the folder too: accounting, job ids and all")
    return parser


def _add_folder(parser: argparse.ArgumentParser) -> None:
    default = Path("/tmp/hpc_compress_lab")
    parser.add_argument("folder", nargs="?", type=Path, default=default, help=f"where the lab lives (default {default})")


# --- start ---


def _start(arguments: argparse.Namespace) -> None:
    began = time.monotonic()
    _refuse_missing_programs()
    folder = _checked_folder(arguments.folder)
    names = ("nodes", "cpus", "gpus", "memory_mb", "port", "max_array")
    wishes = {name: getattr(arguments, name) for name in names if getattr(arguments, name) is not None}
    _make_folder(folder)
    with _locked(folder):
        lab = _settled(folder, wishes)
        _write_files(lab)
        dead = [name for name in lab.daemons if _pid(lab, name) is None]
        _launch(lab, dead)
    print(f"lab: started {' '.join(dead)}" if dead else "lab: every daemon was alive")
    print(f"lab: {lab.nodes} nodes after {time.monotonic() - began:.1f} s ready; source {folder}/env")


def _launch(lab: Lab, dead: list[str]) -> None:
    """Each daemon needs those before it, so each must answer before the next one starts. The nodes start together."""
    for name in dead:
        lab.pid_file(name).unlink(missing_ok=True)
        if (port := lab.ports.get(name)) and _taken(port):
            raise UsageError(f"port {port} of {name} is taken; give another --port (it is {lab.port} in {lab.folder})")
    _bring_up(lab, dead, "munged", _munged(lab), lambda: _listens(lab.munge_socket))
    if not _database(lab).exists():
        _make_database(lab)
    _bring_up(lab, dead, "mariadbd", _mariadbd(lab), lambda: _listens(lab.database_socket))
    _bring_up(lab, dead, "slurmdbd", ["slurmdbd", "-D"], lambda: _ask(lab, "sacctmgr", "-n", "list", "cluster") is not None)
    _introduce(lab)
    for node in lab.node_names:
        if f"slurmd-{node}" in dead:
            _spawn(lab, f"slurmd-{node}", ["slurmd", "-D", "-N", node])
    _bring_up(lab, dead, "slurmctld", ["slurmctld", "-D"], lambda: _nodes_answer(lab))


def _munged(lab: Lab) -> list[str]:
    # --force lets it live in a folder that only its user may enter
    files = {
        "key-file": "etc/munge.key",
        "pid-file": "state/munged.pid",
        "seed-file": "state/munge.seed",
    }
    options = [f"--{name}={lab.folder / path}" for name, path in files.items()]
    return ["munged", "--foreground", "--force", f"--socket={lab.munge_socket}", *options]


def _mariadbd(lab: Lab) -> list[str]:
    """Reachable through its socket only. Small and careless: what the last second wrote may be lost with the host."""
    sizes = ["--innodb-buffer-pool-size=64M", "--innodb-log-file-size=16M", "--innodb-lock-wait-timeout=900"]
    careless = ["--innodb-flush-log-at-trx-commit=0", "--innodb-doublewrite=0", "--skip-log-bin"]
    files = [f"--datadir={_database(lab)}", f"--socket={lab.database_socket}", f"--pid-file={lab.folder}/state/mariadbd.pid"]
    return ["mariadbd", "--no-defaults", f"--user={_user()}", "--skip-networking", *files, *sizes, *careless]


def _database(lab: Lab) -> Path:
    return lab.folder / "db" / "data"


def _make_database(lab: Lab) -> None:
    """An empty database whose one administrator is our own user, whom it knows by the socket."""
    half = lab.folder / "db" / "half"
    shutil.rmtree(half, ignore_errors=True)  # of a start that was interrupted
    administrator = ["--auth-root-authentication-method=socket", f"--auth-root-socket-user={_user()}"]
    options = [f"--user={_user()}", f"--datadir={half}", "--skip-test-db", "--innodb-log-file-size=16M", *administrator]
    made = _run(lab, "mariadb-install-db", "--no-defaults", *options, seconds=120)
    if made.returncode != 0:
        raise DaemonError(f"mariadb-install-db ended with {made.returncode}: {_tail(made.stdout + made.stderr)}")
    half.rename(_database(lab))


def _introduce(lab: Lab) -> None:
    """Accounting refuses jobs of clusters and users that it has not been told of."""
    user = _user()
    if (_ask(lab, "sacctmgr", "-nP", "list", "association", f"user={user}", "cluster=lab", "format=user") or "").strip():
        return
    for what in ("cluster lab", "account lab cluster=lab", f"user {user} account=lab adminlevel=admin"):
        added = _run(lab, "sacctmgr", "-iQ", "add", *what.split())
        if added.returncode != 0 and "already exists" not in (said := added.stdout + added.stderr):
            raise DaemonError(f"sacctmgr add {what} ended with {added.returncode}: {_tail(said)}")


def _nodes_answer(lab: Lab) -> bool:
    """Whether each node has reported. A star means silence; a node that someone set down is none of our business."""
    said = _ask(lab, "sinfo", "-h", "-N", "-p", "main", "-o", "%N %t") or ""
    states = dict(line.split() for line in said.splitlines())
    silent = [state for state in states.values() if state.endswith("*") or state.startswith("unk")]
    return len(states) == lab.nodes and not silent


# --- folder and settings ---


def _refuse_missing_programs() -> None:
    path = os.environ.get("PATH", os.defpath) + SYSTEM_PATH
    missing = [name for name in PROGRAMS if shutil.which(name, path=path) is None]
    if missing:
        raise UsageError(f"missing: {', '.join(missing)}; on Debian install them by\n  {INSTALL}")


def _checked_folder(folder: Path) -> Path:
    folder = folder.resolve()
    if not re.fullmatch(r"[A-Za-z0-9/._+-]+", str(folder)):
        raise UsageError(f"folder {str(folder)!r}: Slurm's files have no quotes; use only letters, digits and / . _ + -")
    if len(str(folder)) > LONGEST_FOLDER:
        raise UsageError(
            f"folder {folder} has {len(str(folder))} characters; sockets allow {LONGEST_FOLDER}, so take a shorter one"
        )
    if folder.exists() and folder.stat().st_uid != os.getuid():
        raise UsageError(f"{folder} belongs to another user; give a folder of your own, or run this as that user")
    return folder


def _make_folder(folder: Path) -> None:
    if folder.exists() and not _is_lab(folder) and any(folder.iterdir()):
        raise UsageError(f"{folder} holds other things than a lab; give a new or an empty folder")
    folder.mkdir(parents=True, exist_ok=True)
    folder.chmod(0o700)  # the key of munge and the database lie in it
    for name in ("etc", "run", "log", "state", "db", "dev"):
        (folder / name).mkdir(exist_ok=True)
    (folder / "run" / "lock").touch()


def _is_lab(folder: Path) -> bool:
    return (folder / "run" / "lock").exists()


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """One start or stop at a time: tests that run in parallel may all call them."""
    with (folder / "run" / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _known(folder: Path) -> Lab | None:
    record = folder / "etc" / "lab.json"
    return Lab(folder=folder, **json.loads(record.read_text())) if record.exists() else None


def _settled(folder: Path, wishes: dict[str, int]) -> Lab:
    """The folder's settings with the caller's wishes; written down for the next start."""
    known = _known(folder)
    lab = Lab(folder=folder, **{**_options(known or Lab(folder, _fresh_job_id())), **wishes})
    if known and lab != known and any(_pid(known, name) for name in known.daemons):
        raise UsageError(f"the lab in {folder} runs with {_options(known)}; stop it first, or start it without options")
    last_port = lab.port + 10 + lab.nodes
    for name, value, low, high in (
        ("nodes", lab.nodes, 1, 99),
        ("cpus", lab.cpus, 1, 1024),
        ("gpus", lab.gpus, 1, 64),
        ("memory", lab.memory_mb, lab.cpus, 2**30),
        ("port", lab.port, 1024, 65535 - (last_port - lab.port)),
        ("max-array", lab.max_array, 2, 20000),
    ):
        if not low <= value <= high:
            raise UsageError(f"--{name}={value} is outside {low} to {high}")
    _write(folder / "etc" / "lab.json", json.dumps(_options(lab)) + "\n")
    return lab


def _options(lab: Lab) -> dict[str, int]:
    return {name: value for name, value in asdict(lab).items() if name != "folder"}


def _fresh_job_id() -> int:
    # submitit believes a result that lies under its job's id, so a new lab must not repeat the ids of an old one.
    # Slurm allows 67 million ids: tenths of a second come round after two months.
    return int(time.time() * 10) % 60_000_000 + 1


def _write_files(lab: Lab) -> None:
    fields = {
        **{name: str(value) for name, value in asdict(lab).items()},
        "user": _user(),
        "host": socket.gethostname().split(".")[0],
        "controller_port": str(lab.port),
        "accounting_port": str(lab.port + 1),
        "first_node_port": str(lab.port + 11),
        "last_node_port": str(lab.port + 10 + lab.nodes),
        "last_gpu": str(lab.gpus - 1),
        "memory_mb_per_cpu": str(lab.memory_mb // lab.cpus),
    }
    for name in ("slurm.conf", "slurmdbd.conf", "gres.conf"):
        template = string.Template((TEMPLATES / name).read_text(encoding="utf-8"))
        _write(lab.folder / "etc" / name, template.substitute(fields))
    for node in lab.node_names:
        (lab.folder / "state" / node).mkdir(exist_ok=True)
    for number in range(lab.gpus):
        with contextlib.suppress(FileExistsError):
            (lab.folder / "dev" / f"gpu{number}").symlink_to("/dev/null")
    if not (key := lab.folder / "etc" / "munge.key").exists():
        _write(key, os.urandom(64).hex())
    _write(lab.folder / "env", f"export SLURM_CONF={shlex.quote(str(lab.conf))}\n")


def _write(path: Path, text: str) -> None:
    """Whole or not at all, and for our user only: slurmdbd and munged refuse anything else."""
    half = path.with_name(f"{path.name}.{os.getpid()}")
    half.touch(mode=0o600)
    half.write_text(text, encoding="utf-8")
    half.replace(path)


def _user() -> str:
    return pwd.getpwuid(os.getuid()).pw_name


# --- daemons ---


def _bring_up(
    lab: Lab, dead: list[str], name: str, command: list[str], answers: Callable[[], bool], seconds: float = 30
) -> None:
    """Start a daemon if it is dead, and wait until it answers; but not in vain for one that ended at once."""
    if name in dead:
        _spawn(lab, name, command)
    end = time.monotonic() + seconds
    while not answers():
        for daemon in lab.daemons:
            if lab.pid_file(daemon).exists() and _pid(lab, daemon) is None:
                raise DaemonError(f"{daemon} has ended: {_last_words(lab, daemon)}")
        if time.monotonic() > end:
            raise DaemonError(f"{name} gives no answer after {seconds:.0f} s: {_last_words(lab, name)}")
        time.sleep(0.05)


def _spawn(lab: Lab, name: str, command: list[str]) -> None:
    """Start a daemon in a session of its own, so that it outlives us and our terminal."""
    with (lab.folder / "log" / f"{name}.out").open("w") as out:
        process = subprocess.Popen(
            command,
            env=lab.environment(),
            cwd=lab.folder / "log",
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    _write(lab.pid_file(name), f"{process.pid} {_birth(process.pid)}\n")


def _taken(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # a port that its owner has just left counts as free
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return True
    return False


def _listens(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX) as probe:
        return probe.connect_ex(str(path)) == 0


def _last_words(lab: Lab, name: str) -> str:
    return _tail((lab.folder / "log" / f"{name}.out").read_text(errors="replace"))


def _tail(text: str) -> str:
    return "\n  ".join(["", *text.splitlines()[-4:]])


def _ask(lab: Lab, *command: str) -> str | None:
    """What a program printed; None if it failed."""
    done = _run(lab, *command)
    return done.stdout if done.returncode == 0 else None


def _run(lab: Lab, *command: str, seconds: float = 10) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(command, env=lab.environment(), capture_output=True, text=True, errors="replace", timeout=seconds)
    except subprocess.TimeoutExpired:
        return subprocess.CompletedProcess(command, 124, "", f"no end after {seconds} s")


def _pid(lab: Lab, name: str) -> int | None:
    """The daemon's process id while it lives. Ids are given out again, so its birth must fit too."""
    try:
        pid, birth = lab.pid_file(name).read_text().split()
    except FileNotFoundError:
        return None
    return int(pid) if _birth(int(pid)) == birth else None


def _birth(pid: int) -> str:
    """When a process began, in clock ticks since boot; "" if it has ended, even where nobody has reaped it."""
    try:
        fields = _stat(pid)
    except (FileNotFoundError, ProcessLookupError):
        return ""
    return "" if fields[0] in "ZX" else fields[19]


def _stat(pid: int) -> list[str]:
    """/proc/PID/stat from the state on, behind the program's name, which may hold spaces and brackets."""
    return Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()


# --- stop ---


def _stop(arguments: argparse.Namespace) -> None:
    folder = _checked_folder(arguments.folder)
    if not _is_lab(folder):
        print(f"lab: there is none in {folder}")
        return
    with _locked(folder):
        if lab := _known(folder):
            _end_jobs(lab)
            _end_daemons(lab)
        if arguments.purge:
            shutil.rmtree(folder)
    print(f"lab: stopped{' and deleted' if arguments.purge else ''}; {folder}")


def _end_jobs(lab: Lab) -> None:
    """Cancel the jobs, so that the next start doesn't find them running on nodes that never heard of them."""
    if _pid(lab, "slurmctld") is None:
        return
    _ask(lab, "scancel", "--quiet", f"--user={_user()}")
    _kill(_job_processes(lab, keep_managers=True))  # else Slurm asks politely, for KillWait seconds
    end = time.monotonic() + 5
    while _ask(lab, "squeue", "-h", "-t", "running,suspended,completing") and time.monotonic() < end:
        time.sleep(0.1)


def _end_daemons(lab: Lab) -> None:
    """In the reverse order of their start; the nodes first and together."""
    nodes = [name for name in lab.daemons if name.startswith("slurmd-")]
    _end(lab, nodes)
    while left := _job_processes(lab):
        _kill(left)
        time.sleep(0.05)
    for name in ("slurmctld", "slurmdbd", "mariadbd", "munged"):
        _end(lab, [name])


def _end(lab: Lab, names: list[str], patience_s: float = 10) -> None:
    for name in names:
        if pid := _pid(lab, name):
            os.kill(pid, signal.SIGTERM)
    end = time.monotonic() + patience_s
    while (alive := [pid for name in names if (pid := _pid(lab, name))]) and time.monotonic() < end:
        time.sleep(0.05)
    _kill(alive)
    for name in names:
        lab.pid_file(name).unlink(missing_ok=True)


def _kill(pids: list[int]) -> None:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def _job_processes(lab: Lab, keep_managers: bool = False) -> list[int]:
    """What this lab's jobs have running: each slurmstepd (the manager of one job step), all below it, and strays.

    A stray has lost its manager, but its environment still tells the job and the cluster. Whoever called us is spared.
    """
    mark = b"SLURM_CONF=" + os.fsencode(lab.conf)
    parents, managers, strays = {}, set(), set()
    for pid in (int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit()):
        with contextlib.suppress(OSError):  # it has ended, or is another user's
            parents[pid] = int(_stat(pid)[1])
            variables = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
            if mark in variables and Path(f"/proc/{pid}/comm").read_text().startswith("slurmstepd"):
                managers.add(pid)
            elif mark in variables and any(variable.startswith(b"SLURM_JOB_ID=") for variable in variables):
                strays.add(pid)
    callers = {os.getpid(), *_ancestors(os.getpid(), parents)}
    managed = {pid for pid in parents if not managers.isdisjoint(_ancestors(pid, parents))}
    return sorted((managed | strays | (set() if keep_managers else managers)) - callers)


def _ancestors(pid: int, parents: dict[int, int]) -> Iterator[int]:
    while pid := parents.get(pid, 0):
        yield pid


if __name__ == "__main__":
    main()
