"""One stage of the measurements on a GPU: python benchmarks/run_gpu.py RESULTS_DIR STAGE. run_gpu.sh runs all of them.

    tests     the tests marked gpu, then the CUDA memory and race checkers
    op        attention in training shapes, forward and with the backward pass
    decode    attention of one new token a row
    e2e       whole models: a training step, generation

A worker process does the jobs in order of importance and writes RESULTS_DIR/STAGE.json after each. One that crashes it, loses
the CUDA context or takes too long costs that job alone: the rest goes to a new worker. A stage that is started again goes on
where it stopped. --dry-run: tiny shapes, which also run without a GPU; that tries the control flow and measures nothing.
--fill FOLDER: rows that FOLDER has of the same device and versions are kept, each with its commit, so that the time goes to
those that it lacks. Take out of FOLDER/STAGE.json first what has changed since.
--only TEXT...: of op, decode and e2e the rows whose key has one of these in it, those of the first text first.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import torch

import measure
from gpu_jobs import Job, jobs, run_job
from gpu_tests import LOST_DEVICE, SANITIZER_TOOLS, counts, outcome_row, run_tests, sanitize, sanitizer_row

STAGES = {"tests": 300.0, "op": 300.0, "decode": 240.0, "e2e": 240.0}  # seconds
SANITIZER_SHARE = 0.4  # of the stage's time, kept for the sanitizer
CRASHES_OF_A_WAY = 2  # after which a stage goes on without it
LOG, LOG_BYTES = "workers.log", 2**20


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("results", type=Path, help="folder of the results")
    parser.add_argument("stage", choices=STAGES)
    parser.add_argument("--seconds", type=float, help="for the whole stage; default: " + str(STAGES))
    parser.add_argument("--dry-run", action="store_true", help="tiny shapes, on any machine")
    parser.add_argument("--fill", type=Path, metavar="FOLDER", help="results of an earlier commit, whose rows are kept")
    parser.add_argument("--only", nargs="+", default=[""], metavar="TEXT", help="rows whose key has one of these in it")
    parser.add_argument("--progress", type=Path, help=argparse.SUPPRESS)  # makes it a worker
    args = parser.parse_args(argv)
    if args.progress:
        return work(args)
    if args.only != [""] and (args.stage == "tests" or not wanted(jobs(args.stage, args.dry_run), args.only)):
        parser.error(f"--only: no row of the stage {args.stage} has {' or '.join(args.only)} in its key")
    if not (args.dry_run or torch.cuda.is_available()):
        print(f"{args.stage}: torch finds no GPU; --dry-run tries the stages without one")
        return 1
    args.results.mkdir(parents=True, exist_ok=True)
    begin = time.monotonic()
    seconds = args.seconds or STAGES[args.stage]
    share = 1 - SANITIZER_SHARE if args.stage == "tests" else 1
    environment = measure.environment("cuda" if torch.cuda.is_available() else "cpu")
    if args.fill:
        fill(args, environment)
    supervise(args, environment, begin + share * seconds)
    results = open_results(args, environment)
    if args.stage == "tests":
        for index, tool in enumerate(SANITIZER_TOOLS):
            if not results.done(sanitizer_row(tool)):
                left = 0 if args.dry_run else begin + seconds - time.monotonic()
                results.put(sanitize(tool, left / (len(SANITIZER_TOOLS) - index)))
        results.put(counts(results))
    shorten(args.results / LOG)
    print("\n".join(table(args.stage, results)))
    print(f"{args.stage}: {time.monotonic() - begin:.0f} s; every row: {results.path}")
    return int(args.stage == "tests" and results.rows["counts"]["failed"] > 0)


def open_results(args: argparse.Namespace, environment: dict[str, Any]) -> measure.Results:
    return measure.Results(args.results / f"{args.stage}.json", environment)


def fill(args: argparse.Namespace, environment: dict[str, Any]) -> None:
    """Puts the rows that were measured at an earlier commit into a stage's results that have none yet."""
    known, results = json.loads((args.fill / f"{args.stage}.json").read_text(encoding="utf-8")), open_results(args, environment)
    versions = [name for name in measure.SAME_RESULTS if name != "source"]
    if results.rows or any(known["environment"].get(name) != environment.get(name) for name in versions):
        return
    kept = [row for row in known["rows"] if row.get("complete") and "failed" not in row and row.get("outcome") != "failed"]
    for row in kept:
        results.put({"commit": known["environment"]["commit"]} | row, write=row is kept[-1])


def supervise(args: argparse.Namespace, environment: dict[str, Any], deadline: float) -> None:
    """Starts workers until nothing is left, time is over, or one ends without having done anything."""
    crashes: Counter[str] = Counter()
    while (left := deadline - time.monotonic()) > 0:
        with tempfile.TemporaryDirectory() as folder, open(args.results / LOG, "ab") as log:
            progress = Path(folder) / "progress"
            progress.touch()
            told = {
                "environment": environment,
                "without": [way for way, count in crashes.items() if count >= CRASHES_OF_A_WAY],
            }
            command = [sys.executable, __file__, str(args.results), args.stage, "--progress", str(progress)]
            command += (["--dry-run"] if args.dry_run else []) + ["--only", *args.only]
            try:
                done = subprocess.run(
                    command, input=json.dumps(told), text=True, stdout=log, stderr=log, timeout=left, cwd=measure.ROOT
                )
            except subprocess.TimeoutExpired:
                return
            begun = progress.read_text().splitlines()
        if done.returncode == 0:
            return
        if not begun:
            last = (args.results / LOG).read_text(errors="replace").splitlines()[-1:]
            print(f"{args.stage}: the worker ended with status {done.returncode} before its first job: {''.join(last)}")
            return
        if done.returncode != LOST_DEVICE:  # then the worker wrote the row itself
            crashed = record_crash(args, open_results(args, environment), begun, done.returncode)
            crashes.update([crashed] if crashed else [])


def record_crash(args: argparse.Namespace, results: measure.Results, begun: list[str], status: int) -> str | None:
    """Puts into the row of the job that ended a worker why it has no more numbers; the way that did it, where it is known."""
    reason = "it took too long" if status == -signal.SIGALRM else f"the worker ended with status {status}"
    job = next(line[1:] for line in reversed(begun) if line[0] == "@")
    if args.stage == "tests":
        results.put(outcome_row(job, "failed", reason))
        return None
    key = next(each.key for each in jobs(args.stage, args.dry_run) if each.name == job)
    way = begun[-1][1:] if begun[-1][0] == "+" else None
    row = results.rows.get(key, {"key": key, "ways": {}})
    if way is None:
        results.put(row | {"failed": reason, "complete": True})
    else:  # the row's other ways are left to the next worker
        row["ways"][way] = {"failed": reason}
        results.put(row)
    return way


def wanted(every: list[Job], texts: list[str]) -> list[Job]:
    """The jobs whose key has one of the texts in it, those of the first text first."""
    found = {job: None for text in texts for job in every if text in job.key}
    return list(found)


def work(args: argparse.Namespace) -> int:
    """The worker: the jobs that are not done, each announced in the progress file before it begins."""
    told = json.load(sys.stdin)
    results = open_results(args, told["environment"])

    def announce(mark: str, name: str) -> None:
        with open(args.progress, "a") as file:
            file.write(f"{mark}{name}\n")

    if args.stage == "tests":
        run_tests(results, lambda nodeid: announce("@", nodeid), args.dry_run)
        return 0
    for job in wanted(jobs(args.stage, args.dry_run), args.only):
        if job.done(results):
            continue
        announce("@", job.name)
        signal.alarm(job.seconds)  # no handler: the signal ends this process, wherever it hangs
        try:
            run_job(job, results, told["without"], lambda way: announce("+", way))
        except Exception as error:
            results.put(results.rows.get(job.key, {"key": job.key}) | {"failed": measure.first_line(error), "complete": True})
        try:
            measure.settle()
        except Exception:
            os._exit(LOST_DEVICE)
        signal.alarm(0)
    return 0


def table(stage: str, results: measure.Results) -> list[str]:
    """The rows in short, for a terminal."""
    rows = list(results.rows.values())
    if stage == "tests":
        found = results.rows["counts"]
        failed = [row for row in rows if row.get("outcome") == "failed"]
        lines = [f"  FAILED {row['key']}: {' | '.join(row.get('lines', []))[:200]}" for row in failed[:25]]
        for key in map(sanitizer_row, SANITIZER_TOOLS):
            check = results.rows[key]
            lines.append(f"  {key}: {check['outcome']}: {check['lines'][-1] if check['lines'] else ''}")
        return [f"{found['passed']} passed, {found['failed']} failed, {found['skipped']} skipped", *lines]
    return [_line(row) for row in rows]


def _line(row: dict[str, Any]) -> str:
    numbers = {name: value for name, value in row.items() if name.endswith("_per_second")}
    if numbers:
        return f"{row['key']}: " + ", ".join(f"{name} {value:.3g}" for name, value in numbers.items())
    ways = row.get("ways", {})
    times = [f"{name} {way['median'] * 1e6:.0f}" for name, way in ways.items() if "median" in way]
    failed = [f"{name}: {way['failed'][:60]}" for name, way in ways.items() if "failed" in way]
    ratio = row.get("failed", "no ratio")
    if row.get("ratio"):
        ratio = f"{row['ratio']:.2f}x" + (" LOSS" if row["ratio"] < 1 else "")
    return f"{row['key']}: {ratio} | us: {', '.join(times)}" + (f" | {'; '.join(failed)}" if failed else "")


def shorten(log: Path) -> None:
    """Keeps the end of the workers' output."""
    if log.stat().st_size > LOG_BYTES:
        log.write_bytes(log.read_bytes()[-LOG_BYTES:])


if __name__ == "__main__":
    gc.freeze()  # else every graph capture goes through all of torch's objects
    sys.exit(main())
