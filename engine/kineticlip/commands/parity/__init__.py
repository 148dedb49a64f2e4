"""`kineticlip parity METHOD DIR`: the official code's recorded outputs, replayed and compared."""

from __future__ import annotations

import argparse
import json
import math
import sys
import time


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("method", metavar="METHOD", help="text4vis, evl or vitaclip")
    parser.add_argument("folder", metavar="DIR", help="folder of recorded outputs")
    parser.add_argument("--json", action="store_true", help="print one JSON document")


def run(args: argparse.Namespace) -> int:
    from kineticlip.commands.parity.suites import Check, replay

    start = time.perf_counter()
    checks: list[Check] = []
    for check in replay(args.method, args.folder):
        checks.append(check)
        if not args.json:
            verdict = "ok" if check.passed else "FAIL"
            line = f"{check.name:<60} {check.error:>10.2e} {check.tolerance:>10.1e}  {verdict}"
            print(f"{line}  {check.detail}".rstrip(), flush=True)
    failed = [check for check in checks if not check.passed]
    seconds = time.perf_counter() - start
    if args.json:
        document = {
            "method": args.method,
            "folder": str(args.folder),
            "passed": not failed,
            "seconds": round(seconds, 3),
            "checks": [
                {
                    "check": check.name,
                    "error": check.error if math.isfinite(check.error) else None,
                    "tolerance": check.tolerance,
                    "passed": check.passed,
                    "detail": check.detail,
                }
                for check in checks
            ],
        }
        json.dump(document, sys.stdout, indent=1)
        print()
    else:
        passed = len(checks) - len(failed)
        print(f"\n{passed} of {len(checks)} checks passed in {seconds:.1f} s")
    return 1 if failed or not checks else 0
