"""Texts from files of lines, one text a line, and from two parallel ones. Knows pandas, no torch."""

from pathlib import Path

import pandas as pd

from hpc_compress.config import ConfigError, DatasetConfig, resource


def read(path: Path, config: DatasetConfig) -> pd.DataFrame:
    """One row a line: the column of the text, and text2 of the file `parallel`.

    Raises: ConfigError for files that are not parallel; UnicodeError.
    """
    first = _lines(path, config.encoding)
    if config.parallel is None:
        return pd.DataFrame({config.text: first})
    other = resource(config.parallel)
    if not other.is_file():
        raise ConfigError(f"dataset.parallel={config.parallel!r} is no file; give the file of the second texts, one a line")
    second = _lines(other, config.encoding)
    if len(first) != len(second):
        raise ConfigError(
            f"{path} has {len(first)} lines and {other} has {len(second)}; line n of the one must belong to line n of the other"
        )
    return pd.DataFrame({config.text: first, "text2": second})


def _lines(path: Path, encoding: str) -> list[str]:
    # Only the ends of lines: `splitlines` also cuts at signs such as U+2028, which stand in texts.
    lines = path.read_text(encoding=encoding).split("\n")
    return lines if lines[-1] else lines[:-1]
