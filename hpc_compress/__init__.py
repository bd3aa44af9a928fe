"""Genetic search for the best compressed BERT-like model on the device that it will run on."""

from typing import TYPE_CHECKING, Any

QUESTIONS = ("best", "fitness", "front", "hypervolume", "lineage", "load_runs")  # of pandas tables

__all__ = ["best", "compare", "fitness", "front", "hypervolume", "lineage", "load_model", "load_runs"]

if TYPE_CHECKING:
    from hpc_compress.analysis.candidates import best, fitness, front, hypervolume, lineage, load_runs
    from hpc_compress.analysis.compare import table_of_ends as compare
    from hpc_compress.models.artifact import load as load_model


def __getattr__(name: str) -> Any:
    # Late, so that a notebook that reads runs needs no torch, and a login node no pandas.
    if name in QUESTIONS:
        from hpc_compress.analysis import candidates

        return getattr(candidates, name)
    if name == "compare":
        from hpc_compress.analysis.compare import table_of_ends

        return table_of_ends
    if name == "load_model":
        from hpc_compress.models.artifact import load

        return load
    raise AttributeError(f"module 'hpc_compress' has no attribute {name!r}")
