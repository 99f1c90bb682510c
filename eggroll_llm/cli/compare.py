"""`compare`: accuracy of runs, paired tests and plots."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from eggroll_llm.cli.arguments import Settings

if TYPE_CHECKING:
    from eggroll_llm.cli.display import ConsoleDisplay


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's own arguments."""
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="run directories")
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("comparison"),
        metavar="DIR",
        help="directory of report.html and figures; default: %(default)s",
    )


def run(options: argparse.Namespace, settings: Settings) -> int:
    """Print the comparison of runs and write its report."""
    from eggroll_llm.cli.display import ConsoleDisplay

    show_comparison(options.runs, options.out, ConsoleDisplay())
    return 0


def show_comparison(paths: Sequence[Path], out: Path, display: "ConsoleDisplay") -> None:
    """Print the tables of a comparison and write its report into `out`."""
    from eval.compare import compare_runs
    from eval.runs import about, read_runs
    from eval.tables import tables

    runs = read_runs(paths)
    comparison = compare_runs(runs)
    for table in tables(comparison):
        display.table(table)
    for note in (*about(runs), *comparison.notes):
        display.message(note)

    from eval.report import write_comparison

    display.message(f"report: {write_comparison(runs, comparison, out)}")
