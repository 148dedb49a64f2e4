"""`kineticlip report`: one HTML page from the result files of one or several evaluations."""

from __future__ import annotations

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "folders", nargs="+", metavar="RESULTS_DIR", help="folder written by `kineticlip eval`"
    )
    parser.add_argument(
        "--out", metavar="FILE", help="page to write (default: report.html in the first folder)"
    )
    parser.add_argument("--title", metavar="TEXT", help="heading (default: names of the folders)")


def run(args: argparse.Namespace) -> int:
    from kineticlip.report.page import write_report

    page = write_report(args.folders, args.out, title=args.title)
    print(f"{page} ({page.stat().st_size / 1e6:.1f} MB)")
    return 0
