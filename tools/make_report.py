"""Writes a report about runs: one HTML page that needs nothing beside it, to look at, to pass on, to print.

    python tools/make_report.py runs/demo
    python tools/make_report.py runs/first runs/second --output comparison.html

Several runs are compared. What a folder lacks, and what cannot be read, is said on the page.
"""

import argparse
from pathlib import Path

from engine.launch import run_script
from report.page import write_page
from report.run import read_runs
from utils.errors import UserError


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="make_report.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", metavar="RUN", nargs="+", type=Path, help="the folder of a run, such as runs/demo")
    parser.add_argument("--output", metavar="FILE", type=Path, help="the page; default: report.html in the first RUN")
    parser.add_argument("--images", metavar="N", type=int, help="so many of the best and worst images of each "
                        "evaluation; default: all that it kept (evaluate.report_images)")
    arguments = parser.parse_args(argv)
    if arguments.images is not None and arguments.images < 0:
        raise UserError(f"--images {arguments.images}: expected 0 or more")
    runs = read_runs(arguments.runs)
    path = arguments.output or arguments.runs[0] / "report.html"
    size = write_page(runs, path, arguments.images)
    for run in runs:
        for note in run.notes:
            print(f"{run.folder}: {note}")
        for count, evaluation in enumerate(run.evaluations, 1):
            for note in evaluation.notes:
                print(f"{run.folder}: evaluation {count}: {note}")
    print(f"report: {path} ({size / 1e6:.1f} MB)")


if __name__ == "__main__":
    run_script(main)
