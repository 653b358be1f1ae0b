"""Fair timing on noisy CPUs and on GPUs, what it was measured on, and result files that survive an interruption.

CPU: everything that is compared runs in one process, in turn, over input sets that together exceed twice the last-level
cache ("cold"; "warm" where the sets hit their limit first); medians and the 20th and 80th percentile of seconds a call.
GPU: device time by events around replays of a CUDA graph that runs every input set once; the sets exceed twice the L2.
"""

from __future__ import annotations

import gc
import hashlib
import importlib.metadata
import json
import os
import platform
import re
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
CACHE_FACTOR = 2  # input sets together over the last-level cache
MAX_SETS = 32
SAMPLE_SECONDS = 2e-3  # a CPU sample repeats a short call until it lasts this long
GPU_SECONDS = 0.05  # of replays
CODE = (
    "prefix_kernels/**/*.py", "python/**/*.py", "csrc/**/*.*", "CMakeLists.txt", "benchmarks/cases.py", "benchmarks/measure.py",
    "benchmarks/rivals.py", "benchmarks/attention_row.py", "benchmarks/bench_*.py", "benchmarks/gpu_jobs.py",
)  # fmt: skip
SAME_RESULTS = ("source", "python", "torch", "triton", "transformers", "device", "threads")

Call = Callable[[int], Any]  # runs once on the input set of that number


def summary(samples: list[float], calls: int) -> dict[str, Any]:
    """median, p20 and p80 of seconds a call; each sample is the mean of `calls` calls."""
    ordered = sorted(samples)
    numbers = {"median": statistics.median(ordered)}
    numbers |= {name: ordered[round(share * (len(ordered) - 1))] for name, share in (("p20", 0.2), ("p80", 0.8))}
    return {name: float(f"{number:.5g}") for name, number in numbers.items()} | {"samples": len(ordered), "calls": calls}


class Comparison:
    """Ways to compute the same thing, timed in turn by the clock. Each way is called with the number of an input set.

    warm_up: how often each way is called on every set first, so that all memory is touched and every lazy thing is done; then
    it is found out how often a short call must be repeated. 0: neither.
    settles: an untimed call before every sample, so that what the way before left behind is not charged to this one. (After
    memory of some 60 MB was freed, the next small allocations took milliseconds.)
    """

    def __init__(self, ways: Mapping[str, Call], sets: int = 1, warm_up: int = 1, settles: bool = True):
        self.ways, self.sets, self.settles = dict(ways), sets, settles
        self.samples: dict[str, list[float]] = {name: [] for name in ways}
        self._position = dict.fromkeys(ways, 0)
        self._calls = dict.fromkeys(ways, 1)
        for name in ways if warm_up else ():
            for _ in range(sets * warm_up):
                self._timed(name)
            once = self._timed(name)
            self._calls[name] = max(1, min(1000, int(SAMPLE_SECONDS / max(once, 1e-9))))

    def sample(self, name: str) -> float:
        """One sample of one way: seconds a call, kept for timings()."""
        seconds = self._timed(name)
        self.samples[name].append(seconds)
        return seconds

    def run(self, seconds: float, rounds: int) -> None:
        """Rounds of one sample a way, for `seconds` and at least `rounds` times; the way that begins changes."""
        names, begin, done = list(self.ways), time.perf_counter(), 0
        while names and (done < rounds or time.perf_counter() - begin < seconds):
            first = done % len(names)
            for name in names[first:] + names[:first]:
                self.sample(name)
            done += 1

    def timings(self) -> dict[str, dict[str, Any]]:
        return {name: summary(samples, self._calls[name]) for name, samples in self.samples.items()}

    def _timed(self, name: str) -> float:
        way, calls, position = self.ways[name], self._calls[name], self._position[name]
        if self.settles:
            way((position - 1) % self.sets)
        begin = time.perf_counter()
        for index in range(position, position + calls):
            way(index % self.sets)
        seconds = time.perf_counter() - begin
        self._position[name] = (position + calls) % self.sets
        return seconds / calls


def device_timing(way: Call, sets: int) -> dict[str, Any]:
    """Device seconds a call, on the current CUDA device; "mode" says whether a graph was replayed or a queue filled."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        _each(way, sets)
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    run, mode, stream = lambda: _each(way, sets), "graph", torch.cuda.current_stream()
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            _each(way, sets)
        run = graph.replay
    except Exception as error:
        mode = f"queue: {first_line(error)}"
        torch.cuda.set_stream(stream)  # a failed capture leaves its own stream current
    once = min(_wall(run), _wall(run))
    repeats = min(200, max(10 if once < 0.05 else 3, int(GPU_SECONDS / once)))
    events = [tuple(torch.cuda.Event(enable_timing=True) for _ in range(2)) for _ in range(repeats)]
    torch.cuda._sleep(10_000_000)  # some milliseconds in which the host gets ahead of the device
    for start, end in events:
        start.record()
        run()
        end.record()
    torch.cuda.synchronize()
    return summary([start.elapsed_time(end) / 1e3 / sets for start, end in events], sets) | {"mode": mode}


def with_peak(call: Callable[[], Any]) -> tuple[Any, int | None]:
    """What a call gives, and the device memory it needs at its highest above what is held before it; None without a device."""
    if not torch.cuda.is_available():
        return call(), None
    settle()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    result = call()
    torch.cuda.synchronize()
    return result, torch.cuda.max_memory_allocated() - before


def ceilings(device: str) -> dict[str, float]:
    """What this device reaches: bytes a second, read and written, of a large copy; operations a second of a matrix product."""
    length, side = (2**31, 8192) if device == "cuda" else (2**22, 512)
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    source, a, b = (torch.randn(shape, device=device, dtype=dtype) for shape in ((length,), (side, side), (side, side)))
    target = torch.empty_like(source)
    # In a graph copy_ may become a job of the copy engines; neg moves the same bytes in a kernel.
    ways = lambda index: a @ b, lambda index: target.copy_(source), lambda index: torch.neg(source, out=target)
    seconds = []
    for way in ways:
        if device == "cuda":
            seconds.append(device_timing(way, 1)["median"])
        else:
            comparison = Comparison({"ceiling": way})
            comparison.run(0, 5)
            seconds.append(comparison.timings()["ceiling"]["median"])
    bytes_moved = 2 * length * source.element_size()
    return {"copy_bytes_per_second": bytes_moved / min(seconds[1:]), "matmul_flops_per_second": 2 * side**3 / seconds[0]}


def settle() -> None:
    """Frees what nothing refers to any more, on the device too; raises where the device is lost."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        torch.cuda.empty_cache()


def sets_needed(set_bytes: int, device: str) -> tuple[int, str]:
    """How many input sets of that size exceed the cache CACHE_FACTOR times, and whether that many are allowed."""
    wanted = CACHE_FACTOR * last_level_cache(device) // max(set_bytes, 1) + 1
    return min(wanted, MAX_SETS), "cold" if wanted <= MAX_SETS else "warm"


def last_level_cache(device: str) -> int:
    """Bytes; 32 MiB where the system does not say."""
    if device == "cuda":
        return torch.cuda.get_device_properties(0).L2_cache_size
    sizes = [file.read_text().strip() for file in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")]
    units = {"K": 2**10, "M": 2**20}
    return max((int(size[:-1]) * units[size[-1]] for size in sizes if size[-1:] in units), default=2**25)


def errors(actual: torch.Tensor, expected: torch.Tensor) -> list[float]:
    """[largest absolute, mean absolute, ‖actual − expected‖ / ‖expected‖]; NaN or infinity in `actual` stays visible."""
    difference = actual.detach().double() - expected.double()
    numbers = difference.abs().max(), difference.abs().mean(), difference.norm() / expected.double().norm()
    return [float(f"{number.item():.3g}") for number in numbers]


def first_line(error: BaseException) -> str:
    """An exception in one line of at most 200 characters."""
    lines = [line for line in str(error).splitlines() if line.strip()] or [""]
    return f"{type(error).__name__}: {lines[0]}"[:200]


def environment(device: str) -> dict[str, Any]:
    """What results were measured on and with. `source` names the code itself, committed or not.

    The variable COMMIT says the commit where the code is a copy, without git or within another repository.
    """
    copied = os.environ.get("COMMIT")
    status = None if copied else _git("status", "--porcelain")
    return {
        "commit": copied or _git("rev-parse", "HEAD"),
        "dirty": None if status is None else bool(status),
        "source": source_fingerprint(),
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d"),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "transformers": _version("transformers"),
        "device": torch.cuda.get_device_name() if device == "cuda" else _cpu_name(),
        "instructions": None if device == "cuda" else _instructions(),
        "cache_bytes": last_level_cache(device),
        "threads": torch.get_num_threads(),
    }


def _instructions() -> str:
    """The widest vectors of the processor, and AMX where it multiplies bfloat16 by matrices."""
    amx = getattr(torch.cpu, "_is_amx_tile_supported", lambda: False)()
    return torch.backends.cpu.get_cpu_capability() + (", AMX" if amx else "")


def source_fingerprint(root: Path = ROOT) -> str:
    """Twelve digits of a hash over the code under measurement and the benchmarks."""
    digest = hashlib.sha256()
    for file in sorted({file for pattern in CODE for file in root.glob(pattern)}):
        digest.update(f"{file.relative_to(root)}\n".encode() + file.read_bytes())
    return digest.hexdigest()[:12]


class Results:
    """Rows in a JSON file that is replaced whole after each of them.

    Rows found in the file are kept, and not measured again, if they come from the same code, versions, device and number of
    threads; otherwise the first new row replaces all of them.
    """

    def __init__(self, path: str | os.PathLike, environment: dict[str, Any]):
        self.path, self.environment = Path(path), environment
        self.rows: dict[str, dict[str, Any]] = {}
        if self.path.exists():
            found = json.loads(self.path.read_text(encoding="utf-8"))
            if all(found["environment"].get(name) == environment.get(name) for name in SAME_RESULTS):
                self.environment = found["environment"]
                self.rows = {row["key"]: row for row in found["rows"]}

    def done(self, key: str) -> bool:
        return self.rows.get(key, {}).get("complete", False)

    def put(self, row: dict[str, Any], write: bool = True) -> None:
        """Adds or replaces the row of that key. "complete" says whether a later start may leave it out."""
        self.rows[row["key"]] = row
        if not write:  # the next one that is written takes it along
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        temporary = self.path.with_name(f".{self.path.name}.new")
        rows = ",\n".join(json.dumps(each, ensure_ascii=False) for each in self.rows.values())  # one line each
        environment = json.dumps(self.environment, ensure_ascii=False)
        temporary.write_text(f'{{"environment": {environment},\n"rows": [\n{rows}\n]}}\n', encoding="utf-8")
        os.replace(temporary, self.path)


def _each(way: Call, sets: int) -> None:
    for index in range(sets):
        way(index)


def _wall(run: Callable[[], Any]) -> float:
    begin = time.perf_counter()
    run()
    torch.cuda.synchronize()
    return time.perf_counter() - begin


def _git(*arguments: str) -> str | None:
    """None where this is no checkout or git is missing."""
    try:
        shown = subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True, check=True, timeout=20)
    except (OSError, subprocess.SubprocessError):
        return None
    return shown.stdout.strip()


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    names = re.findall(r"^model name\s*:\s*(.+)$", info.read_text(), re.MULTILINE) if info.exists() else []
    return f"{names[0] if names else platform.processor() or platform.machine()}, {os.cpu_count()} cores"
