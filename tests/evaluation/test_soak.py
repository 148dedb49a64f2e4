"""Memory of a long evaluation: it does not grow with the number of videos.

pytest tests/evaluation/test_soak.py --soak 2000
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from kineticlip.commands.demo.clips import render_clip, write_clip

# 200 videos grow by 0.3 to 0.9 MB, 1000 by 1.4; with the views of each kept, 200 grow by 9.
GROWTH_MB = 4

SOAK = """
import os, sys
import torch
from pathlib import Path
from kineticlip.config import load_config
from kineticlip.data.entries import Entry
from kineticlip.data.scoring_loader import ScoringLoader
from kineticlip.evaluation.loop import Scored, score_stream
from kineticlip.evaluation.ready import ready
from kineticlip.methods import METHODS
from kineticlip.methods.trunk import statistics_of

def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6

paths, count = sys.argv[2:], int(sys.argv[1])
config = load_config(None, ["model.arch=ViT-tiny-16", "model.weights=random",
    "data.resolution=64", "data.num_frames=4", "classifier.source=random_normal",
    "eval.precision=fp32"])
method = METHODS["text4vis"]
found = ready(method.build(config, ("left", "right")), config, device=torch.device("cpu"))
entries = [Entry(f"video{n}", paths[n % len(paths)], 0) for n in range(count)]
start, scored = 0.0, 0
loader = ScoringLoader(entries, config, statistics=statistics_of(found.model))
for item in score_stream(found.model, method, loader, device=torch.device("cpu"), chunk=16):
    scored += isinstance(item, Scored)
    if scored == count // 4:
        start = resident()
print(scored, resident() - start)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/statm")
def test_memory_does_not_grow_with_the_videos(
    tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    videos = request.config.getoption("--soak")
    paths = [tmp_path / name for name in ("0.mp4", "1.mp4", "2.avi")]  # an AVI is read in sequence
    for number, path in enumerate(paths):
        write_clip(path, render_clip(number, number, np.random.default_rng(number)))
    words = [sys.executable, "-c", SOAK, str(videos), *map(str, paths)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    ran = subprocess.run(words, env=environment, capture_output=True, text=True, check=True)
    scored, growth = ran.stdout.split()
    assert int(scored) == videos
    assert float(growth) < GROWTH_MB, f"{growth} MB over {videos} videos"
