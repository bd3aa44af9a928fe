"""What would a search that was run on a small model cost on a BERT-base with more rows, on one and on many A100s? An estimate.

    python benchmarks/costs.py results/demo --out results

It counts the tasks of each stage in a run folder, and the sentences that each of them sees. From these follow the
floating-point operations on the larger model, and from those the seconds, at a share of the GPU's peak rate that is assumed.
A model that is saved and timed takes the same seconds on every device, by the protocol; those are assumed too.
"""

import argparse
import dataclasses
import math
from pathlib import Path

import pandas as pd

from hpc_compress import analysis
from hpc_compress.analysis.runs import Run
from hpc_compress.identity import canonical
from hpc_compress.types import Outcome, Screen, Survey

PEAK = 312e12  # FLOP/s of an A100 in bf16, by its data sheet
REACHED = 0.2  # of it, in training and inference on short sentences: assumed
SOLVING = 10e12  # FLOP/s of the least squares in fp32, of 19.5e12: assumed
START_SECONDS = 30.0  # of a job, until its first task begins: imports, CUDA, data
MEASURING_SECONDS = 10.0  # saving, loading and timing a model: assumed
PROFILE_SECONDS = 90.0  # by the setting of the strategy
STAGES = ("base", "survey", "profile", "screen", "rescore", "untrained", "trained", "again", "report")


@dataclasses.dataclass(frozen=True)
class Model:
    """An encoder on sentences of one length."""

    layers: int = 12
    hidden: int = 768
    ffn: int = 3072
    tokens: int = 25  # of a sentence

    def forward(self, share: float = 1.0) -> float:
        """FLOP of a sentence: two for each weight of the encoder and each token, and the attention itself.

        share: of the encoder that is left.
        """
        weights = 4 * self.hidden**2 + 2 * self.hidden * self.ffn
        return share * self.layers * (2 * self.tokens * weights + 4 * self.tokens**2 * self.hidden)

    def repair(self, sentences: int) -> float:
        """FLOP of the least squares of all output linears: a Gram matrix of the inputs, and its factorization."""
        sizes = (self.hidden, self.ffn)
        return self.layers * sum(2 * sentences * self.tokens * size**2 + size**3 / 3 for size in sizes)


@dataclasses.dataclass(frozen=True)
class Setting:
    """What is asked for besides the model."""

    model: Model
    rows: int  # of train
    search_rows: int  # that a model is scored on
    epochs: float  # of the base model's training


def stage_of(outcome: Outcome, seen: set[str], setting: Setting, base: float) -> tuple[str, float]:
    """Stage and GPU seconds of a task. seen: trainings that were counted before, and that nobody pays twice.

    base: encoder parameters of the base model.
    """
    task, model, rate = outcome.task, setting.model, PEAK * REACHED
    sentences = next((int(s.params.get("sentences", 512)) for s in task.genome.steps if s.operator in ("carve", "prune")), 512)
    scoring, repair = 3 * sentences * model.forward() / rate, model.repair(sentences) / SOLVING
    if isinstance(task.study, Survey):
        return "survey", 3 * task.study.sentences * model.forward() / rate + MEASURING_SECONDS
    if isinstance(task.study, Screen):
        passes = (sentences + task.study.judge) * model.forward() / rate + repair
        if task.genome.steps[0].operator == "carve":
            return "screen", passes
        return "rescore", model.layers * scoring + model.layers * repair + passes  # two halves of the sentences a layer
    if task.study is not None:
        return "profile", PROFILE_SECONDS
    left = outcome.measurement.encoder_parameters / base if outcome.measurement else 1.0
    seconds = MEASURING_SECONDS + setting.search_rows * model.forward(left) / rate
    if task.split == "report" or task.repeat:
        return ("report" if task.split == "report" else "again"), seconds
    if not task.genome.steps and not task.genome.deploy:
        teacher = setting.rows * model.forward() / rate  # its outputs for all rows
        return "base", seconds + teacher + setting.epochs * 3 * setting.rows * model.forward() / rate
    epochs = 0.0
    for done, step in enumerate(task.genome.steps, 1):
        prefix = canonical(list(task.genome.steps[:done]))
        if prefix not in seen and step.operator in ("distill", "fine_tune"):
            epochs += float(step.params.get("epochs", 1))
        seen.add(prefix)
    trained = any(step.operator in ("distill", "fine_tune") for step in task.genome.steps)
    cut = scoring + repair if task.genome.steps else 0.0
    training = epochs * 3 * setting.rows * model.forward(left) / rate
    return ("trained" if trained else "untrained"), seconds + cut + training


def stages(run: Run, setting: Setting, gpus: int) -> pd.DataFrame:
    """One row a stage. Columns: stage, tasks, gpu_s (of all), wall_s (on so many GPUs; generations wait for one another).

    32 screens are one job; every other task is a job of its own on several GPUs, and a generation is one job on a single one.
    """
    base = run.base
    assert base is not None
    first = [id for id, seen in run.seen.items() if seen.is_base and seen.split == "search"]
    studies = [id for id, seen in run.seen.items() if seen.study in ("survey", "profile")]
    report = [seen.report_id for id, seen in run.seen.items() if run.result and id in {run.base_id, *run.result.reported}]
    last = list(run.result.timed) if run.result else []
    turns = [first, studies, *([*each.born_ids, *each.timed] for each in run.generations), last, list(dict.fromkeys(report))]
    counted: set[str] = set()
    rows: dict[str, list[float]] = {stage: [0, 0.0, 0.0] for stage in STAGES}
    for turn in turns:
        jobs: list[tuple[str, float]] = []
        for task_id in turn:
            if task_id in run.seen:
                stage, seconds = stage_of(run.outcomes[task_id], counted, setting, float(base.encoder_parameters))
                rows[stage][0] += 1
                rows[stage][1] += seconds
                if stage == "screen" and jobs and jobs[-1][0] == "screen":
                    jobs[-1] = (stage, jobs[-1][1] + seconds)
                else:
                    jobs.append((stage, seconds))
        if not jobs:
            continue
        # On one GPU a stage has its own tasks' time; on more, what the longest job of the generation takes is its stage's.
        waves = math.ceil(len(jobs) / gpus)
        longest = max(jobs, key=lambda job: job[1])
        if gpus == 1:
            for stage, seconds in jobs:
                rows[stage][2] += seconds
        else:
            rows[longest[0]][2] += waves * longest[1]
        rows[longest[0]][2] += START_SECONDS * (waves if gpus > 1 else 1)
    return pd.DataFrame(
        [(stage, int(n), gpu_s, wall_s) for stage, (n, gpu_s, wall_s) in rows.items()],
        columns=["stage", "tasks", "gpu_s", "wall_s"],
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path, help="folder of a run that has come to its end")
    parser.add_argument("--rows", type=int, default=67_000, help="of train")
    parser.add_argument("--search-rows", type=int, default=1_000, help="that every model is scored on")
    parser.add_argument("--epochs", type=float, default=3.0, help="of the base model's training")
    parser.add_argument("--tokens", type=int, default=25, help="of a sentence")
    parser.add_argument("--gpus", type=int, default=64, help="compared with one")
    parser.add_argument("--out", type=Path, help="folder for costs.csv")
    options = parser.parse_args()
    run = analysis.open_run(options.run)
    setting = Setting(Model(tokens=options.tokens), options.rows, options.search_rows, options.epochs)
    one, many = (stages(run, setting, gpus) for gpus in (1, options.gpus))
    table = one.rename(columns={"wall_s": "wall_s_1"}).assign(gpus=options.gpus, wall_s_many=many["wall_s"])
    print(table.round(1).to_markdown(index=False))
    if options.out:
        table.round(1).to_csv(options.out / "costs.csv", index=False)


if __name__ == "__main__":
    main()
