"""What README says of the benchmark is what its script counts in the csv."""

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture
def claims(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import claims

    yield claims
    del sys.modules["claims"]


def rows(method: str, share: float, qualities: dict[str, tuple[float, float]], ms: float = 100.0) -> list[dict[str, Any]]:
    """qualities: of each dataset, by seed."""
    return [
        {"dataset": dataset, "method": method, "share": share, "seed": seed, "quality": quality, "latency_ms": ms}
        for dataset, of_seeds in qualities.items()
        for seed, quality in enumerate(of_seeds)
    ]


@pytest.fixture
def table() -> pd.DataFrame:
    return pd.DataFrame(
        [
            *rows("base", 0.0, {"a": (0.9,), "b": (0.9,)}, ms=200),
            *rows("ours, by parameters", 0.5, {"a": (0.80, 0.82), "b": (0.70, 0.70)}),
            *rows("ours, without repair", 0.5, {"a": (0.99, 0.99), "b": (0.99, 0.99)}),
            *rows("strong on a", 0.5, {"a": (0.79, 0.80), "b": (0.60, 0.60)}, ms=150),
            *rows("strong on b", 0.5, {"a": (0.10, 0.10), "b": (0.71, 0.69)}, ms=50),
            *rows("ours, by time", 0.5, {"a": (0.80, 0.80), "b": (0.70, 0.70)}),
            *rows("ours, by parameters", 0.8, {"a": (0.50, 0.50), "b": (0.60, 0.70)}, ms=60),
            *rows("strong on b", 0.8, {"a": (0.40, 0.30), "b": (0.66, 0.67)}, ms=60),
            *rows("ours, by time", 0.8, {"a": (0.50, 0.50), "b": (0.50, 0.50)}, ms=60),
        ]
    )


def test_cases_are_counted_against_the_best_peer_of_each(claims: Any, table: pd.DataFrame):
    best = claims.best(claims.at_equal_size(table))
    means = best.groupby(["dataset", "cut"])["lead"].mean()
    assert means.to_dict() == pytest.approx({("a", 0.5): 0.015, ("b", 0.5): 0, ("a", 0.8): 0.15, ("b", 0.8): -0.015})
    assert best.groupby(["dataset", "cut"])["peer"].first().to_dict()["a", 0.5] == "strong on a"
    text = " ".join(claims.sentences(table).split())
    assert "ahead of the best peer of equal size in 2 of 4 cases (by more than 0.01 in 2), level in 1, behind in 1" in text
    assert "(b 80 %: -0.015); mean lead +0.037" in text or "(b 80 %: -0.015); mean lead +0.038" in text


def test_at_equal_latency_ours_lies_between_its_neighbours(claims: Any, table: pd.DataFrame):
    leads = claims.at_equal_latency(table).set_index(["dataset", "cut", "peer", "seed"])["lead"]
    assert leads["a", 0.5, "strong on a", 0] == pytest.approx((0.80 + 0.90) / 2 - 0.79)
    assert leads["b", 0.8, "strong on b", 1] == pytest.approx(0.50 - 0.67)
    assert ("b", 0.5, "strong on b", 0) not in leads  # faster than all of ours


def test_the_test_is_paired_over_datasets_and_seeds(claims: Any):
    rng = np.random.default_rng(0)
    leads = pd.DataFrame(
        [
            {"dataset": str(dataset), "cut": cut, "peer": "p", "seed": seed, "lead": rng.uniform(0.01, 0.02)}
            for dataset in range(5)
            for seed in (0, 1)
            for cut in (0.5, 0.8)
        ]
    )
    assert claims.p_value(leads) == (pytest.approx(2 / 2**10), 10)  # all of ten pairs on one side: exact
    leads.loc[leads["seed"] == 0, "lead"] *= -1
    assert claims.p_value(leads)[0] > 0.1
    assert claims.p_value(leads.assign(lead=0.0))[0] == 1


def test_rows_of_several_base_models_are_never_mixed(claims: Any, table: pd.DataFrame, tmp_path: Path):
    path = tmp_path / "rows.csv"
    table.assign(base=["0123"] * (len(table) - 1) + ["4567"]).to_csv(path, index=False)
    with pytest.raises(SystemExit, match="several base models for b"):
        claims.read(path)
    table.assign(base="0123").to_csv(path, index=False)
    assert set(claims.read(path)["base"]) == {"0123"}


def test_without_latencies_only_sizes_are_compared(claims: Any, table: pd.DataFrame):
    quality = table[table["method"] != "ours, by time"].drop(columns="latency_ms")
    assert "latency" not in claims.sentences(quality)
    assert "latency" not in claims.cases(quality)
    assert "strong on b" in claims.peers(quality)


@pytest.mark.parametrize("name", ["compression", "compression_peers"])
def test_what_is_said_is_what_the_csv_holds(claims: Any, name: str):
    found = claims.sentences(claims.read(ROOT / "results" / f"{name}.csv"))
    for path in ("README.md", f"results/{name}.md"):
        text = (ROOT / path).read_text(encoding="utf-8")
        said = text.partition(claims.BEGIN.format(name=name))[2].partition(claims.END)[0].strip()
        assert said == found, path
