"""`kineticlip convert IN OUT --to FORMAT`: a checkpoint from one code base for another."""

from __future__ import annotations

import argparse
import json


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", metavar="IN", help="checkpoint in any known format")
    parser.add_argument(
        "output", metavar="OUT", help=".safetensors for kineticlip, otherwise .pt or .pth"
    )
    parser.add_argument(
        "--to",
        required=True,
        metavar="FORMAT",
        help="kineticlip, openai, open_clip, text4vis, nce, evl or vitaclip",
    )
    parser.add_argument(
        "--resolution",
        type=int,
        metavar="S",
        help="interpolate the position embedding for SxS pixels",
    )
    parser.add_argument(
        "--round-fp16",
        action="store_true",
        help="round the tensors that the official clip.load keeps in half precision",
    )
    parser.add_argument("--dry-run", action="store_true", help="report only; write nothing")
    parser.add_argument("--json", action="store_true", help="print one JSON document")


def run(args: argparse.Namespace) -> int:
    from kineticlip.formats.convert import as_dict, collapsed, convert

    result = convert(
        args.source,
        args.output,
        to=args.to,
        resolution=args.resolution,
        round_fp16=args.round_fp16,
        dry_run=args.dry_run,
    )
    if args.json:
        print(json.dumps({"written": not args.dry_run, "output": args.output, **as_dict(result)}))
        return 0
    print(f"{args.source}: {result.source_format}, {result.num_source} tensors")
    for title, names in (("read", result.names_read), ("written", result.names_written)):
        for old, new, count in collapsed(names):
            if old != new:
                print(f"  {title:8}{old} -> {new}  ({count})")
    for name, reason, count in collapsed(result.dropped):
        print(f"  dropped {name}: {reason}  ({count})")
    for note in result.notes:
        print(f"  changed {note}")
    done = "would write" if args.dry_run else "wrote"
    size = result.num_bytes / 1e6
    print(f"{done} {args.output}: {args.to}, {result.num_written} tensors, {size:.1f} MB")
    return 0
