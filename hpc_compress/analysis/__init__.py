"""From run folders to tables, plots and a status. Reads files only: imports no torch, and neither driver nor launchers."""

from hpc_compress.analysis.candidates import load_runs, settings_of
from hpc_compress.analysis.compare import points, write_comparison
from hpc_compress.analysis.figures import plot
from hpc_compress.analysis.report import FILES, as_text, on_targets, report, to_deploy, verdicts, write_report
from hpc_compress.analysis.runs import Reader, Run, find_runs, open_run, open_runs
from hpc_compress.analysis.status import Watch, gpu_hours, status, status_of
from hpc_compress.analysis.sweeps import write_sweep

__all__ = [
    "FILES",
    "Reader",
    "Run",
    "Watch",
    "as_text",
    "find_runs",
    "gpu_hours",
    "load_runs",
    "on_targets",
    "open_run",
    "open_runs",
    "plot",
    "points",
    "report",
    "settings_of",
    "status",
    "status_of",
    "to_deploy",
    "verdicts",
    "write_comparison",
    "write_report",
    "write_sweep",
]
