"""Do the tests notice when the program is wrong? Breaks one line in a copy and runs the tests that should see it.

    python tests/mutants.py [PART_OF_A_NAME ...]

Prints a line for each broken copy and exits with 1 when the tests of one passed.
"""

import os
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

REPOSITORY = Path(__file__).absolute().parent.parent
ANYWHERE = "not slurm and not gpu"


@dataclass(frozen=True)
class Mutant:
    """A line of the program, and what stands there in the broken copy."""

    file: str  # below hpc_compress/
    right: str  # stands there once
    wrong: str
    tests: str  # files below tests/, or one test of a file, that should fail


MUTANTS = (
    # measuring
    Mutant(
        "worker.py",
        "base_latency_ms, *best_latency_ms, latency_ms = ",
        "latency_ms, *best_latency_ms, base_latency_ms = ",
        "test_measure.py",
    ),
    Mutant("measure.py", "return 1.96 * 1.4826 * 1.2533 * deviation", "return 0 * deviation", "test_measure.py"),
    Mutant("measure.py", "for _ in range(protocol.warmup_passes):", "for _ in range(0):", "test_measure.py"),
    Mutant("measure.py", "timed.append(_pass_ms(model.eval(), sample, on))", "timed.insert(0, 1.0)", "test_measure.py"),
    Mutant("measure.py", "* tokens / timed_tokens", "", "test_measure.py"),
    Mutant("measure.py", "return sent / spent", "return 1.0", "test_measure.py"),
    Mutant(
        "measure.py",
        "del cut  # before the next one is made",
        "pass",
        "test_pretend_gpu.py::test_a_table_of_block_times_holds_one_cut_model_at_a_time",
    ),
    Mutant("profiling.py", "bare = fixed + grid.depth * layer", "bare = fixed + layer", "test_prediction.py"),
    Mutant("profiling.py", "found[::-1]  # in the order of the batches", "found", "test_prediction.py"),
    # search
    Mutant("search/prediction.py", "found[0] = 0.0", "pass", "test_prediction.py"),
    Mutant("search/prediction.py", "times.layer + times.heads[heads]", "times.heads[heads]", "test_prediction.py"),
    Mutant(
        "driver.py",
        "self._repeats((*population[: self.config.report_candidates], *self._nearest(base)), base)",
        "{}",
        "test_timings.py",
    ),
    Mutant("data/overlap.py", "stays &= self.whole | in_train", "stays |= in_train", "test_splits.py"),
    Mutant("search/genetic.py", "key=self._rank, reverse=True", "key=self._rank", "test_search.py"),
    Mutant(
        "search/genetic.py", "steps = (*steps, mutation, self._fine_tune())", "steps = (*steps, mutation)", "test_search.py"
    ),
    Mutant("search/objective.py", "if self.a > 0 and quality <= 0:", "if False:", "test_search.py"),
    Mutant("search/objective.py", "- self.c * math.log(", "+ self.c * math.log(", "test_search.py"),
    Mutant("search/space.py", "if count < len(self.heads) else None", "", "test_search.py"),
    Mutant("search/coordinates.py", "other + (other >= vector[at])", "other", "test_strategies.py"),
    Mutant("search/knapsack.py", "(1 - removed) * self", "removed * self", "test_strategies.py"),
    Mutant("search/survival.py", "(-scores[id], id)", "(scores[id], id)", "test_strategies.py"),
    Mutant("search/grid.py", "deploys[(at + shift) % len(deploys)]", "deploys[shift]", "test_strategies.py"),
    Mutant("search/regularized_evolution.py", "[-self.members :]", "[: self.members]", "test_strategies.py"),
    Mutant("search/local_search.py", "levels[other] -= not fits()", "pass", "test_strategies.py"),
    Mutant("search/local_search.py", "sample=self._asked", "sample=0", "test_strategies.py"),
    Mutant("search/rl.py", "(rewards - average)[:, None]", "(average - rewards)[:, None]", "test_strategies.py"),
    Mutant("search/rl.py", "max(self.floor, own - base", "max(-np.inf, own - base", "test_strategies.py"),
    Mutant("search/nas.py", "= np.arange(len(vectors))", "= np.arange(len(vectors))[::-1]", "test_strategies.py"),
    Mutant("search/optuna_search.py", "self.members, seed=seed", "self.members", "test_strategies.py"),
    # identity and store
    Mutant("identity.py", "task.base, task.dataset, task.seed, steps", "task.base, task.dataset, steps", "test_search.py"),
    Mutant("identity.py", "if isinstance(value, float) and value.is_integer():", "if False:", "test_search.py"),
    Mutant(
        "store.py", "outcome is not None and identity.is_id_of(task_id, outcome.task)", "outcome is not None", "test_store.py"
    ),
    Mutant("door.py", "if len(content) > most:", "if False:", "test_door.py"),
    Mutant("door.py", "or not Path(os.path.realpath(path)).is_relative_to(os.path.realpath(root)):", ":", "test_door.py"),
    # dispatch and launchers
    Mutant(
        "dispatch.py",
        "left = self.retries + 1 - self.losses[task_id]",
        "left = self.retries - self.losses[task_id]",
        "test_launch.py",
    ),
    Mutant("launch/__init__.py", "bundles = self.bundles[rank::ranks]", "bundles = self.bundles[rank:]", "test_launch.py"),
    Mutant("launch/arrays.py", "min(2 * self.chunk, self.limits.array_size)", "2 * self.chunk", "test_launch.py"),
    # data
    Mutant("data/batches.py", "real = column < lengths", "real = column <= lengths", "test_data.py"),
    Mutant("data/metrics.py", 'average="macro"', 'average="micro"', "test_data.py"),
    Mutant("data/vocabulary.py", 'special["ids"] = [new[index]', 'special["ids"] = [index', "test_vocabulary.py"),
    # models and operators
    Mutant("models/modeling_hpc_compress.py", "(hidden_states + output)", "(output)", "test_families.py"),
    Mutant(
        "models/modeling_hpc_compress.py", "for group in groups for", "for group in groups[:1] * depth for", "test_families.py"
    ),
    Mutant("models/gates.py", "mixed = before + ", "mixed = ", "test_pruning.py"),
    Mutant(
        "models/zeros.py", 'weight_values"] = weight[nonzero]', 'weight_values"] = weight[nonzero].abs()', "test_sparsity.py"
    ),
    Mutant("search/allocation.py", "at -= steps[result[-1]]", "at -= 0", "test_pruning.py"),
    Mutant(
        "pruning/criteria.py",
        "(differentiated * signs.to(outputs.device))",
        "differentiated",
        "test_pruning.py",
    ),
    Mutant("pruning/repair.py", "wanted = wanted - torch.cat(streams", "wanted = wanted + torch.cat(streams", "test_carve.py"),
    Mutant("training/losses.py", "return (apart * mask).sum() / mask.sum()", "return apart.mean()", "test_distillation.py"),
    Mutant(
        "problems/classes.py",
        "F.log_softmax(teacher.float() / temperature",
        "F.log_softmax(teacher.float()",
        "test_distillation.py",
    ),
    Mutant("training/loop.py", "min((step + 1) / (rises + 1), ", "min(1, ", "test_models.py"),
    Mutant("training/loop.py", "weight[rows] = embedding.weight", "weight[rows] = weight[rows]", "test_models.py"),
    Mutant("deployment/gptq.py", "left[stop:] -= factor", "left[stop:] -= 0 * factor", "test_quantization.py"),
    Mutant(
        "deployment/schemes.py",
        "scale = weight.abs().amax(1).clamp(min=1e-30) / 127",
        "scale = weight.abs().amax(1).clamp(min=1e-30) / 64",
        "test_quantization.py",
    ),
)


def main() -> None:
    chosen = [mutant for mutant in MUTANTS if not sys.argv[1:] or any(part in mutant.file for part in sys.argv[1:])]
    missed = 0
    with tempfile.TemporaryDirectory() as scratch:
        for mutant in chosen:
            begin = time.monotonic()
            caught = is_caught(mutant, Path(scratch) / "copy")
            missed += not caught
            change = f"{mutant.right.strip()} -> {mutant.wrong.strip() or 'nothing'}"
            seconds = time.monotonic() - begin
            print(f"{'caught' if caught else 'MISSED'}  {mutant.file}: {change}  ({seconds:.0f} s)", flush=True)
    print(f"{len(chosen) - missed} of {len(chosen)} caught")
    sys.exit(missed > 0)


def is_caught(mutant: Mutant, copy: Path) -> bool:
    """Whether a test fails on a copy that is broken in this way."""
    shutil.rmtree(copy, ignore_errors=True)
    for name in ("hpc_compress", "conf", "tests", "slurm", "benchmarks", "results"):
        shutil.copytree(REPOSITORY / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "Makefile"):
        shutil.copy(REPOSITORY / name, copy)
    path = copy / "hpc_compress" / mutant.file
    text = path.read_text()
    if text.count(mutant.right) != 1:
        raise SystemExit(f"{mutant.file} has {text.count(mutant.right)} times {mutant.right!r}; it must have it once")
    path.write_text(text.replace(mutant.right, mutant.wrong))
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", "-m", ANYWHERE]
    command += [f"tests/{name}" for name in mutant.tests.split()]
    environment = {**os.environ, "PYTHONPATH": str(copy)}
    done = subprocess.run(command, cwd=copy, env=environment, capture_output=True, text=True)
    if done.returncode not in (0, 1):
        raise SystemExit(f"the tests of {mutant.file} did not run: {done.stdout[-2000:]}{done.stderr[-2000:]}")
    return done.returncode == 1


if __name__ == "__main__":
    main()
