"""What the documents say of results is what a script counts in their csv files."""

import re
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
    counted = (
        "At equal size, `prune` is ahead of the best peer in 2 of 4 cases (by more than 0.01 in 2), level in 1, behind in 1"
    )
    assert counted in text
    assert re.search(r"\(b 80 %: -0\.015\)\. The mean lead is \+0\.03[78]", text)


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


def test_where_half_or_more_is_removed_is_told_apart_from_where_less_is(claims: Any, table: pd.DataFrame):
    less = table.assign(share=table["share"].replace(0.5, 0.33))
    parts = claims.sentences(less).split("\n\n")
    assert parts[0] == "When 80 % of the encoder or more is removed:"
    assert parts[2] == "When a third of the encoder is removed:"
    assert "in 1 of 2 cases" in " ".join(parts[1].split())


# --- documents ---


def test_every_document_says_what_the_csv_files_hold(claims: Any):
    for name in claims.DOCUMENTS:
        text = (ROOT / name).read_text(encoding="utf-8")
        assert claims.rendered(text) == text, f"{name} is out of date; python benchmarks/claims.py writes it"


def test_every_block_is_in_a_document(claims: Any):
    text = "".join((ROOT / name).read_text(encoding="utf-8") for name in claims.DOCUMENTS)
    assert [name for name in claims.BLOCKS if claims.BEGIN.format(name=name) not in text] == []
    assert "<!-- claims: demo -->" in (ROOT / "README.md").read_text(encoding="utf-8")


def test_a_document_that_says_something_else_is_rewritten(claims: Any):
    text = "before\n\n<!-- claims: demo -->\n| base model | 0.999 |\n<!-- /claims -->\n\nafter 0.999\n"
    found = claims.rendered(text)
    assert found.startswith("before\n\n<!-- claims: demo -->\n|")
    assert found.endswith("<!-- /claims -->\n\nafter 0.999\n")
    assert found.count("0.999") == 1
    with pytest.raises(KeyError, match="nothing"):
        claims.rendered("<!-- claims: nothing -->\n<!-- /claims -->")


def test_the_table_of_the_demo_has_its_report_in_words(claims: Any):
    report = pd.DataFrame(
        [
            ("base model", "accuracy", 0.9, 0.01, 10.65, 90.87, 393.8, 1.0, "base"),
            ("best", "accuracy", 0.8583, 0.0123, 5.92, 10.66, 62.9, 6.447, "prune_0.25 > fine_tune > prune_0.25 > distill"),
            ("target", "accuracy", 0.891, 0.0111, 7.5, 11, 100, 3.5, "carve > quantize_nf4"),
        ],
        columns=["method", "metric", "quality", "quality_error", "encoder_m", "mb", "latency_ms", "speed_up", "genome"],
    )
    front = report.iloc[:1].assign(method="front", quality=0.8)  # what was measured on the search split is left out
    report = pd.concat([report.assign(split="report"), front.assign(split="search")])
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in claims.demo(report).splitlines()]
    assert rows[0] == ["", "accuracy", "encoder, M", "size, MB", "inference, ms", "speed-up"]
    assert rows[2:] == [
        ["base model", "0.900 ± 0.010", "10.65", "90.9", "394", ""],
        ["target: cut, 4 bits (nf4)", "0.891 ± 0.011", "7.50", "11.0", "100", "3.50x"],
        ["best: cut by a quarter twice, distilled", "0.858 ± 0.012", "5.92", "10.7", "63", "6.45x"],
    ]


def curve(strategy: str, seconds: list[float], many: list[float], volumes: list[float]) -> pd.DataFrame:
    """Of one run, generation by generation; only the last one has a hypervolume on the report split."""
    return pd.DataFrame(
        {
            "dataset": "sst2",
            "seed": 0,
            "strategy": strategy,
            "device_seconds": seconds,
            "device_seconds_many": many,
            "hypervolume_search": volumes,
            "hypervolume_report": [*[np.nan] * (len(volumes) - 1), volumes[-1] + 1],
        }
    )


def cells(text: str) -> dict[str, list[str]]:
    """By the strategy, which is the second column of a Markdown table."""
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines()[2:]]
    return {row[1].strip("`"): row for row in rows}


def test_strategies_are_compared_by_what_they_found_and_how_soon(claims: Any):
    nan = [np.nan] * 3
    table = pd.concat(
        [
            curve("genetic", [10, 500, 1000], [10, 5000, 10000], [0, 2, 4]),
            curve("evolve", [20, 100, 1000], [20, 200, 20000], [0, 5, 7]),
            curve("grid", [20, 400, 900], nan, [0, 1, 3]),  # no count for many rows
        ]
    )
    found = cells(claims.strategies(table))
    assert found["evolve"][3:] == ["8.00", "7.00", "1.60", "", "1,000", "10.0%", "2.0%"]
    assert found["grid"][3:] == ["4.00", "3.00", "0.80", "2.00", "900", "never", ""]
    assert cells(claims.strategies(table.assign(device_seconds_many=np.nan)))["evolve"][-1] == "", "nothing was counted"
    alone = cells(claims.strategies(table[table["strategy"] == "evolve"]))
    assert alone["evolve"][3] == "8.00", "without genetic there is nothing to compare with"


def test_the_best_model_of_a_front_that_is_fast_and_small_is_chosen_on_the_search_split(claims: Any):
    columns = ["dataset", "seed", "strategy", "on_search", "on_report", "speed_up", "megabytes", "smaller"]
    rows = [
        ("sst2", 0, "evolve", 0.99, 0.90, 4.0, 7.0, 13.0),
        ("sst2", 0, "evolve", 0.98, 0.99, 6.0, 7.0, 13.0),
        ("sst2", 0, "evolve", 1.00, 1.00, 2.0, 7.0, 13.0),  # too slow
        ("sst2", 0, "grid", 1.00, 1.00, 9.0, 7.0, 13.0),
        ("sst2", 0, "evolve_for_a_target", 0.97, 0.98, 3.5, 7.0, 13.0),
    ]
    *_, first, second, third, _ = claims.small_and_fast(pd.DataFrame(rows, columns=columns)).splitlines()
    assert [cell.strip() for cell in first.split("|")[4:-1]] == ["3x, 1/12", "4.0x", "7.0, 1/13.0", "90.0%", "99.0%"]
    assert "none" in second
    assert "`evolve_for_a_target`" in third
    assert "98.0%" in third


def test_what_is_scored_anew_is_compared_with_what_is_not(claims: Any):
    figures = {"ours, by parameters": (0.80, 0.90), "ours, rescored": (0.90, 0.94), "a peer": (0.10, 0.95)}
    table = pd.DataFrame(
        {
            "dataset": "cola",
            "method": method,
            "share": 0.8,
            "seed": seed,
            "base_quality": 1.0,
            "before": before,
            "quality": after,
        }
        for method, (before, after) in figures.items()
        for seed in (0, 1)
    )
    alone = pd.DataFrame([{**table.iloc[0], "seed": 2, "before": 0.0, "quality": 0.0}])  # the others lack this seed
    (row,) = claims.rescored(pd.concat([table, alone])).splitlines()[2:]
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert cells == ["CoLA (1.000)", "0.100 / **0.950**", "0.800 / 0.900", "**0.900** / 0.940", "60 %"]


def test_untrained_cuts_stand_side_by_side(claims: Any):
    qualities = {"ours, rescored": (0.91, 0.70), "K-prune": (0.90, 0.80)}
    table = pd.DataFrame(
        {"dataset": "cola", "method": method, "share": share, "seed": 0, "base_quality": 0.95, "quality": quality}
        for method, cuts in qualities.items()
        for share, quality in zip((0.5, 0.8), cuts, strict=True)
    )
    header, _, half, most = (
        [cell.strip() for cell in line.strip("|").split("|")] for line in claims.untrained_cells(table).splitlines()
    )
    assert header == ["dataset (base), cut", "ours, rescored", "K-prune"]
    assert half == ["CoLA (0.950), 50 %", "**0.910**", "0.900"]
    assert most == ["CoLA (0.950), 80 %", "0.700", "**0.800**"]


def test_steps_of_evolve_have_words(claims: Any):
    assert claims._described("carve > distill > distill > trim_vocabulary > quantize_dynamic_int8") == (
        "cut, distilled twice, vocabulary trimmed, dynamic int8"
    )
    assert claims._described("prune_0.57 > distill > quantize_nf4") == "cut block by block by 57 %, distilled, 4 bits (nf4)"


def test_the_operations_of_bert_base_are_those_that_are_known(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import costs

    assert costs.Model(tokens=128).forward() == pytest.approx(22.4e9, rel=0.01)  # 11.2 G multiplications and additions
    del sys.modules["costs"]


def test_the_best_figure_of_each_dataset_is_marked(claims: Any):
    methods = {"base": 0.0, "ours, by parameters": 0.8, "Torch-Pruning Taylor": 0.8, "last layers": 0.8}
    table = pd.DataFrame(
        [
            {"dataset": dataset, "method": method, "share": share, "seed": 0, "before": 0.4 - n / 10, "quality": 0.5 + n / 10}
            for dataset in claims.DATASETS
            for n, (method, share) in enumerate(methods.items())
        ]
    ).assign(speed_up=4.04)
    lines = claims.most_cut(table).splitlines()
    assert "SST-2 (base 0.500)" in lines[0]
    assert "| **0.300** / 0.600, 4.0x " in lines[2]
    assert "| 0.100 / **0.800**, 4.0x " in lines[4]
