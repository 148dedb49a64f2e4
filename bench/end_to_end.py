"""Files to scores: the engine against the libraries people use today, in one run.

    python bench/end_to_end.py --quick
    python bench/end_to_end.py --videos DIR --json > result.json

The baseline reads a video in sequence with PyAV, once for all views, transforms every view with
torchvision and runs open_clip on one view at a time: eager, fp32 or AMP. Both have the same random
weights, the same frames and the same crops. Runs alternate; a ratio is the median over the rounds.
`cpu_ratio` compares CPU time, which other load on the machine distorts less.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
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
from kineticlip.config import Config, load_config
from kineticlip.dataset import Entry
from kineticlip.device_loader import DeviceLoader, why_not_on_device
from kineticlip.evaluate import Scored, score_stream
from kineticlip.inference import make_steady
from kineticlip.loader import TestLoader
from kineticlip.measure import machine_record, software_record
from kineticlip.predictor import Recognizer, load_recognizer, pick_device
from kineticlip.sampling import sample_test
from kineticlip.views import CLIP_MEAN, CLIP_STD, geometry

CLASSES = tuple(f"class {number}" for number in range(400))
RESULTS = Path(__file__).parent / "results"
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
        ],
    )  # fmt: skip


def engine_scores(recognizer: Recognizer, entries: Sequence[Entry]) -> Tensor:
    """The engine's way from files to probabilities [N, C]."""
    config, device = recognizer.config, recognizer.device
    if why_not_on_device(config, device, pipeline="text4vis"):
        loader: TestLoader | DeviceLoader = TestLoader(entries, config)
    else:
        loader = DeviceLoader(entries, config, device=device)
    results = score_stream(
        recognizer.model, recognizer.method, loader, device=device, chunk=recognizer.chunk
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
    """The baseline's way from files to probabilities [N, C]."""
    rows = []
    for entry in entries:
        with av.open(entry.path) as container:
            frames = [frame.to_image() for frame in container.decode(video=0)]
        indices = sample_test(len(frames), config.data, config.test, "text4vis")  # [K, T]
        shape = geometry(
            *frames[0].size, size=config.data.resolution, crops=config.test.crops,
            pipeline="text4vis",
        )  # fmt: skip
        views = []
        for crop in shape.crops:
            for clip in indices:
                view = torch.stack([transformed(frames[n], shape, crop) for n in clip])
                with torch.inference_mode(), torch.autocast(device.type, torch.bfloat16, amp):
                    views.append(tower(view.to(device)).float().mean(dim=0))  # [E]
        embedding = F.normalize(torch.stack(views).mean(dim=0), dim=-1)
        rows.append((100 * embedding.cpu() @ classifier.T).softmax(dim=-1))
    return torch.stack(rows)


def transformed(image: Any, shape: Any, crop: Any) -> Tensor:
    """One frame of one view: float32 [3, S, S], normalised."""
    size = [shape.height, shape.width]
    image = transforms.resize(image, size, transforms.InterpolationMode.BICUBIC)
    image = transforms.crop(image, crop.y, crop.x, shape.size, shape.size)
    return transforms.normalize(transforms.to_tensor(image), CLIP_MEAN, CLIP_STD)


def timed(run: Callable[[], Tensor]) -> Outcome:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    wall, cpu = time.perf_counter(), time.process_time()
    scores = run()
    return scores, time.perf_counter() - wall, time.process_time() - cpu


def measure(
    work: Work, entries: Sequence[Entry], options: argparse.Namespace
) -> list[dict[str, Any]]:
    """A row for every engine precision against every baseline."""
    device = pick_device()
    contestants: dict[str, Callable[[], Tensor]] = {}
    reference = load_recognizer(configuration(work, "fp32"), CLASSES, device=device)
    naive = open_clip.create_model(f"{work.arch}-quickgelu", pretrained=None).visual.eval()
    naive.load_state_dict(reference.model.get_submodule("visual").state_dict())
    naive = naive.to(device)
    assert reference.classifier is not None
    for name, amp in (("naive fp32", False), ("naive amp", True)):
        contestants[name] = partial(
            naive_scores, naive, reference.classifier, entries,
            config=reference.config, device=device, amp=amp,
        )  # fmt: skip
    images = work.frames * work.crops * work.clips * len(entries)
    for precision in options.engines:
        config = configuration(work, precision)
        recognizer = load_recognizer(config, CLASSES, device=device)
        chunk, notes = make_steady(
            recognizer.model, config, device=device, chunk=recognizer.chunk, images=images
        )
        print(f"{work.name} {precision}: {', '.join(notes)}", file=sys.stderr)
        fitted = replace(config, eval=replace(config.eval, batch_frames=chunk))
        recognizer = replace(recognizer, config=fitted)
        contestants[f"engine {precision}"] = partial(engine_scores, recognizer, entries)
    for run in contestants.values() if options.warm_up else ():
        run()
    outcomes: dict[str, list[Outcome]] = {name: [] for name in contestants}
    for _ in range(options.rounds):
        for name, run in contestants.items():
            outcomes[name].append(timed(run))
            print(f"{work.name} {name}: {outcomes[name][-1][1]:.1f} s", file=sys.stderr)
    truth = outcomes["naive fp32"][0][0]
    return [
        {
            "work": work.name,
            "engine": precision,
            "baseline": baseline.removeprefix("naive "),
            **compared(outcomes[f"engine {precision}"], outcomes[baseline], truth),
            "videos": len(entries),
        }
        for precision in options.engines
        for baseline in ("naive fp32", "naive amp")
    ]


def compared(
    engine: Sequence[Outcome], baseline: Sequence[Outcome], truth: Tensor
) -> dict[str, Any]:
    """Ratios of time, and how far the engine's scores are from the fp32 baseline's."""
    pairs = list(zip(engine, baseline, strict=True))
    scores = engine[0][0]
    sets = [rows.topk(5).indices.sort().values for rows in (scores, truth)]
    return {
        "ratio": round(median(there[1] / here[1] for here, there in pairs), 2),
        "cpu_ratio": round(median(there[2] / here[2] for here, there in pairs), 2),
        "engine_seconds": round(median(here[1] for here, _ in pairs), 3),
        "baseline_seconds": round(median(there[1] for _, there in pairs), 3),
        "top5_equal": int((sets[0] == sets[1]).all(dim=-1).sum()),
        "score_difference": float((scores - truth).abs().max()),
    }


def peak_rates() -> dict[str, float]:
    """GFLOP/s of one large product in each precision: what a ratio can reach at all."""
    device, side, rates = pick_device(), 1536, {}
    if device.type == "cuda":
        side = 8192
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16), ("int8", torch.int8)):
        a = torch.ones(side, side, device=device).to(dtype)
        run = torch._int_mm if dtype == torch.int8 else torch.mm
        spans = []
        for _ in range(4):
            start = time.perf_counter()
            run(a, a)
            if device.type == "cuda":
                torch.cuda.synchronize()
            spans.append(time.perf_counter() - start)
        rates[name] = round(2e-9 * side**3 / min(spans[1:]), 1)
    return rates


def clips_of(options: argparse.Namespace, folder: str) -> list[Entry]:
    """The real clips of --videos, or H.264 ones of 300 frames made here."""
    if options.videos is not None:
        paths = sorted(p for p in Path(options.videos).iterdir() if p.suffix.lower() in SUFFIXES)
        if not paths:
            raise SystemExit(f"{options.videos}: no {', '.join(sorted(SUFFIXES))} file here")
        return [Entry(path.name, str(path), -1) for path in paths[: options.count]]
    paths = [Path(folder, f"{number}.mp4") for number in range(options.count)]
    for number, path in enumerate(paths):
        write_clip(path, 340, 256, (250, 48, 12)[number % 3])
    return [Entry(path.name, str(path), -1) for path in paths]


def table(rows: Sequence[dict[str, Any]]) -> str:
    lines = [f"{'work':<22} engine  baseline   ratio  CPU ratio  top-5 equal  scores differ by"]
    for row in rows:
        lines.append(
            f"{row['work']:<22} {row['engine']:<7} {row['baseline']:<8} {row['ratio']:7.2f}"
            f" {row['cpu_ratio']:10.2f} {row['top5_equal']:>9}/{row['videos']}"
            f"  {row['score_difference']:.1e}"
        )
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--quick", action="store_true", help="one video, 4 frames of ViT-L, once")
    parser.add_argument("--works", type=int, nargs="+", default=[0, 1], help="0: B/16, 1: L/14")
    parser.add_argument("--engines", nargs="+", default=None, help="fp32 bf16 int8")
    parser.add_argument("--videos", metavar="DIR", help="real clips in place of made ones")
    parser.add_argument("--count", type=int, default=None, help="videos of a run (4; quick 1)")
    parser.add_argument("--rounds", type=int, default=None, help="(3; quick 1)")
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    options = parser.parse_args()
    options.count = options.count or (1 if options.quick else 4)
    options.rounds = options.rounds or (1 if options.quick else 3)
    options.warm_up = not options.quick
    gpu = torch.cuda.is_available()
    options.engines = options.engines or (["fp32", "bf16"] if gpu else ["fp32", "bf16", "int8"])
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        entries = clips_of(options, folder)
        for number in options.works:
            rows += measure((QUICK if options.quick else WORKS)[number], entries, options)
    record = {
        "machine": machine_record(),
        "software": software_record(),
        "threads": torch.get_num_threads(),
        "gflops": peak_rates(),
        "settings": {key: value for key, value in vars(options).items() if key != "json"},
        "rows": rows,
    }
    print(table(rows), file=sys.stderr if options.json else sys.stdout)
    print(f"GFLOP/s of one product: {record['gflops']}", file=sys.stderr)
    if options.json:
        print(json.dumps(record, indent=1))
    path = RESULTS / folder_name(record) / f"{time.strftime('%Y%m%d-%H%M%S')}-end_to_end.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=1) + "\n")
    print(f"written: {path}", file=sys.stderr)
    return 0


def folder_name(record: dict[str, Any]) -> str:
    """<device>-torch<version>, as all results are kept."""
    gpus = record["machine"]["gpus"]
    device = gpus[0]["name"] if gpus else f"{record['machine']['cpu']} x{record['threads']}"
    words = "".join(letter if letter.isalnum() else " " for letter in device).lower().split()
    return f"{'-'.join(words)}-torch{torch.__version__.partition('+')[0]}"


if __name__ == "__main__":
    sys.exit(main())
