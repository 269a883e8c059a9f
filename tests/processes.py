"""Several processes: a function in each, with torch.distributed ready, and its results."""

import os
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any
import torch
import torch.distributed as dist


def _one(
    rank: int, world: int, folder: Path, timeout: float, function: Callable, args: tuple
) -> None:
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    torch.set_num_threads(1)
    try:
        dist.init_process_group(
            "gloo",
            store=dist.FileStore(str(folder / "store"), world),
            rank=rank,
            world_size=world,
            timeout=timedelta(seconds=2 * timeout),
        )
        torch.save(function(rank, *args), folder / f"{rank}.pt")
    except BaseException:
        (folder / f"{rank}.txt").write_text(traceback.format_exc())
        raise SystemExit(1)
    dist.destroy_process_group()


def in_processes(
    world: int, folder: Path, function: Callable, *args: Any, timeout: float = 60
) -> list[Any]:
    """`function(rank, *args)` in `world` gloo processes of one thread each; its results by rank.

    function: of a module's top level, returns tensors and containers of them; folder: empty, for
    the store and the results. A process that raises fails the call with its traceback, one that
    has not ended after `timeout` seconds with a TimeoutError; none outlives the call.
    """
    context = torch.multiprocessing.get_context("spawn")
    started = [
        context.Process(
            target=_one, args=(rank, world, folder, timeout, function, args), daemon=True
        )
        for rank in range(world)
    ]
    deadline = time.monotonic() + timeout
    try:
        for process in started:
            process.start()
        while time.monotonic() < deadline:
            if any(p.exitcode for p in started) or not any(p.is_alive() for p in started):
                break
            time.sleep(0.02)
        hung = [rank for rank, p in enumerate(started) if p.is_alive()]
        failed = [rank for rank, p in enumerate(started) if p.exitcode]
    finally:
        for process in started:
            if process.is_alive():
                process.kill()
        for process in started:
            process.join()
    if failed:
        notes = [(rank, folder / f"{rank}.txt") for rank in range(world)]
        traces = "\n".join(f"rank {rank}:\n{p.read_text()}" for rank, p in notes if p.exists())
        raise RuntimeError(f"of {world} processes, {failed} failed\n{traces}")
    if hung:
        raise TimeoutError(f"of {world} processes, {hung} had not ended after {timeout} s")
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(world)]


def share(batch: torch.Tensor, sizes: list[int]) -> list[torch.Tensor]:
    "The parts of one batch that the ranks get, in order; of any sizes but 0, which is refused."
    if sum(sizes) != len(batch) or min(sizes) < 1:
        raise ValueError(f"sizes must be positive and add up to {len(batch)}, got {sizes}")
    return list(batch.split(sizes))
