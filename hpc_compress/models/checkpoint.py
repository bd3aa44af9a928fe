"""Finding the base checkpoint and copying it into the run folder. Reads JSON and safetensors headers; knows no torch."""

import shlex
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hpc_compress import door, identity
from hpc_compress.config import ConfigError, ModelConfig, resource
from hpc_compress.models import inspection
from hpc_compress.types import Base, Dataset, Step

# What a classifier needs from a checkpoint. Pickled weights are left where they are.
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
    "sentencepiece*.model",
)


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint on this machine."""

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

    @property
    def has_head(self) -> bool:
        headers = (inspection.header(path) for path in self.files if path.suffix == ".safetensors")
        return any(name.startswith("classifier.") for names in headers for name in names)


def find(config: ModelConfig) -> Checkpoint:
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
    found = Checkpoint(config.path, folder, revision, door.json_object(folder / "config.json"))
    inspection.inspect(folder, found.files, found.config)
    return found


def _from_hub(config: ModelConfig) -> tuple[Path, str | None]:
    from huggingface_hub import snapshot_download

    try:
        folder = Path(snapshot_download(config.path, revision=config.revision, allow_patterns=list(PATTERNS)))
    except Exception as error:
        # huggingface_hub raises many kinds here, most of them when there is no network.
        raise ConfigError(
            f"model.path={config.path!r} is no local folder and could not be had from the hub ({error}); check the name, or "
            f"fetch it where there is a network: hpc-compress prefetch model.path={shlex.quote(config.path)}, with the other "
            "words of this search"
        ) from error
    return folder, folder.name  # the snapshot's folder is named by its commit


def adopt(checkpoint: Checkpoint, config: ModelConfig, dataset: Dataset, target: Path) -> Base:
    """Copy the checkpoint into the run folder and say what it is. A missing task head becomes a step of training.

    Raises: ConfigError when model.head=trained and the head does not fit the dataset.
    """
    outputs = len(dataset.labels) or 1
    fits = checkpoint.has_head and len(checkpoint.labels) == outputs
    if config.head == "trained" and not fits:
        raise ConfigError(
            f"model.head=trained, but {checkpoint.name} has {len(checkpoint.labels) if checkpoint.has_head else 'no head, not'}"
            f" {outputs} outputs as {dataset.name} needs; set model.head=new to train one"
        )
    train_head = config.head == "new" or not fits
    shutil.rmtree(target, ignore_errors=True)  # of an attempt that came to nothing, perhaps with another model
    target.mkdir(parents=True)
    for path in checkpoint.files:
        shutil.copyfile(path, target / path.name)
    return Base(
        name=checkpoint.name,
        revision=checkpoint.revision,
        fingerprint=identity.files_hash([target / path.name for path in checkpoint.files]),
        preparation=preparation(config) if train_head else (),
    )


def preparation(config: ModelConfig) -> tuple[Step, ...]:
    """How a new head is trained."""
    return (Step(operator="fine_tune", params=config.fine_tune),)
