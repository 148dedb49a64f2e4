"""Files to scores: the engine against the libraries people use today, in one run.

    python bench/end_to_end.py --quick
    python bench/end_to_end.py clips/*.mp4 --baselines fp32 --json > result.json
    python bench/end_to_end.py DIR --results bench/results

The baseline reads a video in sequence with PyAV, once for all views, transforms every view with
torchvision and runs open_clip on one view at a time: eager, fp32 or AMP. Both have the same random
weights, the same frames and the same crops. Runs alternate; a ratio is the median over the rounds.
`cpu_ratio` compares CPU time, which other load on the machine distorts less. The exit status is 1
where scores in fp32 differ by more than 1e-5, or five first classes are not the same set in bf16.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import av
import open_clip
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.transforms import functional as transforms

from decode import write_clip
from kernel_results import keep
from kineticlip.config import Config, load_config
from kineticlip.data.device_loader import DeviceLoader, why_not_on_device
from kineticlip.data.entries import Entry
from kineticlip.data.pipelines import PIPELINES
from kineticlip.data.scoring_loader import ScoringLoader
from kineticlip.data.statistics import CLIP_STATISTICS
from kineticlip.evaluation.clock import Clock
from kineticlip.evaluation.loop import Scored, score_stream
from kineticlip.evaluation.recognizer import Recognizer, load_recognizer, pick_device
from kineticlip.runtime.machine import machine_record, software_record
from limits import Limits, product_rates

CLASSES = tuple(f"class {number}" for number in range(400))
BASELINES = ("fp32", "amp")
TOLERANCE = 1e-5  # of scores in fp32
QUICK_MINUTES = 8.0
SUFFIXES = {".mp4", ".avi", ".mkv", ".webm"}


@dataclass(frozen=True)
class Work:
    """An architecture and the views of a video."""

    arch: str
    resolution: int
    frames: int
    crops: int
    clips: int

    @property
    def name(self) -> str:
        return f"{self.arch} {self.frames}x{self.crops}x{self.clips}"


WORKS = (Work("ViT-B-16", 224, 8, 3, 4), Work("ViT-L-14-336", 336, 32, 3, 1))
QUICK = (Work("ViT-B-16", 224, 8, 3, 4), Work("ViT-L-14-336", 336, 4, 3, 1))
Outcome = tuple[Tensor, float, float]  # scores [N, C], wall and CPU seconds


def configuration(work: Work, precision: str) -> Config:
    return load_config(
        None,
        [
            f"model.arch={work.arch}", "model.weights=random", "text4vis.header=mean",
            "classifier.source=random_normal", f"data.resolution={work.resolution}",
            f"data.num_frames={work.frames}", f"test.crops={work.crops}",
            f"test.clips={work.clips}", f"eval.precision={precision}",
            # As a run over a whole data set has it; what it takes is not counted here.
            f"eval.compile={'always' if precision == 'int8' else 'auto'}",
        ],
    )  # fmt: skip


def engine_scores(recognizer: Recognizer, entries: Sequence[Entry], clock: Clock) -> Tensor:
    """The engine's way from files to probabilities [N, C]; the clock counts its images."""
    config, device = recognizer.config, recognizer.device
    if why_not_on_device(config, device):
        loader: ScoringLoader | DeviceLoader = ScoringLoader(
            entries, config, statistics=recognizer.statistics
        )
    else:
        loader = DeviceLoader(entries, config, device=device, statistics=recognizer.statistics)
    results = score_stream(
        recognizer.model,
        recognizer.method,
        loader,
        device=device,
        chunk=recognizer.ready.chunk,
        clock=clock,
    )
    rows = []
    for item in results:
        if not isinstance(item, Scored):
            raise SystemExit(f"{item.name}: {item.reason}")
        rows.append(item.scores)
    return torch.stack(rows)


def naive_scores(
    tower: nn.Module,
    classifier: Tensor,
    entries: Sequence[Entry],
    *,
    config: Config,
    device: torch.device,
    amp: bool,
) -> Tensor:
    """The baseline's way from files to probabilities [N, C].

    no_grad and not inference_mode: under autocast on a CPU the latter copies the weights of every
    projection for each token (8 images of ViT-B/16 take 10.8 s of a core, not 1.8).
    """
    rows = []
    for entry in entries:
        with av.open(entry.path) as container:
            frames = [frame.to_image() for frame in container.decode(video=0)]
        pipeline = PIPELINES["text4vis"]
        indices = pipeline.sample_test(len(frames), config.data, config.test)  # [K, T]
        width, height = frames[0].size
        shape = pipeline.geometry(width, height, config.data, config.test.crops)
        views = []
        for crop in shape.crops:
            for clip in indices:
                view = torch.stack([transformed(frames[n], shape, crop) for n in clip])
                with torch.no_grad(), torch.autocast(device.type, torch.bfloat16, amp):
                    views.append(tower(view.to(device)).float().mean(dim=0))  # [E]
        embedding = F.normalize(torch.stack(views).mean(dim=0), dim=-1)
        rows.append((100 * embedding.cpu() @ classifier.T).softmax(dim=-1))
    return torch.stack(rows)


def transformed(image: Any, shape: Any, crop: Any) -> Tensor:
    """One frame of one view: float32 [3, S, S], normalised."""
    size = [shape.height, shape.width]
    image = transforms.resize(image, size, transforms.InterpolationMode.BICUBIC)
    image = transforms.crop(image, crop.y, crop.x, shape.size, shape.size)
    pixels = transforms.to_tensor(image)
    normalised: Tensor = transforms.normalize(pixels, CLIP_STATISTICS.mean, CLIP_STATISTICS.std)
    return normalised


def timed(run: Callable[[], Tensor]) -> Outcome:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    wall, cpu = time.perf_counter(), time.process_time()
    scores = run()
    return scores, time.perf_counter() - wall, time.process_time() - cpu


def measure(
    work: Work, entries: Sequence[Entry], options: argparse.Namespace
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """A row for every engine precision against every baseline, and what ratios could reach."""
    device = pick_device()
    contestants: dict[str, Callable[[], Tensor]] = {}
    reference = load_recognizer(configuration(work, "fp32"), CLASSES, device=device)
    naive = open_clip.create_model(f"{work.arch}-quickgelu", pretrained=None).visual.eval()
    naive.load_state_dict(reference.model.get_submodule("visual").state_dict())
    naive = naive.to(device)
    once = torch.zeros(2, 3, work.resolution, work.resolution, dtype=torch.uint8, device=device)
    assert reference.classifier is not None
    for name in options.baselines:
        contestants[f"naive {name}"] = partial(
            naive_scores, naive, reference.classifier, entries,
            config=reference.config, device=device, amp=name == "amp",
        )  # fmt: skip
    images = work.frames * work.crops * work.clips * len(entries)
    clock = Clock()
    towers = {}
    for precision in options.engines:
        config = configuration(work, precision)
        recognizer = load_recognizer(config, CLASSES, device=device).for_run(images)
        towers[precision] = ", ".join(recognizer.ready.notes)
        print(f"{work.name} {towers[precision]}", file=sys.stderr)
        with torch.inference_mode():  # what happens once, compilation above all, is not timed
            recognizer.model.get_submodule("visual")(once)
        contestants[f"engine {precision}"] = partial(engine_scores, recognizer, entries, clock)
    limits = Limits(work.arch, work.resolution, naive_images=images)
    outcomes: dict[str, list[Outcome]] = {name: [] for name in contestants}
    deadline = time.perf_counter() + options.seconds
    longest = 0.0
    while len(outcomes["naive fp32"]) < options.rounds and (
        longest == 0 or time.perf_counter() + longest < deadline
    ):
        start = time.perf_counter()
        for name, run in contestants.items():
            outcomes[name].append(timed(run))
            print(f"{work.name} {name}: {outcomes[name][-1][1]:.1f} s", file=sys.stderr)
        limits.add(product_rates(limits.shape, device))
        longest = max(longest, time.perf_counter() - start)
    rounds = len(outcomes["naive fp32"])
    truth = outcomes["naive fp32"][0][0]
    rows = [
        {
            "work": work.name,
            "engine": precision,
            "baseline": baseline,
            **compared(outcomes[f"engine {precision}"], outcomes[f"naive {baseline}"], truth),
            "videos": len(entries),
            "rounds": rounds,
            "tower": towers[precision],
        }
        for precision in options.engines
        for baseline in options.baselines
    ]
    on_gpu = device.type == "cuda"
    spent = median(wall if on_gpu else cpu for _, wall, cpu in outcomes["naive fp32"])
    engine_images = clock.images // (rounds * len(options.engines))
    return rows, {"work": work.name, **limits.record(spent, engine_images)}


def compared(
    engine: Sequence[Outcome], baseline: Sequence[Outcome], truth: Tensor
) -> dict[str, Any]:
    """Ratios of time, and how far the engine's scores are from the fp32 baseline's."""
    pairs = list(zip(engine, baseline, strict=True))
    ratios = [there[1] / here[1] for here, there in pairs]
    cpu_ratios = [there[2] / here[2] for here, there in pairs]
    scores = engine[0][0]
    sets = [rows.topk(5).indices.sort().values for rows in (scores, truth)]
    return {
        "ratio": round(median(ratios), 2),
        "ratio_range": [round(min(ratios), 2), round(max(ratios), 2)],
        "cpu_ratio": round(median(cpu_ratios), 2),
        "cpu_ratio_range": [round(min(cpu_ratios), 2), round(max(cpu_ratios), 2)],
        "engine_seconds": round(median(here[1] for here, _ in pairs), 3),
        "baseline_seconds": round(median(there[1] for _, there in pairs), 3),
        "top5_equal": int((sets[0] == sets[1]).all(dim=-1).sum()),
        "score_difference": float((scores - truth).abs().max()),
    }


def problems(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Rows that are fast but wrong."""
    found = []
    for row in rows:
        name = f"{row['work']} {row['engine']}"
        if row["engine"] == "fp32" and row["score_difference"] > TOLERANCE:
            found.append(f"{name}: scores differ by {row['score_difference']:.1e}")
        if row["engine"] in ("fp32", "bf16") and row["top5_equal"] < row["videos"]:
            found.append(f"{name}: top-5 sets of {row['videos'] - row['top5_equal']} videos differ")
    return sorted(set(found))


def clips_of(options: argparse.Namespace, folder: str) -> list[Entry]:
    """The clips named on the command line, or H.264 ones of 300 frames made here."""
    if options.videos:
        paths: list[Path] = []
        for given in map(Path, options.videos):
            if given.is_dir():
                paths += sorted(p for p in given.iterdir() if p.suffix.lower() in SUFFIXES)
            else:
                paths.append(given)
        if not paths:
            raise SystemExit(f"{options.videos[0]}: no {', '.join(sorted(SUFFIXES))} file here")
        return [Entry(path.name, str(path), -1) for path in paths[: options.count]]
    paths = [Path(folder, f"{number}.mp4") for number in range(options.count or 1)]
    for number, path in enumerate(paths):
        write_clip(path, 340, 256, (250, 48, 12)[number % 3])
    return [Entry(path.name, str(path), -1) for path in paths]


def table(rows: Sequence[dict[str, Any]]) -> str:
    lines = [
        f"{'work':<22} engine  baseline   ratio (range)  CPU ratio  top-5 equal  scores differ"
    ]
    for row in rows:
        low, high = row["ratio_range"]
        lines.append(
            f"{row['work']:<22} {row['engine']:<7} {row['baseline']:<8} {row['ratio']:7.2f}"
            f" ({low:.2f}-{high:.2f}) {row['cpu_ratio']:9.2f} {row['top5_equal']:>9}"
            f"/{row['videos']}  {row['score_difference']:.1e}"
        )
    return "\n".join(lines)


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("videos", nargs="*", help="real clips, or folders of them; none: made ones")
    parser.add_argument("--quick", action="store_true", help="one video, 4 frames of ViT-L, 8 min")
    parser.add_argument("--works", type=int, nargs="+", default=[0, 1], help="0: B/16, 1: L/14")
    parser.add_argument("--engines", default=None, help="fp32,bf16,int8 (GPU: fp32,bf16)")
    parser.add_argument("--baselines", default="fp32,amp", help="fp32 or fp32,amp")
    parser.add_argument("--count", type=int, default=None, help="videos of a run (4; quick 1)")
    parser.add_argument("--rounds", type=int, default=3, help="at most (3)")
    parser.add_argument("--minutes", type=float, default=None, help="no new round after so many")
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    parser.add_argument("--results", type=Path, metavar="DIR", help="keep the document there")
    options = parser.parse_args()
    options.count = options.count or (1 if options.quick else 4)
    options.minutes = options.minutes or (QUICK_MINUTES if options.quick else None)
    seconds = float("inf") if options.minutes is None else 60 * options.minutes
    options.seconds = seconds / len(options.works)
    gpu = torch.cuda.is_available()
    options.engines = (options.engines or ("fp32,bf16" if gpu else "fp32,bf16,int8")).split(",")
    options.baselines = options.baselines.split(",")
    if options.baselines[0] != "fp32" or not set(options.baselines) <= set(BASELINES):
        parser.error("--baselines: fp32, which scores are compared with, and then perhaps amp")
    return options


def main() -> int:
    options = parsed()
    software = software_record()  # before it can change while this runs
    logging.getLogger().setLevel(logging.ERROR)  # open_clip warns of random weights
    rows: list[dict[str, Any]] = []
    limits: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        entries = clips_of(options, folder)
        for number in options.works:
            found, limit = measure((QUICK if options.quick else WORKS)[number], entries, options)
            rows += found
            limits.append(limit)
    shown = ("quick", "rounds", "minutes")
    record = {
        "kind": "end_to_end",
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "machine": machine_record(),
        "software": software,
        "threads": torch.get_num_threads(),
        "settings": {name: getattr(options, name) for name in shown},
        "videos": [entry.name for entry in entries] if options.videos else "rendered",
        "rows": rows,
        "limits": limits,
    }
    print(table(rows), file=sys.stderr if options.json else sys.stdout)
    for limit in limits:
        print(f"{limit['work']}: {limit['text']}", file=sys.stderr if options.json else sys.stdout)
    if options.json:
        print(json.dumps(record, indent=1))
    if options.results is not None:
        print(f"written: {keep(options.results, record, 'end-to-end')}", file=sys.stderr)
    wrong = problems(rows)
    print("\n".join(wrong), end="\n" if wrong else "", file=sys.stderr)
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
