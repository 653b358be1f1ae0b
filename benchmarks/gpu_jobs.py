"""What a worker process of run_gpu.py does: the jobs of the stages op, decode and e2e, one row of results each."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch

import measure
from attention_row import measure_on_cpu, measure_on_gpu
from cases import Case, Run, gpu_decode_cases, gpu_op_cases, gpu_runs, tiny_decode_cases, tiny_op_cases, tiny_runs

CEILINGS = "ceilings"
SLOW_TO_COMPILE = "flex"  # gets jobs of its own, after all others
COMPILED_CASES = 6
COMPILED_SECONDS = 90
SECONDS = {"op": 45, "decode": 40, "e2e": 120}  # of a job


@dataclass(frozen=True)
class Job:
    """One row, or the addition of one way to a row. seconds: after which its process is ended."""

    name: str
    key: str
    seconds: int
    what: Case | Run | None = None  # None: the device's ceilings
    compiled: bool = False  # adds SLOW_TO_COMPILE alone

    def done(self, results: measure.Results) -> bool:
        row = results.rows.get(self.key, {})
        return results.done(self.key) and (not self.compiled or SLOW_TO_COMPILE in row.get("ways", {}))


def jobs(stage: str, dry_run: bool) -> list[Job]:
    """In order of importance."""
    if stage == "e2e":
        return [Job(run.key, run.key, SECONDS[stage], run) for run in (tiny_runs() if dry_run else gpu_runs())]
    if stage == "op":
        cases = tiny_op_cases() if dry_run else gpu_op_cases()
    else:
        cases = tiny_decode_cases() if dry_run else gpu_decode_cases()
    plain = [Job(CEILINGS, CEILINGS, SECONDS[stage]), *(Job(case.key, case.key, SECONDS[stage], case) for case in cases)]
    if stage == "decode" or dry_run:
        return plain
    dense = [case for case in cases if case.seqlens is None][:COMPILED_CASES]
    return plain + [Job(f"{SLOW_TO_COMPILE}: {case.key}", case.key, COMPILED_SECONDS, case, compiled=True) for case in dense]


def run_job(job: Job, results: measure.Results, without: Iterable[str], begin: Callable[[str], None]) -> None:
    """Does one job and puts its row. without: ways that are not tried; begin: told each way just before it is tried."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if job.what is None:
        results.put({"key": job.key, "complete": True} | measure.ceilings(device))
    elif isinstance(job.what, Run):
        results.put(_whole_model(job.what, device))
    elif device == "cpu":
        results.put(measure_on_cpu(job.what, seconds=0.02, rounds=2))
    else:
        before = results.rows.get(job.key, {})
        tried, filled = before.get("ways", {}), {"commit": before["commit"]} if "commit" in before else {}
        left_out = {*without, *tried}

        def wanted(name: str) -> bool:
            if name in left_out or (name == SLOW_TO_COMPILE) != job.compiled:
                return False
            begin(name)
            return True

        measure_on_gpu(job.what, wanted, lambda row: results.put(filled | row), tried)


_models: dict[Any, torch.nn.Module] = {}  # the last one: neighbouring jobs share it


def _whole_model(run: Run, device: str) -> dict[str, Any]:
    from bench_whole import measure_run, random_inputs, random_model
    from prefix_tuning import Prefix

    if run.model not in _models:
        _models.clear()
        gc.collect()
        measure.settle()
        _models[run.model] = random_model(run.model, device, torch.bfloat16 if device == "cuda" else torch.float32)
    model = _models[run.model]
    prefix = Prefix.for_model(model, run.prefix_len, seed=0)
    seconds, rounds = (1.0, 2) if device == "cuda" else (0.02, 2)
    return measure_run(run, model, prefix, random_inputs(run), seconds, rounds, trainer=True)
