"""What the engine's form of a method's own layers saves over writing the formulas down.

    python bench/methods.py evl [--arch ViT-B-16] [--frames 8] [--clips 1] [--threads 1] [--json]
    python bench/methods.py vitaclip --results bench/results

evl: the decoder on recorded taps of the trunk, forward and backward, against the same maths with
keys and values projected and the offset weights gathered for every pair of patches. Both are
timed in turn in one process; peak memory is that of a process of its own for each, and beside it
the most bytes of tensors that live at once, which is the same in every run.
vitaclip: see methods_vitaclip.py. The exit status is 1 where the forms differ or a claim fails.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributed._tools.mem_tracker import MemTracker
from torch.utils.flop_counter import FlopCounterMode

from kernel_results import keep
from kineticlip.config import EvlConfig
from kineticlip.methods.evl_cost import decoder_cost
from kineticlip.methods.evl_decoder import Decoder, decoder_shape
from kineticlip.models.architectures import VisionShape, architecture
from kineticlip.models.transformer import Tap
from kineticlip.runtime.machine import machine_record, software_record
from kineticlip_kernels.evl import offsets
from methods_vitaclip import vitaclip

Step = Callable[[], Tensor]
Taps = Sequence[tuple[Tensor, Tensor, Tensor, Tensor]]  # (q, k, v, out) of each block
FACES = ("straightforward", "engine")
# How many times less the engine needs, at the default sizes.
CLAIMS = {"evl": {"seconds": 3.0, "peak_megabytes": 3.0}, "vitaclip": {"seconds": 3.0}}
NEAR = 1e-4  # of the largest value: roundings of two orders of summation in fp32


def evl_decoder(arch: str, frames: int) -> Decoder:
    """A decoder with EVL's defaults on a trunk; values differ from their initial zeros."""
    trunk = architecture(arch).vision
    assert isinstance(trunk, VisionShape)
    torch.manual_seed(0)
    decoder = Decoder(decoder_shape(EvlConfig(mlp_drop_out=0.0), trunk, frames))
    with torch.no_grad():
        for parameter in decoder.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.02)
    return decoder


def evl_taps(decoder: Decoder, clips: int) -> Taps:
    """(q, k, v, out) of the trunk's last blocks, as a trunk would hand them over."""
    trunk, frames = decoder.shape.trunk, decoder.shape.frames
    generator = torch.Generator().manual_seed(1)
    images, heads = clips * frames, trunk.heads
    taps = []
    for _ in range(decoder.shape.layers):
        q, k, v = torch.randn(
            3, images, trunk.tokens, heads, trunk.width // heads, generator=generator
        )
        taps.append((q, k, v, torch.randn(images, trunk.tokens, trunk.width, generator=generator)))
    return taps


def engine_decoder(decoder: Decoder, taps: Taps, clips: int) -> Tensor:
    first = decoder.shape.trunk.layers - decoder.shape.layers

    def trunk(tap: Tap) -> None:
        for layer, (q, k, v, out) in enumerate(taps):
            tap(first + layer, q, k, v, out)

    state: Tensor = decoder(trunk, clips)
    return state


def straightforward_decoder(decoder: Decoder, taps: Taps, clips: int) -> Tensor:
    """EVL's decoder as its paper writes it, in plain PyTorch. -> [B, C]."""
    shape = decoder.shape
    table = offsets(shape.grid, torch.device("cpu"))  # [P, P]
    state = decoder.cls_token.expand(clips, -1)
    for i, (q, k, _, out) in enumerate(taps):
        layer: Any = decoder.decoder_layers[i]
        weights: Any = decoder.cross_attention[i]
        q, k, out = (x.unflatten(0, (clips, -1)) for x in (q, k, out))
        f = out + _convolved(decoder.temporal_conv[i], out)
        f = f + decoder.temporal_pos_embed[i][:, None]
        before = _looking(q[:, 1:], k[:, :-1])
        after = _looking(q[:, :-1], k[:, 1:])
        from_before = torch.einsum("btpr,prc->btpc", before, weights.w1[table])
        from_after = torch.einsum("btpr,prc->btpc", after, weights.w2[table])
        f = f + F.pad(from_before, (0, 0, 1, 0, 1, 0)) + F.pad(from_after, (0, 0, 1, 0, 0, 1))
        y = _norm(layer.norm3, f).flatten(1, 2)  # [B, T * N, C]
        attn = layer.attn
        query, keys, values = (
            x.unflatten(-1, (attn.heads, -1)).transpose(1, 2)
            for x in (
                attn.q_proj(_norm(layer.norm1, state))[:, None],
                attn.k_proj(y),
                attn.v_proj(y),
            )
        )  # [B, Q, 1 or T * N, D / Q]
        scores = (query * query.shape[-1] ** -0.5) @ keys.transpose(-1, -2)
        mixed = (scores.softmax(dim=-1) @ values).flatten(1)  # [B, D]
        state = state + attn.out_proj(mixed)
        hidden = layer.mlp.fc1.weight, layer.mlp.fc1.bias
        x = F.linear(_norm(layer.norm2, state), *hidden)
        state = state + layer.mlp.fc2(x * torch.sigmoid(1.702 * x))
    return state


def _convolved(conv: Any, out: Tensor) -> Tensor:
    clips, _, tokens, _ = out.shape
    series = out.permute(0, 2, 3, 1).flatten(0, 1)  # [B * N, C, T]
    mixed: Tensor = conv(series).unflatten(0, (clips, tokens))  # [B, N, C, T]
    return mixed.permute(0, 3, 1, 2)


def _looking(q: Tensor, k: Tensor) -> Tensor:
    """Patches of one frame looking at another's. [B, T - 1, N, H, K] twice -> [B, T - 1, P, P]."""
    q, k = (x[:, :, 1:].transpose(2, 3) for x in (q, k))
    scores: Tensor = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)
    return scores.softmax(dim=-1).mean(dim=2)


def _norm(norm: Any, x: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], norm.weight, norm.bias, norm.eps)


FORMS = {"straightforward": straightforward_decoder, "engine": engine_decoder}


def evl_step(face: str, arch: str, frames: int, clips: int) -> tuple[Decoder, Step]:
    """A decoder, and its forward and backward pass."""
    decoder = evl_decoder(arch, frames)
    taps = evl_taps(decoder, clips)

    def step() -> Tensor:
        decoder.zero_grad()
        state = FORMS[face](decoder, taps, clips)
        state.square().sum().backward()
        return state.detach()

    return decoder, step


def peak_megabytes(face: str, arch: str, frames: int, clips: int, answer: Any) -> None:
    """Memory of one step beyond weights, gradients and inputs; in a process of its own."""
    _, step = evl_step(face, arch, frames, clips)
    _, warm = evl_step(face, "ViT-tiny-16", frames, 1)
    warm()  # thread pools and the like
    for parameter in evl_parameters(step):
        parameter.grad = torch.zeros_like(parameter)
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here on
    before = _status("VmRSS")
    step()
    answer.put((_status("VmHWM") - before) / 1024)


def live_megabytes(face: str, arch: str, frames: int, clips: int) -> float:
    """Tensors that live at once in a step beyond weights, gradients and inputs, at the most."""
    decoder = evl_decoder(arch, frames)
    taps = evl_taps(decoder, clips)
    inputs = [tensor for tap in taps for tensor in tap]
    for parameter in decoder.parameters():
        parameter.grad = torch.zeros_like(parameter)
    held = sum(2 * p.nbytes for p in decoder.parameters()) + sum(x.nbytes for x in inputs)
    tracker = MemTracker()
    tracker.track_external(decoder, *inputs)
    with tracker:
        FORMS[face](decoder, taps, clips).square().sum().backward()
    most = tracker.get_tracker_snapshot("peak")[torch.device("cpu")]["Total"]
    return float((most - held) / 1e6)


def evl_parameters(step: Step) -> list[torch.nn.Parameter]:
    """Those of the decoder that a step closes over."""
    cells = (cell.cell_contents for cell in step.__closure__ or ())
    decoder = next(cell for cell in cells if isinstance(cell, Decoder))
    return list(decoder.parameters())


def _status(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(field)).split()[1])


def evl(arch: str, frames: int, clips: int, rounds: int) -> dict[str, Any]:
    """Times, peak memory, multiply-adds and differences of both forms."""
    steps = {face: evl_step(face, arch, frames, clips) for face in FACES}
    states = {face: step() for face, (_, step) in steps.items()}
    gradients = {
        face: {n: p.grad for n, p in decoder.named_parameters() if p.grad is not None}
        for face, (decoder, _) in steps.items()
    }
    seconds: dict[str, list[float]] = {face: [] for face in FACES}
    cpu: dict[str, list[float]] = {face: [] for face in FACES}
    for _ in range(rounds):
        for face, (_, step) in steps.items():
            start, busy = time.perf_counter(), time.process_time()
            step()
            seconds[face].append(time.perf_counter() - start)
            cpu[face].append(time.process_time() - busy)
    return {
        "what": f"EVL decoder, {arch}, {frames} frames, {clips} clips, forward and backward, fp32",
        "threads": torch.get_num_threads(),
        "difference": {
            "state": _relative(states["engine"], states["straightforward"]),
            "gradients": max(
                _relative(gradients["engine"][name], gradient)
                for name, gradient in gradients["straightforward"].items()
                if not name.endswith("attn.k_proj.bias")  # rounding noise there, zero here
            ),
        },
        "seconds": {face: _spread(values) for face, values in seconds.items()},
        "cpu_seconds": {face: _spread(values) for face, values in cpu.items()},
        "peak_megabytes": {face: _peak(face, arch, frames, clips) for face in FACES},
        "live_megabytes": {face: live_megabytes(face, arch, frames, clips) for face in FACES},
        "multiply_adds": evl_counts(arch, frames, clips),
    }


def evl_counts(arch: str, frames: int, clips: int) -> dict[str, Any]:
    """Forward multiply-adds that torch counts, beside those of kineticlip.methods.evl_cost.

    torch sees products of matrices and convolutions. The engine's sums over offsets are products
    with bins that are half zeros, and its convolution is elementwise.
    """
    trunk = architecture(arch).vision
    assert isinstance(trunk, VisionShape)
    shape = decoder_shape(EvlConfig(), trunk, frames)
    parts = {
        part.name: part
        for part in decoder_cost(shape, classes=1)
        if part.name.startswith("decoder")
    }
    convolution = parts["decoder temporal convolutions"].ours
    sums = parts["decoder temporal attention"].ours // 2
    counted = {}
    for face in FACES:
        decoder = evl_decoder(arch, frames).requires_grad_(False)
        taps = evl_taps(decoder, clips)
        with (
            torch.no_grad(),
            FlopCounterMode(display=False, custom_mapping=IN_PLACE) as counter,
        ):
            FORMS[face](decoder, taps, clips)
        counted[face] = counter.get_total_flops() // 2
    # [g rows of bins] x [g (2 w - 1)] for T frames and both directions, against T - 1 x g w.
    rows, columns = shape.grid
    binned = sums * frames * (2 * columns - 1) // ((frames - 1) * columns)
    return {
        "counted": counted,
        "expected": {
            "straightforward": clips * sum(part.official for part in parts.values()),
            "engine": clips
            * (sum(part.ours for part in parts.values()) - convolution - sums + binned),
        },
        "key_value_projections": {
            "straightforward": parts["decoder key, value projections"].official * clips,
            "engine": parts["decoder key, value projections"].ours * clips,
        },
        "grid": [rows, columns],
    }


def _product_flops(total: Any, left: Any, right: Any, **others: Any) -> int:
    """Of baddbmm on shapes; torch counts the product only out of place."""
    batch, rows, inner = left
    return int(2 * batch * rows * inner * right[2])


IN_PLACE = {torch.ops.aten.baddbmm_: _product_flops}


def _peak(face: str, *sizes: Any) -> float:
    context = multiprocessing.get_context("spawn")
    answer = context.SimpleQueue()
    process = context.Process(target=peak_megabytes, args=(face, *sizes, answer))
    process.start()
    process.join()
    if process.exitcode:
        raise SystemExit(f"the memory of '{face}' could not be measured")
    peak: float = answer.get()
    return round(peak, 1)


def _relative(one: Tensor, other: Tensor) -> float:
    return float((one - other).abs().max() / other.abs().max())


def _spread(seconds: list[float]) -> dict[str, float]:
    ordered = sorted(seconds)
    return {
        "median": statistics.median(ordered),
        "fastest": ordered[0],
        "slowest": ordered[-1],
        "rounds": len(ordered),
    }


def as_text(name: str, found: Mapping[str, Any]) -> str:
    lines = [f"{name}: {found['what']}, {found['threads']} threads"]
    for face in FACES:
        time_, counts = found["seconds"][face], found["multiply_adds"]
        memory = f"{found['peak_megabytes'][face]:7.1f} MB, " if "peak_megabytes" in found else ""
        lines.append(
            f"  {face:16} {1000 * time_['median']:8.0f} ms "
            f"({1000 * time_['fastest']:.0f} to {1000 * time_['slowest']:.0f}), "
            f"{1000 * found['cpu_seconds'][face]['median']:.0f} ms of CPU time, "
            f"{memory}{counts['counted'][face] / 1e9:.3f} GMAC forward "
            f"(expected {counts['expected'][face] / 1e9:.3f})"
        )
    slow, fast = (found["seconds"][face]["median"] for face in FACES)
    less = ""
    if "peak_megabytes" in found:
        large, small = (found["peak_megabytes"][face] for face in FACES)
        less = f", {large / small:.1f} times less memory"
    lines.append(f"  {slow / fast:.1f} times as fast{less}")
    lines.append(f"  largest relative differences: {found['difference']}")
    return "\n".join(lines)


# method -> (arch, frames, clips, rounds) -> what was measured
METHODS: dict[str, Callable[[str, int, int, int], dict[str, Any]]] = {
    "evl": evl,
    "vitaclip": vitaclip,
}


def claims(name: str, found: Mapping[str, Any]) -> list[dict[str, Any]]:
    """What is promised of a method beside what was measured, as ratios of the two forms."""
    rows = []
    for what, wanted in CLAIMS[name].items():
        slow, fast = (
            found[what][face]["median"] if what == "seconds" else found[what][face]
            for face in FACES
        )
        rows.append({"what": what, "wanted": wanted, "ratio": slow / fast})
    return rows


def problems(name: str, found: Mapping[str, Any]) -> list[str]:
    """Claims that fail, and differences between the forms; a line each."""
    lines = [
        f"{name}: {row['what']}: {row['ratio']:.2f} times less, {row['wanted']:g} are claimed"
        for row in claims(name, found)
        if row["ratio"] < row["wanted"]
    ]
    return lines + [
        f"{name}: {what} differ by {value:.1e}"
        for what, value in found["difference"].items()
        if not value < NEAR
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("method", choices=list(METHODS))
    parser.add_argument("--arch", default="ViT-B-16")
    parser.add_argument("--frames", type=int, default=8)
    parser.add_argument("--clips", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=7)
    # One: threads that share busy cores wait for each other in every small product (20 x measured).
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    parser.add_argument("--results", type=Path, metavar="DIR", help="keep the document there")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    software = software_record()  # before it can change while this runs
    found = METHODS[args.method](args.arch, args.frames, args.clips, args.rounds)
    record = {
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "machine": machine_record(),
        "software": software,
        "claims": claims(args.method, found),
        args.method: found,
    }
    print(json.dumps(record, indent=1) if args.json else as_text(args.method, found))
    if args.results is not None:
        print(f"written: {keep(args.results, record, args.method)}", file=sys.stderr)
    wrong = problems(args.method, found)
    print("\n".join(wrong), end="\n" if wrong else "", file=sys.stderr)
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
