"""Genetic search for the best compressed BERT-like model on the device that it will run on."""

from typing import TYPE_CHECKING, Any

__all__ = ["load_model", "load_runs"]

if TYPE_CHECKING:
    from hpc_compress.analysis import load_runs
    from hpc_compress.models.artifact import load as load_model


def __getattr__(name: str) -> Any:
    # Late, so that a notebook that reads runs needs no torch, and a login node no pandas.
    if name == "load_runs":
        from hpc_compress.analysis import load_runs

        return load_runs
    if name == "load_model":
        from hpc_compress.models.artifact import load

        return load
    raise AttributeError(f"module 'hpc_compress' has no attribute {name!r}")
