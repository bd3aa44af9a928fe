"""How fast models in folders are on the machine at hand: exported ones, and the base model that they came from."""

import itertools
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
import transformers
from transformers import AutoConfig, AutoModel, AutoTokenizer, PreTrainedModel
from transformers.utils import logging as transformers_logging

from hpc_compress import door, measure
from hpc_compress.config import ConfigError
from hpc_compress.data.batches import Batch, Encoded, eval_batches
from hpc_compress.door import DamageError
from hpc_compress.models import artifact
from hpc_compress.types import MeasurementProtocol

FEWEST = 5  # passes from which a confidence interval is given
COLUMNS = {"batch_size": "texts a batch", "length": "tokens a text"}


class Timed(NamedTuple):
    """A model in a folder."""

    name: str
    folder: Path
    model: PreTrainedModel
    tokens: np.ndarray  # ids of ordinary tokens
    pad_id: int
    longest: int  # tokens a text
    own_bytes: int  # that the allocator gave out when it was loaded; 0 on a CPU


def run(
    folders: Sequence[Path], batch_sizes: Sequence[int], lengths: Sequence[int], device: str = "any", seconds: float = 10.0
) -> pd.DataFrame:
    """Time all models in turns, for every batch size and length. Texts are random tokens.

    seconds: the longest time for one batch size and length, all models together.

    Returns: a row for each model, batch size and length, with `model`, `batch_size` (texts), `length` (tokens a text),
    `latency_ms` (median of a batch), `latency_error` (half of its 95 % confidence interval, as a share; NaN for under 5 passes,
    where `seconds` are too few), `passes`, `texts_per_second`,
    `speed_up` (over the first model), `model_bytes`, `parameters` and `peak_bytes` (of a GPU; None on a CPU).

    Raises: ConfigError for folders, sizes or a device that can't be timed; DamageError for a damaged folder.
    """
    _require_sizes(batch_sizes, lengths)
    if not seconds > 0:
        raise ConfigError(f"--seconds {seconds:g}: give more than 0")
    try:
        on = measure.device(device)
    except RuntimeError as error:
        raise ConfigError(str(error).replace("protocol.device=", "--device=")) from None
    models = _loaded(folders, on)
    for each in models:
        if max(lengths) > each.longest:
            raise ConfigError(f"{each.folder} reads {each.longest} tokens at most, and --lengths has {max(lengths)}")
    how = MeasurementProtocol(warmup_passes=2, min_passes=7, max_passes=200, tolerance=0.01, max_seconds=seconds)
    rows: list[dict[str, Any]] = []
    for size, length in itertools.product(sorted(set(batch_sizes)), sorted(set(lengths))):
        samples = [(each.model, [_batch(each, size, length).to(on)]) for each in models]
        try:
            times = measure.latencies_ms(samples, how, on)
        except RuntimeError as error:  # too little memory, or a precision that this device lacks
            said = door.one_line(str(error))
            raise ConfigError(f"batches of {size} texts can't be timed: {said}; try smaller ones, or --device=cpu") from error
        for each, (model, sample), passes in zip(models, samples, times, strict=True):
            rows.append(
                {
                    "model": each.name,
                    "batch_size": size,
                    "length": length,
                    "latency_ms": median(passes),
                    "latency_error": measure.confidence(passes) if len(passes) >= FEWEST else np.nan,
                    "passes": len(passes),
                    "texts_per_second": 1e3 * size / median(passes),
                    # Of passes in the same turn, so that a machine that grows slower or warmer treats all alike.
                    "speed_up": 1 / median(measure.ratios(passes, times[0])),
                    "model_bytes": _bytes(each.folder),
                    "parameters": artifact.parameters(model)[0] if artifact.is_program(model) else model.num_parameters(),
                    "peak_bytes": measure.peak_bytes(model, sample, on, each.own_bytes),
                }
            )
    return pd.DataFrame(rows).assign(device=measure.device_name(on))


def as_text(table: pd.DataFrame) -> str:
    """Two Markdown tables: what the models are, and what a batch takes."""
    names = list(dict.fromkeys(table["model"]))
    peak = table["peak_bytes"].notna().any()
    sizes = [
        {
            "model": name,
            "megabytes": f"{rows['model_bytes'].iloc[0] / 1e6:.1f}",
            "of the first": f"1/{table['model_bytes'].iloc[0] / rows['model_bytes'].iloc[0]:.1f}",
            "million parameters": f"{rows['parameters'].iloc[0] / 1e6:.2f}",
            **({"GPU memory, MB": f"{rows['peak_bytes'].max() / 1e6:.0f}"} if peak else {}),
        }
        for name in names
        for rows in [table[table["model"] == name]]
    ]
    times = []
    for sizes_of_batch, rows in table.groupby(list(COLUMNS), sort=False):
        cells = dict(zip(COLUMNS.values(), map(str, sizes_of_batch), strict=True))  # type: ignore[arg-type]
        found = rows.to_dict("records")
        for row in found:
            error = "" if np.isnan(row["latency_error"]) else f" ± {row['latency_error'] * row['latency_ms']:.2f}"
            cells[f"{row['model']}, ms"] = f"{row['latency_ms']:.2f}{error}"
        cells |= {f"{row['model']}, speed-up": f"{row['speed_up']:.2f}x" for row in found[1:]}
        times.append(cells)
    parts = [
        pd.DataFrame(part)
        .map(door.markdown_cell)
        .rename(columns=door.markdown_cell)
        .to_markdown(index=False, disable_numparse=True)
        for part in (sizes, times)
    ]
    note = (
        f"Milliseconds of one batch on {door.one_line(table['device'].iloc[0])}: the median, and half of its 95 % confidence "
        f"interval. Speed-ups are over {names[0]}, pass by pass in turns. The texts are random tokens."
    )
    if table["latency_error"].isna().any():
        note += f" Where no interval stands there were fewer than {FEWEST} passes: raise --seconds."
    return "\n\n".join([*parts, note])


def _require_sizes(batch_sizes: Sequence[int], lengths: Sequence[int]) -> None:
    if not batch_sizes or min(batch_sizes) < 1:
        raise ConfigError(f"--batch-sizes {' '.join(map(str, batch_sizes))}: give numbers of texts of 1 or more")
    if not lengths or min(lengths) < 4:
        raise ConfigError(f"--lengths {' '.join(map(str, lengths))}: give numbers of tokens of 4 or more")


def _loaded(folders: Sequence[Path], on: torch.device) -> list[Timed]:
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    configs = [_config(folder) for folder in folders]
    kinds: dict[str, Any] = {kind.__name__: kind for kind in (*artifact.STOCK, *artifact.PROGRAMS)}
    exported = [kinds[name] for config in configs if (name := _architecture(config)) in kinds]
    # A base model may bring another head, or none. With that of an exported model, all do the same work.
    auto_class = exported[0].auto_class if exported else None
    return [
        _timed(folder, name, config, auto_class, on)
        for folder, name, config in zip(folders, _names(folders), configs, strict=True)
    ]


def _config(folder: Path) -> dict[str, Any]:
    try:
        return door.json_object(folder / "config.json")
    except FileNotFoundError:
        raise ConfigError(f"{folder} is no folder of a model: it has no config.json") from None


def _architecture(config: dict[str, Any]) -> str:
    named = config.get("architectures")
    return str(named[0]) if isinstance(named, list) and named else ""


def _names(folders: Sequence[Path]) -> list[str]:
    """The last parts of the paths, as many as tell them apart."""
    parts = [folder.absolute().parts for folder in folders]
    for count in range(1, max(map(len, parts)) + 1):
        names = ["/".join(each[-count:]) for each in parts]
        if len(set(names)) == len(names):
            return names
    raise ConfigError(f"{folders[0]} is given more than once; name each folder once")


def _timed(folder: Path, name: str, config: dict[str, Any], auto_class: Any, on: torch.device) -> Timed:
    before = measure.allocated_bytes(on)
    try:
        if config.get("model_type") == artifact.modeling.HpcCompressConfig.model_type:
            model = artifact.load(folder, on)
        else:
            own: Any = getattr(transformers, _architecture(config), None)
            if not (isinstance(own, type) and issubclass(own, PreTrainedModel)):
                own = AutoModel
            stock = AutoConfig.from_pretrained(folder, trust_remote_code=False)
            stock._attn_implementation = None  # transformers chooses; a config may name a kernel, which is code of the hub
            load = (auto_class or own).from_pretrained
            model = load(folder, config=stock, use_safetensors=True, trust_remote_code=False).to(on)
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except (ImportError, RuntimeError) as error:
        raise ConfigError(f"{folder} can't be used on this machine: {door.one_line(str(error))}") from error
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DamageError(f"{folder} can't be loaded: {door.one_line(str(error))}") from error
    ordinary = np.setdiff1d(np.arange(len(tokenizer)), tokenizer.all_special_ids)
    stock = config.get("stock") if isinstance(config.get("stock"), dict) else config
    positions = int((stock or {}).get("max_position_embeddings") or 10**9)
    longest, own_bytes = min(tokenizer.model_max_length, positions), measure.allocated_bytes(on) - before
    return Timed(name, folder, model.eval(), ordinary, tokenizer.pad_token_id, longest, own_bytes)


def _batch(each: Timed, size: int, length: int) -> Batch:
    """One text is a token shorter than the others, as almost always in a real batch: models treat a batch without padding
    in another way."""
    lengths = np.array([length] * (size - 1) + [length - (size > 1)])
    ids = np.random.default_rng(0).choice(each.tokens, lengths.sum()).astype(np.int32)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    return next(iter(eval_batches(Encoded(ids, None, offsets, np.zeros(size, np.int64), each.pad_id), size)))


def _bytes(folder: Path) -> int:
    """Of the files with weights."""
    program = folder / artifact.modeling.PROGRAM
    return sum(path.stat().st_size for path in ([program] if program.is_file() else folder.glob("*.safetensors")))
