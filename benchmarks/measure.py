"""What the benchmarks share: things timed in turn, peak memory of a process, and where figures go."""

import json
import multiprocessing
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).parent / "results"


def seconds(run: Callable[[], object]) -> float:
    started = time.perf_counter()
    run()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - started


def in_turn(runs: Mapping[str, Callable[[], object]], repeats: int) -> list[dict[str, float]]:
    """The seconds of each, `repeats` times in turn, after one turn that is thrown away."""
    return [{name: seconds(run) for name, run in runs.items()} for _ in range(repeats + 1)][1:]


def spread(values: list[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "least": min(values), "most": max(values)}


def peak_mib(prepare: Callable[..., tuple[Callable[[], object], Callable[[], object]]], *arguments: Any) -> float:
    """The peak memory (on Linux) of what `prepare` returns second, above what is held after the first was run.

    Both run in a process of their own, since a peak never falls.
    """
    with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
        return pool.apply(_peak, (prepare, *arguments))


@torch.no_grad()
def _peak(prepare: Callable[..., tuple[Callable[[], object], Callable[[], object]]], *arguments: Any) -> float:
    warm_up, run = prepare(*arguments)
    warm_up()
    Path("/proc/self/clear_refs").write_text("5")  # forgets the peak so far
    before = _resident_kilobytes("VmRSS")
    run()
    return (_resident_kilobytes("VmHWM") - before) / 1024


def _resident_kilobytes(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field))


def machine() -> dict[str, Any]:
    info = Path("/proc/cpuinfo")
    names = {line.split(":")[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")}
    gpu = {"gpu": torch.cuda.get_device_name()} if torch.cuda.is_available() else {}
    return {
        "processor": ", ".join(sorted(names)) or platform.processor(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        **gpu,
    }


def write(name: str, settings: Mapping[str, Any], **figures: Any) -> None:
    """Write figures to `results/<name>.json`, with the settings and the machine."""
    RESULTS.mkdir(exist_ok=True)
    content = {"machine": machine(), "settings": dict(settings), **figures}
    (RESULTS / f"{name}.json").write_text(json.dumps(content, indent=1) + "\n")
