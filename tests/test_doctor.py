"""What the doctor makes of what it finds on a node; no cluster is needed."""

import errno
import fcntl
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hpc_compress import doctor, door
from hpc_compress.doctor import Node
from hpc_compress.launch import local
from hpc_compress.launch.slurm import Slurm

FINE = Node(
    host="n1",
    time=0.0,
    python="3.11.2",
    seen=True,
    locks=True,
    driver="580.65.06",
    cuda="13.0",
    device="NVIDIA A100",
    refusal="",
    bitsandbytes="",
)


def test_a_gpu_that_torch_sees_is_told_with_driver_and_build():
    check = doctor._cuda(FINE, Slurm.names, wanted=True)
    assert check.ok
    assert check.found == "NVIDIA A100; NVIDIA driver 580.65.06; torch is built for CUDA 13.0"


@pytest.mark.parametrize(
    ("driver", "cuda", "advice"),
    [
        ("535.104.05", "13.0", "CUDA 13.0 needs driver 580 or newer"),
        ("535.104.05", "13.0", "install a build of torch for CUDA 12 "),
        ("535.104.05", "13.0", "Modules don't help here"),
        ("470.57.02", "12.8", "CUDA 12.8 needs driver 525 or newer"),
        ("418.39", "12.8", "ask for a newer driver on the nodes"),
        ("535.104.05", "12.8", "torch says: No CUDA GPUs are available. See that the job was given a GPU"),
        ("600.1", "15.1", "torch says: No CUDA GPUs are available"),  # of a version that is not known yet
        ("535.104.05", "", "install a CUDA build of torch"),
        ("", "13.0", "choose a cluster.partition with GPUs"),
    ],
)
def test_what_to_do_when_torch_sees_no_gpu(driver: str, cuda: str, advice: str):
    blind = {"device": "", "driver": driver, "cuda": cuda, "refusal": "No CUDA GPUs are available"}
    check = doctor._cuda(FINE.model_copy(update=blind), Slurm.names, wanted=True)
    assert not check.ok
    assert advice in check.advice
    assert (driver or "no NVIDIA driver") in check.found
    assert doctor._cuda(FINE.model_copy(update=blind), Slurm.names, wanted=False).ok


def test_the_drivers_version_is_read_from_nvidia_smi_or_the_kernel(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, printing: Callable[..., Path]
):
    kernel = tmp_path / "version"
    monkeypatch.setattr(local, "DRIVER_FILES", (str(kernel),))
    printing("nvidia-smi", "535.104.05\n535.104.05\n")
    assert local.driver_version() == "535.104.05"
    printing("nvidia-smi", "Failed to initialize NVML: Driver/library version mismatch\n", code=18)
    assert local.driver_version() == ""
    for module in ("Kernel Module  580.65.06  Sun Jul 27", "Open Kernel Module for x86_64  580.65.06  Release Build"):
        kernel.write_text(f"NVRM version: NVIDIA UNIX x86_64 {module} (dvs-builder)\nGCC version:  gcc version 12.2.0\n")
        assert local.driver_version() == "580.65.06"


@pytest.mark.parametrize("number", [None, errno.ENOLCK, errno.EOPNOTSUPP])
def test_a_filesystem_without_locks_is_told_from_one_with_locks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int | None
):
    def refuse(*arguments: Any) -> None:
        raise OSError(number, "no locks")

    monkeypatch.setattr(doctor, "precisions_that_fail", lambda: "")
    if number is not None:
        monkeypatch.setattr(fcntl, "flock", refuse)
    doctor.Look(str(tmp_path))()
    assert Node.model_validate_json((tmp_path / "node.json").read_text()).locks == (number is None)


class OneJob:
    """A cluster whose only job leaves some files and is gone."""

    def __init__(self, left: dict[str, str]) -> None:
        self.left = left

    def submit(self, folder: Path, works: Any, options: Any) -> str:
        for name, text in self.left.items():
            (folder / name).write_text(text)
        return "17"

    def queue(self) -> list[Any]:
        return []

    def accounting(self, job_ids: Any) -> list[Any]:
        return []

    def cancel(self, ids: Any) -> None: ...


def on(jobs: Any) -> Slurm:
    launcher = Slurm()
    launcher._commands = jobs
    return launcher


def test_the_end_of_a_log_of_any_size_is_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(doctor.time, "sleep", lambda seconds: None)
    monkeypatch.setattr(Path, "read_text", lambda *arguments, **options: pytest.fail("a whole log was read"))
    jobs: Any = OneJob({"a.log": "a line\n" * 2**17 + "module: command not found\n"})
    (check,) = doctor._node(on(jobs), tmp_path)
    assert not check.ok
    assert "left nothing; " in check.found
    assert check.found.endswith("module: command not found")


def test_what_a_node_left_and_is_gone_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(door, "record", lambda path, kind: None)
    jobs: Any = OneJob({"node.json": FINE.model_dump_json()})
    with pytest.raises(door.DamageError, match=r"node\.json was there and is gone"):
        list(doctor._node(on(jobs), tmp_path))


@pytest.mark.slow
def test_every_precision_works_here():
    assert doctor.precisions_that_fail() == ""


def test_a_precision_is_tried_with_one_row_and_with_more(monkeypatch: pytest.MonkeyPatch):
    from hpc_compress.models.modeling_hpc_compress import Int8Linear

    forward = Int8Linear.forward

    def only_one_row(self: Int8Linear, x: Any) -> Any:
        if len(x) > 1:
            raise RuntimeError("no kernel image is available\nfor execution on the device")
        return forward(self, x)

    monkeypatch.setattr(Int8Linear, "forward", only_one_row)
    monkeypatch.setattr(doctor, "SCHEMES", ("int8",))
    found = doctor.precisions_that_fail()
    assert found == "int8 with fp32, int8 with bf16: RuntimeError: no kernel image is available for execution on the device"
