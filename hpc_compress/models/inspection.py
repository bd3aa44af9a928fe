"""What is wrong with a checkpoint, found in its files before any job. Knows no torch."""

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from safetensors import SafetensorError, safe_open

from hpc_compress import door
from hpc_compress.config import MOST_CLASSES, ConfigError, shortened


class Layers(NamedTuple):
    """How one family keeps its layers in a checkpoint."""

    path: str
    counts: tuple[str, ...]  # names of their number in config.json
    word: str  # what a message calls one of them


_BERT_LIKE = ("bert", "roberta", "xlm-roberta", "electra", "deberta-v2", "mpnet")
LAYERS = {  # the same families as in modeling_hpc_compress
    **dict.fromkeys(_BERT_LIKE, Layers("encoder.layer", ("num_hidden_layers",), "layer")),
    "distilbert": Layers("transformer.layer", ("n_layers", "num_hidden_layers"), "layer"),
    "albert": Layers("encoder.albert_layer_groups", ("num_hidden_groups",), "group"),  # layers of a group share weights
    "modernbert": Layers("layers", ("num_hidden_layers",), "layer"),
}
ALIKE = {"mpnet"}  # families whose layers share one position bias, so that all must keep the same heads
NORMLESS = ("modernbert", "attn_norm.")  # its first layer has no such weights
EMBEDDING = re.compile(r"(?:.*\.)?embeddings\.(?:word|tok)_embeddings\.weight")
KINDS: dict[str, Any] = {"F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": np.uint16}
VOCABULARIES = ("tokenizer.json", "vocab.json", "vocab.txt")  # the first one that is there holds
CHUNK_BYTES = 2**22
HEADS, WIDTH = ("num_attention_heads", "n_heads"), ("hidden_size", "dim")  # in config.json, by family
COUNTS = (  # in config.json
    "num_hidden_layers",
    "n_layers",
    "num_hidden_groups",
    "inner_group_num",
    *HEADS,
    *WIDTH,
    "intermediate_size",
    "hidden_dim",
    "embedding_size",
    "vocab_size",
    "max_position_embeddings",
    "num_labels",
)


@dataclass(frozen=True)
class Tensor:
    """A tensor in a safetensors file."""

    path: Path
    kind: str  # as the format calls it
    shape: tuple[int, ...]
    begin: int  # first byte in the file
    end: int  # past the last one


def inspect(folder: Path, files: list[Path], config: Mapping[str, Any]) -> None:
    """Compare weights, config and tokenizer.

    Raises: ConfigError for files that do not fit together or a model that is not supported; DamageError for a damaged file.
    """
    _check_config(folder, config)
    if not (folder / "model.safetensors").is_file():
        _check_index(folder / "model.safetensors.index.json")
    tensors = {name: tensor for path in files if path.suffix == ".safetensors" for name, tensor in header(path).items()}
    _check_layers(folder, tensors, config)
    rows = _check_embedding(folder, tensors, config)
    if rows is not None:
        _check_tokenizer(folder, rows)
    for name, tensor in tensors.items():
        if not _is_finite(tensor):
            raise ConfigError(f"{tensor.path}: {name} has NaN or infinite values; choose a checkpoint whose training went well")


def header(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file by name.

    Raises: DamageError.
    """
    try:
        with safe_open(str(path), framework="np"):  # checks the header against the file
            pass
        with path.open("rb") as stream:
            first = 8 + int.from_bytes(stream.read(8), "little")
            found = json.loads(stream.read(first - 8))
    except (SafetensorError, ValueError, RecursionError) as error:
        raise door.DamageError(f"{path} is cut short or no safetensors file: {door.one_line(str(error))}") from None
    found.pop("__metadata__", None)
    return {
        name: Tensor(path, item["dtype"], tuple(item["shape"]), *(first + offset for offset in item["data_offsets"]))
        for name, item in found.items()
    }


def _check_config(folder: Path, config: Mapping[str, Any]) -> None:
    path, family = folder / "config.json", config.get("model_type")
    if not isinstance(family, str) or family not in LAYERS:
        what = "has no model_type" if family is None else f"says model_type {shortened(family)!r}, which is not supported"
        raise ConfigError(f"{path} {what}; choose a checkpoint of {', '.join(LAYERS)}")
    for key in COUNTS:
        value = config.get(key)
        if value is not None and (type(value) is not int or not 0 < value < 2**31):
            raise ConfigError(f"{path}: {key} must be a whole number above 0; got {shortened(repr(value))}")
    if config.get("inner_group_num", 1) != 1:
        raise ConfigError(
            f"{path}: inner_group_num is {config['inner_group_num']}, and only 1 is supported; choose another checkpoint"
        )
    if (config.get("num_labels") or 0) > MOST_CLASSES:
        raise ConfigError(
            f"{path}: num_labels is {config['num_labels']}, and a model of at most {MOST_CLASSES} classes is needed"
        )
    heads, width = (config.get(one, config.get(other)) for one, other in (HEADS, WIDTH))
    if heads and width and width % heads:
        raise ConfigError(f"{path}: {heads} attention heads can't share a width of {width}; the config does not fit a model")
    names = config.get("id2label")
    if names is not None and (
        not isinstance(names, dict) or set(names) != {str(number) for number in range(len(names))} or not names
    ):
        raise ConfigError(f"{path}: id2label must name the classes 0, 1, ...; got {shortened(names)}")


def _check_index(path: Path) -> None:
    try:
        listed = door.json_object(path).get("weight_map")
    except FileNotFoundError:
        raise ConfigError(
            f"{path.parent} has neither model.safetensors nor {path.name}; save it with save_pretrained"
        ) from None
    names = sorted({str(name) for name in listed.values()}) if isinstance(listed, dict) else []
    missing = [name for name in names if "/" in name or not (path.parent / name).is_file()]
    if not names or missing:
        raise ConfigError(
            f"{path} lists files that are not there: {', '.join(missing) or 'none at all'}; fetch the model again"
        )


def _check_layers(folder: Path, tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> None:
    family = config["model_type"]
    place, names, word = LAYERS[family]
    pattern = re.compile(rf"(?:.*\.)?{re.escape(place)}\.(\d{{1,9}})\.(.+)")
    layers: dict[int, dict[str, tuple[int, ...]]] = {}
    for name, tensor in tensors.items():
        if match := pattern.fullmatch(name):
            layers.setdefault(int(match[1]), {})[match[2]] = tensor.shape
    count = next((config[name] for name in names if config.get(name) is not None), None)
    if count is None:
        return  # Shape.of refuses it; ALBERT's one group goes without saying
    whole: dict[str, tuple[int, ...]] = {}
    for layer in layers.values():
        whole = {**layer, **whole}
    for number in range(count):
        layer = layers.get(number, {})
        for name, shape in whole.items() or [("", ())]:
            if layer.get(name) == shape and whole:
                continue
            if number == 0 and family == NORMLESS[0] and name.startswith(NORMLESS[1]) and name not in layer:
                continue
            what = f"has another shape of {name}" if name in layer else f"lacks {name or 'all'}" if layer else "is missing"
            raise ConfigError(
                f"{folder}: config.json says {count} {word}s, and {word} {number} {what} in the weights; "
                "the files do not belong together, so fetch or save the model again"
            )


def _check_embedding(folder: Path, tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> int | None:
    """How many pieces the model knows; None where the weights do not tell."""
    found = next((tensor for name, tensor in tensors.items() if EMBEDDING.fullmatch(name)), None)
    if found is None:
        return None
    rows, said = found.shape[0] if found.shape else 0, config.get("vocab_size")
    if said is not None and said != rows:
        raise ConfigError(
            f"{folder}: config.json says vocab_size={said}, and the embedding has {rows} rows; "
            "the files do not belong together, so fetch or save the model again"
        )
    return rows


def _check_tokenizer(folder: Path, rows: int) -> None:
    """Raises: ConfigError for a tokenizer with more pieces than the model knows, as far as its files are JSON or text.

    A tokenizer that is saved as a sentencepiece model alone (spm.model, sentencepiece.bpe.model) is not checked.
    """
    path = next((path for name in VOCABULARIES if (path := folder / name).is_file()), None)
    if path is None:
        return
    if path.suffix == ".txt":
        last = len(door.read_bytes(path).rstrip().splitlines()) - 1
    else:
        found = door.json_object(path)
        last = max(_ids(found if path.name == "tokenizer.json" else {"model": {"vocab": found}}), default=-1)
    if last >= rows:
        raise ConfigError(
            f"{path} knows a piece with the number {last}, and the embedding of the model has {rows} rows only; "
            "give the tokenizer that the model was trained with"
        )


def _ids(tokenizer: dict[str, Any]) -> Iterator[int]:
    model = tokenizer.get("model")
    pieces = model.get("vocab") if isinstance(model, dict) else None
    if isinstance(pieces, dict):
        yield from (number for number in pieces.values() if isinstance(number, int))
    elif isinstance(pieces, list):
        yield len(pieces) - 1
    added = tokenizer.get("added_tokens")
    for item in added if isinstance(added, list) else []:
        if isinstance(item, dict) and isinstance(item.get("id"), int):
            yield item["id"]


def _is_finite(tensor: Tensor) -> bool:
    if tensor.kind not in KINDS:
        return True
    with tensor.path.open("rb") as stream:
        stream.seek(tensor.begin)
        left = tensor.end - tensor.begin
        while left > 0 and (content := stream.read(min(left, CHUNK_BYTES))):
            left -= len(content)
            values = np.frombuffer(content, KINDS[tensor.kind])
            # numpy knows no bfloat16: there, all bits of the exponent are set in NaN and infinity.
            odd = (values & 0x7F80) == 0x7F80 if tensor.kind == "BF16" else ~np.isfinite(values)
            if odd.any():
                return False
    return True
