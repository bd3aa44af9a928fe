"""Finds the base model and copies it into the run folder. Reads JSON and safetensors headers; knows no torch."""

import json
import shlex
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from hpc_compress import door, identity
from hpc_compress.config import ConfigError, ModelConfig, resource
from hpc_compress.models import inspection
from hpc_compress.types import Base

# What is needed of a pretrained model. Pickled weights are left where they are.
PATTERNS = (
    "config.json",
    "*.safetensors",
    "*.safetensors.index.json",
    "tokenizer*",
    "vocab*",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "spm.model",
    "spiece.model",
    "sentencepiece*.model",
)


@dataclass(frozen=True)
class Pretrained:
    """A pretrained model on this machine: config, weights and tokenizer in one folder."""

    name: str
    folder: Path
    revision: str | None
    config: dict[str, Any]  # its config.json

    @property
    def files(self) -> list[Path]:
        return sorted({path for pattern in PATTERNS for path in self.folder.glob(pattern) if path.is_file()})

    @property
    def labels(self) -> tuple[str, ...]:
        """Class names in the order of the head's outputs; two nameless ones when the config says nothing."""
        names = self.config.get("id2label") or {str(n): f"LABEL_{n}" for n in range(self.config.get("num_labels") or 2)}
        return tuple(str(names[key]) for key in sorted(names, key=int))

    def has_head(self, prefix: str) -> bool:
        """Whether the names of some weights begin so."""
        headers = (inspection.header(path) for path in self.files if path.suffix == ".safetensors")
        return any(name.startswith(prefix) for names in headers for name in names)


def find(config: ModelConfig) -> Pretrained:
    """Find a local checkpoint, or one on the hub (from the cache when there is no network).

    Raises: ConfigError when there is none, none with safetensors weights, or none that can be used; DamageError for a
    damaged file.
    """
    folder, revision = resource(config.path), config.revision
    if not folder.is_dir():
        folder, revision = _from_hub(config)
    for needed, advice in (
        ("config.json", "give the folder that holds it"),
        ("*.safetensors", "pickled weights are never loaded; save the model again with save_pretrained"),
        ("tokenizer*", "save the tokenizer into the same folder with save_pretrained"),
    ):
        if not any(folder.glob(needed)):
            raise ConfigError(f"model.path={config.path!r}: no {needed} in {folder}; {advice}")
    found = Pretrained(config.path, folder, revision, door.json_object(folder / "config.json"))
    inspection.inspect(folder, found.files, found.config)
    return found


def _from_hub(config: ModelConfig) -> tuple[Path, str | None]:
    from huggingface_hub import snapshot_download

    try:
        wanted = [*PATTERNS, "modules.json", "*/config.json"]  # the last two say how a sentence encoder pools
        folder = Path(snapshot_download(config.path, revision=config.revision, allow_patterns=wanted))
    except Exception as error:
        # huggingface_hub raises many kinds here, most of them when there is no network.
        raise ConfigError(
            f"model.path={config.path!r} is no local folder and could not be had from the hub ({error}); check the name, or "
            f"fetch it where there is a network: hpc-compress prefetch model.path={shlex.quote(config.path)}, with the other "
            "words of this search"
        ) from error
    return folder, folder.name  # the snapshot's folder is named by its commit


def adopt(
    found: Pretrained, config: ModelConfig, target: Path, head_fits: bool, described: Mapping[str, Any] = MappingProxyType({})
) -> Base:
    """Copy the model into the run folder and say what it is. If its head does not fit, training one becomes a step.

    described: what is written into its config.json besides what stands there.

    Raises: ConfigError when model.head=trained and the head does not fit.
    """
    train_head = config.head == "new" or not head_fits
    shutil.rmtree(target, ignore_errors=True)  # of an attempt that came to nothing, perhaps with another model
    target.mkdir(parents=True)
    for path in found.files:
        shutil.copyfile(path, target / path.name)
    if described:
        (target / "config.json").write_text(json.dumps({**found.config, **described}, indent=2) + "\n", encoding="utf-8")
    return Base(
        name=found.name,
        revision=found.revision,
        fingerprint=identity.files_hash([target / path.name for path in found.files]),
        preparation=config.preparation if train_head else (),
    )


def head_fits(found: Pretrained, config: ModelConfig, prefix: str, outputs: int, dataset: str) -> bool:
    """Whether the model brings a task head with so many outputs.

    Raises: ConfigError when it must, since model.head=trained.
    """
    has_head = found.has_head(prefix)
    fits = not prefix or (has_head and len(found.labels) == outputs)
    if config.head == "trained" and not fits:
        raise ConfigError(
            f"model.head=trained, but {found.name} has {len(found.labels) if has_head else 'no head, not'}"
            f" {outputs} outputs as {dataset} needs; set model.head=new to train one"
        )
    return fits
