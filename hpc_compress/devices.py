"""Files of devices, as `hpc-compress profile` writes them: read as a stranger's data, and checked against a search."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hpc_compress import door, identity
from hpc_compress.config import ConfigError
from hpc_compress.search.prediction import Prediction, timed
from hpc_compress.search.space import Shape
from hpc_compress.types import DeviceProfile, Profiling, Step, Surveyed

ADVICE = "write it anew with hpc-compress profile and the words of this search"


def read(paths: Sequence[str], model: Mapping[str, Any], shape: Shape) -> tuple[DeviceProfile, ...]:
    """model: config.json of the base model.

    Raises: ConfigError for a file that is not there, is damaged, or is of layers of another kind or size.
    """
    return tuple(_read(path, model, shape) for path in paths)


def _read(path: str, model: Mapping[str, Any], shape: Shape) -> DeviceProfile:
    try:
        found = door.record(Path(path).expanduser(), DeviceProfile)
    except door.DamageError as error:
        raise ConfigError(f"device={path}: {error}; {ADVICE}") from None
    if found is None:
        raise ConfigError(f"device={path} is not there; {ADVICE} and --out={path}")
    hidden = shape.widths[0] if shape.widths else found.hidden
    own = {"model_type": model.get("model_type"), "hidden": hidden, "head_size": hidden // max(1, shape.heads[0])}
    for name, value in own.items():
        if getattr(found, name) != value:
            raise ConfigError(
                f"device={path} is of models with {name}={door.one_line(str(getattr(found, name)))}, and the base model has "
                f"{name}={value}; {ADVICE}"
            )
    return found


def require_reach(found: Sequence[DeviceProfile], paths: Sequence[str], survey: Surveyed) -> None:
    """Raises: ConfigError when a device was profiled with batches much smaller than those that the search times."""
    for profile, path in zip(found, paths, strict=True):
        try:
            Prediction.of(survey, profile)
        except ValueError as error:
            raise ConfigError(f"device={path}: {error}") from None


def require_precisions(found: Sequence[DeviceProfile], paths: Sequence[str], wanted_by: Profiling) -> None:
    """Raises: ConfigError when a device was not profiled in a precision that the strategy wants to know."""
    wanted = [(), *map(timed, wanted_by.deploys)]
    for profile, path in zip(found, paths, strict=True):
        known = {identity.canonical(list(block.deploy)) for block in profile.blocks}
        for chain in wanted:
            if identity.canonical(list(chain)) not in known:
                said = " > ".join(map(_said, chain)) or "fp32"
                raise ConfigError(f"device={path} has no times for {said}, which the strategy may deploy in; {ADVICE}")


def _said(step: Step) -> str:
    """A precision, with that of its embeddings if it names one."""
    embeddings = step.params.get("embeddings")
    return str(step.params.get("scheme", step.operator)) + (f" with embeddings={embeddings}" if embeddings else "")
