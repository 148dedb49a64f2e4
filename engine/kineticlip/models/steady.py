"""A tower behind one batch shape: compiled by Inductor, or as one CUDA graph."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

REMAINDERS = (32, 64, 128, 256, 512)  # batch sizes of a GPU for what is left of a run


class SteadyTower(nn.Module):
    """A tower behind one batch shape: a chunk that is not full is filled up and cut again.

    Chunks less than half full, calls with hooks (sources, taps, offsets) and other inputs than
    bytes go to the tower itself, and so does every attribute, so that methods reach into it as
    ever. `run` maps pixels [chunk, 3, S, S] to embeddings, which its next call may overwrite.
    remainders: sizes, ascending, that chunks less than half full are filled up to on their way to
    the tower: cuDNN plans anew for every batch size that it has not seen.
    """

    def __init__(
        self,
        tower: nn.Module,
        run: Callable[[Tensor], Tensor],
        chunk: int,
        *,
        remainders: Sequence[int] = (),
    ) -> None:
        super().__init__()
        self.tower, self.chunk, self.remainders = tower, chunk, tuple(remainders)
        self._run = run

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("tower"), name)

    def forward(self, pixels: Tensor, **hooks: Any) -> Tensor:
        """[M, 3, S, S] -> [M, E]."""
        count = len(pixels)
        if hooks or pixels.dtype != torch.uint8 or count > self.chunk:
            out: Tensor = self.tower(pixels, **hooks)
            return out
        if 2 * count > self.chunk:
            return self._run(_filled(pixels, self.chunk))[:count].clone()
        size = next((size for size in self.remainders if size >= count), count)
        few: Tensor = self.tower(_filled(pixels, size))
        return few[:count]


def _filled(pixels: Tensor, size: int) -> Tensor:
    """pixels [M, ...] with black images behind them: [size, ...]."""
    missing = size - len(pixels)
    if missing == 0:
        return pixels
    return torch.cat([pixels, pixels.new_zeros(missing, *pixels.shape[1:])])


def compiled(tower: nn.Module, chunk: int, *, backend: str = "inductor") -> SteadyTower:
    """The tower through Inductor for chunks of exactly `chunk` images; compiled when first called.

    On a CPU the weights are frozen into the code, which lets Inductor pack them.
    """
    from torch._inductor import config as inductor

    run = torch.compile(tower, dynamic=False, backend=backend)

    def frozen(pixels: Tensor) -> Tensor:
        # Freezing looks at parameters without gradients and needs grad mode to be off.
        with inductor.patch(freezing=pixels.device.type == "cpu"), torch.no_grad():
            out: Tensor = run(pixels)
            return out

    return SteadyTower(tower, frozen, chunk)


def graphed(tower: nn.Module, chunk: int, pixels: Tensor) -> SteadyTower:
    """The tower as one CUDA graph for chunks of `chunk` images like `pixels` [1, 3, S, S].

    A graph replays every launch of a forward at once, so the host has nothing to keep up with.
    """
    device = pixels.device
    inputs = pixels[:1].expand(chunk, -1, -1, -1).clone()
    aside = torch.cuda.Stream(device)
    aside.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(aside), torch.inference_mode():
        for _ in range(3):  # autotuning and lazy set-up must not happen while recording
            tower(inputs)
    torch.cuda.current_stream(device).wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    # Threads that decode meanwhile may allocate and wait: only this one must not.
    recording = torch.cuda.graph(graph, capture_error_mode="thread_local")
    with recording, torch.inference_mode():
        outputs = tower(inputs)

    def replay(filled: Tensor) -> Tensor:
        inputs.copy_(filled)
        graph.replay()
        result: Tensor = outputs
        return result

    return SteadyTower(tower, replay, chunk, remainders=REMAINDERS)
