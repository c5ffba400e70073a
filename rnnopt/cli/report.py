"""`rnnopt report`: a run's report once more."""

from __future__ import annotations

from pathlib import Path

from rnnopt.cli.settings.commands import Report
from rnnopt.evaluation.report.report import write_report


def run(settings: Report) -> None:
    """Write the report and pictures of a run again, and print where."""
    print(write_report(Path(settings.run_path)))
