"""A teacher's outputs for a batch: computed live, or read from files that hold its outputs on all training examples.

Knows models, batches and numpy files. Knows nothing of losses and their weights, nor where in a run the files lie.
"""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedModel

from hpc_compress import calibration
from hpc_compress.data.batches import Batch, Encoded, eval_batches
from hpc_compress.problems import Problem
from hpc_compress.problems.outputs import ModelOutputs, Teacher, ask
from hpc_compress.training.loop import autocast

CHUNK = 1024  # examples that are held in memory while the files are written
BATCH_SIZE = 64
FITTED = 256  # examples that a projection is fitted to before the training


def live(problem: Problem, teacher: nn.Module, learns: bool = False) -> Teacher:
    """Asks the model itself. learns: it is trained along, so its answers carry gradients."""

    def answer(batch: Batch, hidden: bool) -> ModelOutputs:
        with torch.set_grad_enabled(learns):
            return ask(problem, teacher, batch, hidden)

    return answer


# --- outputs on disk ---


@dataclass(frozen=True)
class TeacherOutputs:
    """A teacher's outputs on all examples, in eval mode: in memory, or mapped from the files where that is too small."""

    outputs: np.ndarray  # (n_labels, width) float32, as the problem defines them
    hidden: np.ndarray  # (n_tokens, hidden) float16, after the last layer; all examples one after another
    offsets: np.ndarray  # (n + 1,) as in `Encoded`

    def answer(self, batch: Batch, hidden: bool) -> ModelOutputs:
        """As a live teacher would, but for the rounding; of hidden states the last layer's only, 0 at the padding."""
        index = batch.index.numpy()
        outputs = _move(self.outputs[batch.label_index.numpy()], batch.labels.device)
        if not hidden:
            return ModelOutputs(outputs, ())
        states = np.zeros((*batch.inputs["input_ids"].shape, self.hidden.shape[1]), self.hidden.dtype)
        for row, example in enumerate(index):
            begin, end = self.offsets[example : example + 2]
            states[row, : end - begin] = self.hidden[begin:end]
        return ModelOutputs(outputs, (_move(states, batch.labels.device),))


def _move(array: np.ndarray, device: torch.device) -> torch.Tensor:
    tensor = torch.from_numpy(array)
    # Only from pinned memory does the copy run beside the kernels that are already queued.
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor


def outputs_bytes(problem: Problem, teacher: PreTrainedModel, examples: Encoded) -> int:
    """What `write` would put on the disk."""
    return 4 * len(examples.labels) * problem.width(teacher) + 2 * len(examples.input_ids) * teacher.config.hidden_size


@torch.no_grad()
def write(folder: Path, problem: Problem, teacher: PreTrainedModel, examples: Encoded, device: torch.device) -> None:
    """Ask the teacher, in eval mode on `device`, about all examples and write its outputs to the folder.

    Raises: OSError where the disk is full. Plain writes say so; writing to a memory map would end the process.
    """
    with (folder / "logits.npy").open("wb") as outputs_file, (folder / "hidden.npy").open("wb") as hidden_file:
        for stream, kind, shape in (
            (outputs_file, "<f4", (len(examples.labels), problem.width(teacher))),
            (hidden_file, "<f2", (len(examples.input_ids), teacher.config.hidden_size)),
        ):
            np.lib.format.write_array_header_1_0(stream, {"descr": kind, "fortran_order": False, "shape": shape})
        for begin in range(0, len(examples), CHUNK):
            part = examples.part(begin, begin + CHUNK)
            outputs = np.empty((len(part.labels), problem.width(teacher)), np.float32)
            hidden = np.empty((len(part.input_ids), teacher.config.hidden_size), np.float16)
            for batch in eval_batches(part, BATCH_SIZE):
                with autocast(device):  # as a live teacher in `loop.fit`
                    answer = ask(problem, teacher, batch.to(device), hidden=True)
                outputs[batch.label_index.numpy()] = answer.outputs.float().cpu().numpy()
                for states, example in zip(answer.hidden[-1].half().cpu().numpy(), batch.index.numpy(), strict=True):
                    first, end = part.offsets[example : example + 2]
                    hidden[first:end] = states[: end - first]
            outputs_file.write(outputs.tobytes())
            hidden_file.write(hidden.tobytes())
        for stream in (outputs_file, hidden_file):
            stream.flush()
            os.fsync(stream.fileno())


def read(folder: Path, examples: Encoded) -> TeacherOutputs | None:
    """The outputs on these examples; None where there are none, or none that are whole.

    They are read into memory if they take at most half of what is free. A training looks them up in random order, and each
    look into a mapped file is a small read, which a parallel filesystem answers slowly.
    """
    files = [folder / f"{name}.npy" for name in ("logits", "hidden")]
    try:
        mode: Literal["r"] | None = None if sum(file.stat().st_size for file in files) <= free_bytes() / 2 else "r"
        outputs, hidden = (np.load(file, mmap_mode=mode) for file in files)
    except (OSError, ValueError, EOFError):
        return None
    fits = outputs.shape[:1] == (len(examples.labels),) and hidden.shape[:1] == (len(examples.input_ids),)
    return TeacherOutputs(outputs, hidden, examples.offsets) if fits else None


def free_bytes(proc: Path = Path("/proc"), cgroups: Path = Path("/sys/fs/cgroup")) -> int:
    """Memory that this process can still take: of the machine, and of every control group that it is in; 0 if unknown.

    What a group's files take in memory counts as free, since it is given back when a process needs it.
    """
    try:
        lines = dict(line.split(":", 1) for line in (proc / "meminfo").read_text().splitlines())
        free = [1024 * int(lines["MemAvailable"].split()[0])]
        for line in (proc / "self" / "cgroup").read_text().splitlines():
            _, kinds, path = line.split(":", 2)
            if kinds == "":  # version 2
                free += _group_bytes(cgroups, path, "memory.max", "anon")
            elif "memory" in kinds.split(","):
                free += _group_bytes(cgroups / "memory", path, "memory.limit_in_bytes", "total_rss")
    except (OSError, ValueError, KeyError):
        return 0
    return max(0, min(free))


def _group_bytes(root: Path, path: str, limit: str, used: str) -> list[int]:
    """What is free in a control group and in those above it; nothing for those without a limit."""
    free = []
    group = root / path.lstrip("/")
    for folder in (group, *group.parents):
        if (
            folder.is_relative_to(root)
            and (folder / limit).is_file()
            and (most := (folder / limit).read_text().strip()) != "max"
        ):
            taken = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
            free.append(int(most) - int(taken[used]))
    return free


# --- a student of another shape ---


@torch.no_grad()
def projection(problem: Problem, student: nn.Module, teacher: Teacher, examples: Encoded, device: torch.device) -> nn.Linear:
    """A linear from the student's hidden size to the teacher's, to be trained along with the student.

    It starts as the least-squares fit on the first examples: with random weights, the student would spend an epoch on adapting
    to the projection.
    """
    student.eval()
    gram, cross = torch.zeros((), device=device), torch.zeros((), device=device)
    for batch in (batch.to(device) for batch in eval_batches(examples.take(FITTED), BATCH_SIZE)):
        real = batch.inputs["attention_mask"].bool()
        pair = ask(problem, student, batch, hidden=True), teacher(batch, True)
        own, wanted = (each.hidden[-1][real].double() for each in pair)  # (real tokens, hidden) each
        gram, cross = gram + own.T @ own, cross + own.T @ wanted
    gram = calibration.damped(gram, 1e-6)  # a few short examples span no space
    linear = nn.Linear(len(gram), cross.shape[1], bias=False, device="meta")  # its own initialisation would draw random numbers
    linear.weight = nn.Parameter(torch.linalg.solve(gram, cross).T.float().contiguous())
    return linear
