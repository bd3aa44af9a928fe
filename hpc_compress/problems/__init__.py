"""What a dataset asks of a model, one object for each kind of problem. Nothing else asks which kind it is."""

from hpc_compress.config import ConfigError
from hpc_compress.problems.base import Problem
from hpc_compress.problems.classification import Classification
from hpc_compress.problems.embedding import Embedding
from hpc_compress.problems.regression import Regression
from hpc_compress.problems.token_classification import TokenClassification
from hpc_compress.types import Dataset

__all__ = ["PROBLEMS", "Problem", "problem", "problem_of"]

PROBLEMS: dict[str, Problem] = {
    "classification": Classification(),
    "regression": Regression(),
    "token_classification": TokenClassification(),
    "embedding": Embedding(),
}


def problem(name: str) -> Problem:
    """The problem that `dataset.problem` names.

    Raises: ConfigError when there is none of this name.
    """
    if name not in PROBLEMS:
        raise ConfigError(f"dataset.problem={name!r} is not a known problem; choose one of {', '.join(PROBLEMS)}")
    return PROBLEMS[name]


def problem_of(dataset: Dataset) -> Problem:
    """The problem of a dataset, with what the dataset says of it."""
    return problem(dataset.problem).of(dataset)
