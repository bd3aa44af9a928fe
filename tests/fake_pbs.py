#!/usr/bin/env python3
"""A PBS on this machine: `qsub`, `qselect`, `qstat`, `qdel` and `pbsnodes` are copies of this file, told apart by their names.

It really runs the elements of arrays, two at a time, as processes without the environment of their driver. Its state lies in
the folder FAKE_PBS, and a test may leave files there:

faults        a line for each element of an array that shall end: its Exit_status, or `forget`
say           what qstat prints before anything else
down          every command fails, and says what is in it
no_history    ended jobs are not remembered
hold          elements wait for ever, and the server says that it gave up on them

Needs Python's standard library only.
"""

import fcntl
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(os.environ["FAKE_PBS"])
HELD = "job held, too many failed attempts to run"


def main() -> int:
    command = Path(sys.argv[0]).name
    if (ROOT / "down").exists() and command != "mom":
        print((ROOT / "down").read_text(), file=sys.stderr)
        return 1
    commands = {"qsub": qsub, "qselect": qselect, "qstat": qstat, "qdel": qdel, "pbsnodes": pbsnodes, "mom": mom}
    return commands[command](sys.argv[1:])


@contextmanager
def locked():
    with (ROOT / "lock").open("a") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        yield


def qsub(words: list[str]) -> int:
    *options, script = words
    values = dict(zip(options[::2], options[1::2], strict=True))
    size = int(values["-J"].split("-")[1]) + 1 if "-J" in values else 1
    with locked():
        number = 1 + max((int(path.name) for path in (ROOT / "jobs").glob("*")), default=0)
        folder = ROOT / "jobs" / str(number)
        folder.mkdir(parents=True)
        shutil.copy(script, folder / "script")
        (folder / "job.json").write_text(json.dumps({"name": values["-N"], "array": "-J" in values, "words": words}))
        for index in range(size):
            write(number, index, job_state="Q", substate=10, comment="Not Running: Not enough free nodes available")
    shutil.copy(__file__, ROOT / "mom")
    with (ROOT / "mom.log").open("a") as log:
        subprocess.Popen([sys.executable, ROOT / "mom", str(number)], start_new_session=True, stdout=log, stderr=log)
    print(full(number))
    return 0


def mom(words: list[str]) -> int:
    """Runs the elements of one job."""
    number = int(words[0])
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda index: run(number, index), sorted(elements(number))))
    return 0


def run(number: int, index: int) -> None:
    if (ROOT / "hold").exists():
        return write(number, index, job_state="H", substate=20, Hold_Types="s", comment=HELD)
    array = job(number)["array"]
    own = {"PBS_ARRAY_INDEX": str(index)} if array else {}
    environment = {"PATH": "/usr/bin:/bin", "HOME": "/", "PBS_JOBID": full(number, index), "FAKE_PBS": str(ROOT), **own}
    with locked():
        if elements(number)[index]["job_state"] != "Q":  # deleted
            return None
        begin = time.monotonic()
        process = subprocess.Popen(
            ["/bin/bash", ROOT / "jobs" / str(number) / "script"], env=environment, cwd="/", start_new_session=True
        )
        write(number, index, job_state="R", substate=42, pid=process.pid, exec_host="n1/0*1", comment="Job run")
        fault = take_fault() if array else None
    if fault is not None:
        os.killpg(process.pid, signal.SIGKILL)
    code = process.wait()
    with locked():
        deleted = elements(number)[index].get("deleted")
        if fault == "forget":
            (ROOT / "jobs" / str(number) / f"{index}.json").unlink()
            return None
        status = 271 if deleted else int(fault) if fault else code if code >= 0 else 256 - code
        took = {"walltime": f"00:00:{min(59, round(time.monotonic() - begin)):02d}", "ncpus": 1}
        state = {"job_state": "F", "substate": 91 if deleted else 92, "Exit_status": status, "resources_used": took}
        return write(number, index, exec_host="n1/0*1", **state)


def take_fault() -> str | None:
    path = ROOT / "faults"
    lines = path.read_text().split() if path.exists() else []
    path.write_text("\n".join(lines[1:]))
    return lines[0] if lines else None


def qselect(words: list[str]) -> int:
    name = words[words.index("-N") + 1] if "-N" in words else None
    for number in sorted(map(int, os.listdir(ROOT / "jobs"))) if (ROOT / "jobs").exists() else ():
        ended = all(element["job_state"] == "F" for element in elements(number).values())
        if (not ended or "-x" in words) and name in (None, job(number)["name"]):
            print(full(number))
    return 0


def qstat(words: list[str]) -> int:
    if (ROOT / "say").exists():
        print((ROOT / "say").read_text())
    if "-B" in words:
        server = {"default_queue": "workq", "max_array_size": 4, "job_history_enable": str(not (ROOT / "no_history").exists())}
        print(json.dumps({"Server": {"fake": server}}))
        return 0
    if "-Q" in words:
        queue = {"queue_type": "Execution", "enabled": "True", "started": "True", "max_queued": "[u:PBS_GENERIC=200]"}
        print(json.dumps({"Queue": {"workq": queue, "closed": {**queue, "started": "False"}}}))
        return 0
    if "-x" in words and (ROOT / "no_history").exists():
        print("qstat: PBS is not configured to maintain job history", file=sys.stderr)
        return 1
    found, code = {}, 0
    for word in words[words.index("json") + 1 :]:
        number = int(re.match("[0-9]+", word)[0])  # type: ignore[index]
        shown = elements(number)
        over = all(element["job_state"] == "F" for element in shown.values())
        if not shown or (over and "-x" not in words):
            said = "Job has finished, use -x or -H to obtain historical job information" if shown else "Unknown Job Id"
            print(f"qstat: {full(number)} {said}", file=sys.stderr)
            code = 35 if shown else 153
            continue
        common = {"Job_Name": job(number)["name"], "Job_Owner": "me@fake", "queue": "workq"}
        if job(number)["array"]:
            found[full(number)] = {**common, "job_state": "F" if over else "B", "array": "True"}
        for index, element in shown.items():
            early = {"job_state": "X"} if element["job_state"] == "F" and not over else {}
            found[full(number, index)] = {**common, **element, **early}
    print(json.dumps({"timestamp": 1, "pbs_version": "23.06.06", "pbs_server": "fake", "Jobs": found}, indent=4))
    return code


def qdel(words: list[str]) -> int:
    code = 0
    for word in words:
        number, index = re.fullmatch(r"([0-9]+)(?:\[([0-9]*)\])?", word).groups()  # type: ignore[union-attr]
        with locked():
            chosen = {at: e for at, e in elements(int(number)).items() if not index or at == int(index)}
            if all(element["job_state"] == "F" for element in chosen.values()):
                print(f"qdel: Job {word}.fake has finished", file=sys.stderr)
                code = 35
            for at, element in chosen.items():
                if element["job_state"] in "QH":
                    write(int(number), at, job_state="F", substate=91)
                elif element["job_state"] == "R":
                    write(int(number), at, **{**element, "deleted": True})
                    os.killpg(element["pid"], signal.SIGTERM)
    return code


def pbsnodes(words: list[str]) -> int:
    has = {"resources_available": {"mem": "8388608kb", "ncpus": 8, "ngpus": 0}}
    print(json.dumps({"nodes": {"n1": has, "n2": {"resources_available": {"mem": "16gb", "ngpus": 2}}}}))
    return 0


def full(number: int, index: int | None = None) -> str:
    at = "" if not job(number)["array"] else f"[{'' if index is None else index}]"
    return f"{number}{at}.fake"


def job(number: int) -> dict:
    path = ROOT / "jobs" / str(number) / "job.json"
    return json.loads(path.read_text()) if path.exists() else {"array": False}


def elements(number: int) -> dict[int, dict]:
    paths = (ROOT / "jobs" / str(number)).glob("[0-9]*.json")
    return {int(path.stem): json.loads(path.read_text()) for path in sorted(paths, key=lambda path: int(path.stem))}


def write(number: int, index: int, **element: object) -> None:
    path = ROOT / "jobs" / str(number) / f"{index}.json"
    draft = path.with_suffix(".draft")
    draft.write_text(json.dumps(element))
    draft.replace(path)


if __name__ == "__main__":
    sys.exit(main())
