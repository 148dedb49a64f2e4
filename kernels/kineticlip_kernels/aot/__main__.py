"""python -m kineticlip_kernels.aot [--json]."""

from __future__ import annotations

import argparse
import sys

from kineticlip_kernels.aot.report import report

if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m kineticlip_kernels.aot")
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    sys.exit(report(as_json=parser.parse_args().json))
