"""A finished run folder made by hand, without a search, with any text wherever a run has one. Imports no torch."""

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from omegaconf import OmegaConf

from hpc_compress import config, identity
from hpc_compress.records import Environment, Generation, Plan, Result
from hpc_compress.search.space import Shape
from hpc_compress.store import Store
from hpc_compress.types import (
    Base,
    Dataset,
    Failure,
    Genome,
    Measurement,
    MeasurementProtocol,
    Outcome,
    Overlap,
    Rows,
    Step,
    Structure,
    Task,
)

LABELS = np.arange(200) % 2
PRODUCT = {"_target_": "hpc_compress.search.objective.Product", "a": 5.0, "b": 1.0, "c": 1.0}


def run(
    root: Path, text: str = "plain", count: int = 12, metric: str = "accuracy", seed: int = 0, **settings: Any
) -> list[str]:
    """Write it; returns the ids of its tasks on the search split: the base model, `count` candidates, and one that failed.

    text: the name of the model, the dataset and the device, operators, schemes, messages. Candidate k is right on 180 - 2 k of
    200 examples, k + 1 times as fast as the base model, and 1 / (k + 1) of its size; its parent is candidate k - 1. Every third
    one is bad in everything. All are measured on both splits.
    """
    store = Store(root)
    base = Base(name=text, fingerprint="0" * 16)
    dataset = Dataset(name=text, fingerprint="1" * 16, problem="classification", labels=("a", "b"), metrics=(metric,))
    protocol = MeasurementProtocol()
    chosen = config.RunConfig(
        name="made", seed=seed, model=config.ModelConfig(path=text), dataset=config.DatasetConfig(name=text), **settings
    )
    (root / "data").mkdir(parents=True)
    for split in ("search", "report"):
        rows = pd.DataFrame({"text": [f"{text} {row}" for row in range(len(LABELS))], "label": LABELS})
        rows.to_parquet(root / "data" / f"{split}.parquet")

    def task(number: int) -> Task:
        steps = tuple(Step(operator=text, params={"count": step}) for step in range(number))
        deploy = (Step(operator="quantize", params={"scheme": text}),) if number else ()
        genome = Genome(steps=steps, deploy=deploy)
        return Task(base=base, dataset=dataset, protocol=protocol, seed=seed, genome=genome)

    tasks = [task(number) for number in range(count + 2)]
    ids = [store.add_task(each) for each in tasks]
    for number, each in enumerate(tasks[:-1]):
        for split in ("search", "report"):
            of_split = each.model_copy(update={"split": split})
            store.settle(_measured(store, of_split, number, metric, text))
    failure = Failure(kind="error", stage=text, message=text, traceback=text)
    store.settle(Outcome(task=tasks[-1], failure=failure, seconds={text: 1.0}))
    rows = Rows(
        empty={text: 1},
        unused=0,
        overlaps=(Overlap(split="report", of="train", rows=200, equal=3),),
        trivial={"report": {metric: 0.5}},
    )
    where = Environment(version=text, commit=text, python=text, system=text, packages={text: text})
    shape = Shape(heads=(4, 4, 4), widths=(32, 64))
    plan = Plan(
        config=chosen,
        strategy={"_target_": text, text: text},
        objective=PRODUCT,
        base=base,
        dataset=dataset,
        shape=shape,
        rows=rows,
        environment=where,
    )
    store.write("run.json", plan)
    survivors = (ids[count], *ids[: count - 1])
    parents = (ids[0], *ids[1:-1])
    born = Generation(number=1, born_ids=tuple(ids[1:]), parents=parents, told=tuple(ids[1:]), population=survivors)
    store.write("generations/0001.json", born)
    stopped = f"all generations are done {text}"
    store.write("result.json", Result(best=ids[count], base=ids[0], reported=survivors[:4], generations=1, stopped=stopped))
    (root / ".hydra").mkdir()
    (root / ".hydra/overrides.yaml").write_text(OmegaConf.to_yaml(OmegaConf.create([f"model.path={text}", "name=made"])))
    return ids


def _measured(store: Store, task: Task, number: int, metric: str, text: str) -> Outcome:
    bad = number % 3 == 2
    right = 180 - 2 * number - 40 * bad
    answers = LABELS.copy()
    digest = hashlib.sha256(f"{number // 2} {task.split}".encode()).digest()
    wrong = np.random.default_rng(list(digest)).permutation(len(LABELS))[: len(LABELS) - right]
    answers[wrong] = 1 - answers[wrong]
    store.write_answers(identity.task_id(task), answers)
    gain = 1.0 if bad else 1.0 + number
    measurement = Measurement(
        metrics={metric: right / len(LABELS)},
        standard_errors={metric: float(np.sqrt(right / 200 * (1 - right / 200) / 200))},
        structure=Structure(heads=(4, 2), ffn=(64, 32), layers=(0, 2)) if number else Structure(heads=(4,) * 3, ffn=(64,) * 3),
        latency_ms=(10.0 / gain,) * 3,
        base_latency_ms=(10.0, 10.1, 9.9),
        of_base=number == 0,
        model_bytes=int(90e6 / gain),
        parameters=2000 // (number + 1),
        encoder_parameters=500,
        device=text,
        device_type="cpu",
        protocol=task.protocol,
    )
    joules = 900.0 if number else None
    return Outcome(task=task, measurement=measurement, seconds={"train": 5.0, text: 1.0}, joules=joules)
