"""Who may work in a run folder: one driver at a time, and nobody but its user. Knows no search."""

import grp
import logging
import os
import platform
import pwd
import re
import shlex
import stat
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from hpc_compress import launch
from hpc_compress.config import ConfigError
from hpc_compress.process import Process
from hpc_compress.records import CANCELLED, HEARTBEAT_SECONDS, Heartbeat, Plan
from hpc_compress.store import Store, private_umask, touching
from hpc_compress.types import SearchError

OTHERS_WRITE = stat.S_IWGRP | stat.S_IWOTH
SYSTEM = (0, 65534)  # root, and how a container without privileges shows it

log = logging.getLogger(__name__)


def here() -> Heartbeat:
    """The first sign of life of a driver that is this process."""
    process, job = Process.here(), launch.own_job()
    return Heartbeat(
        host=platform.node(),
        pid=process.pid,
        started=process.started,
        job_id=job and job.id,
        job_name=job and job.name,
        scheduler=job and job.scheduler,
    )


@contextmanager
def alone(store: Store) -> Iterator[None]:
    """Be the only driver of a run folder, to which nobody else may write.

    Raises: ConfigError when others may write there, SearchError when another driver is at work.
    """
    _require_ours(store)
    with private_umask():  # which the nodes get from the driver
        store.root.mkdir(parents=True, exist_ok=True)
        if not (store.root / "run.json").exists():
            store.root.chmod(0o700)
        _require_own(store.root)
        with store.lock("driver", wait=False) as held:
            if not held or _has_driver(store):
                raise SearchError(f"another driver is at work in {store.root}; wait for it, or choose another name=")
            store.delete(CANCELLED)
            store.write("driver.json", here())
            with _beating(store.root / "driver.json"):
                yield


def require_sweep(root: Path) -> None:
    """Raises: ConfigError for a folder that holds something else than a sweep or a run, or a start of one."""
    if not (root / "multirun.yaml").exists():  # which Hydra writes first
        _require_ours(Store(root))


def _require_ours(store: Store) -> None:
    """Raises: ConfigError for a folder that holds something else than a run, or a start of one."""
    # The log, the locks, what Hydra keeps of a sweep and the draft of the first sign of life may be there before the rest.
    early = {".hydra", "search.log", "locks", "multirun.yaml", ".submitit"}
    found = set(os.listdir(store.root)) - early if store.root.exists() else set()
    found -= {name for name in found if re.fullmatch(r"\.driver\.json\.[0-9a-f]{8}", name)}
    if found and store.read("driver.json", Heartbeat) is None and store.read("run.json", Plan) is None:
        raise ConfigError(
            f"{store.root} holds something else than a run of this program, such as {min(found)}; choose another name="
        )


def _require_own(root: Path) -> None:
    """See that nobody else can change what nodes run.

    The run folder and what lies in jobs/ must be the user's, and no group may write there. Whoever can write to a folder
    above can put another folder in the place of the run's, unless that folder is sticky, as /tmp is. So none above may be
    writable by everybody, and those below the current folder, where this program makes them, must be the user's (or
    root's) and not writable by a group. Further up a warning is enough: a project's folders often belong to its head, and
    its group writes there on purpose.

    Raises: ConfigError.
    """
    for path in (root, *_below(root / "jobs")):
        status = path.stat(follow_symlinks=False)
        if status.st_uid != os.getuid() or (status.st_mode & OTHERS_WRITE and not stat.S_ISLNK(status.st_mode)):
            what = "is not yours" if status.st_uid != os.getuid() else "can be written to by others"
            raise ConfigError(
                f"{path} {what}, and what lies there runs on the nodes in your name; choose another name=, or "
                f"chmod -R go-w {shlex.quote(str(root))} (colleagues may read it: chmod -R g+rX)"
            )
    current = Path.cwd()
    of_others: list[str] = []
    for path in root.absolute().parents:
        status, quoted = path.stat(), shlex.quote(str(path))
        if status.st_mode & stat.S_ISVTX:
            continue
        if status.st_mode & stat.S_IWOTH:
            who, mend = "everybody", f", or chmod o-w {quoted}"
        elif status.st_uid not in (os.getuid(), *SYSTEM):
            who, mend = "another user, its owner,", ""
        elif status.st_mode & stat.S_IWGRP and not _is_private(status.st_gid):
            who, mend = "a group", f", or chmod g-w {quoted}"
        else:
            continue
        if who == "everybody" or current in path.parents:
            raise ConfigError(
                f"{who} can write to {path}, and so put another folder in the place of the run's, from which nodes run code "
                f"in your name; choose another folder{mend}"
            )
        of_others.append(f"{path} ({who.removesuffix(',')})")
    if of_others:
        log.warning("others can exchange the run folder, from which nodes run code: they write to %s", ", ".join(of_others))


def _is_private(gid: int) -> bool:
    """Whether a group is the one that many systems make for each user, with no other member."""
    try:
        user, group = pwd.getpwuid(os.getuid()), grp.getgrgid(gid)
    except KeyError:  # a container without their names
        return False
    # The group does not list those whose primary group it is, and a directory service may list no users at all: hence the name.
    members = {*group.gr_mem, *(entry.pw_name for entry in pwd.getpwall() if entry.pw_gid == gid)}
    return gid == user.pw_gid and group.gr_name == user.pw_name and members <= {user.pw_name}


def _below(folder: Path) -> Iterator[Path]:
    if folder.is_dir():
        yield folder
        for parent, folders, files in os.walk(folder):
            yield from (Path(parent, name) for name in (*folders, *files))


@contextmanager
def _beating(path: Path) -> Iterator[None]:
    """Give signs of life while the driver is busy with something else, such as a task in its own process."""
    try:
        with touching(path, HEARTBEAT_SECONDS):
            yield
    finally:
        store = Store(path.parent)
        with suppress(OSError):  # it must not hide what ended the driver
            last = store.read(path.name, Heartbeat)
            if last is not None and last.same_driver(here()):
                store.write(path.name, last.model_copy(update={"ended": True}))


def _has_driver(store: Store) -> bool:
    """Whether another driver shows signs of life. Many shared filesystems have locks within one node only, or none at all."""
    path, last, own = store.root / "driver.json", store.read("driver.json", Heartbeat), here()
    if last is None or last.ended or last.same_driver(own):
        return False
    if last.host == own.host:
        return Process(last.pid, last.started).lives()
    beat = path.stat().st_mtime_ns
    # By the filesystem's own clock on both sides: those of two nodes differ.
    probe = store.root / ".clock"
    probe.touch()
    patience = 3 * HEARTBEAT_SECONDS - (probe.stat().st_mtime_ns - beat) / 1e9
    probe.unlink()
    while patience > 0:
        time.sleep(1)
        patience -= 1
        if path.stat().st_mtime_ns != beat:
            return True
    return False
