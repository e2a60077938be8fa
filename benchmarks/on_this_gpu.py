"""Everything that a new GPU is asked, in one command: is it right, how fast is it, what should its tiles be.

    python benchmarks/on_this_gpu.py [--stages NAME ...] [--seconds S] [--out FOLDER]

Stages run one after the other, each in processes of its own and with a share of the time that is left; one that fails
or is killed for time does not stop the others. The most telling come first, and what does not fit is not started.
``summary.json`` is written after every stage: what ran, how it ended, and every figure beside its goal. All that the
processes print is in ``log.txt``. Another run into the same folder adds its stages.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from lab.goals import THINKING, Row, embedded_rows, rows_of
from lab.gpu_stages import BENCHMARKS, ROOT, STAGES, Command, Room, Stage, Unavailable, python, read_results

SECONDS = 3600  # several times what all stages need to tell something
LINE = 120  # characters of what a stage found
LOG_BYTES = 2**19  # of one process, half from its beginning and half from its end


def those_that_fit(stages: dict[str, Stage], seconds: float) -> list[str]:
    """The first ones, as many as ``seconds`` are enough for."""
    chosen = []
    for name, stage in stages.items():
        seconds -= stage.seconds
        if seconds < 0:
            break
        chosen.append(name)
    return chosen


def budget(stage: Stage, others: Iterable[Stage], left: float) -> float:
    """Seconds of ``left`` for ``stage``, where ``others`` come after it."""
    return left * stage.seconds / (stage.seconds + sum(other.seconds for other in others))


def environment() -> dict[str, str]:
    """This checkout comes first, whatever is installed; a sanitizer sees every allocation by itself."""
    paths = [ROOT, ROOT / "kernels", BENCHMARKS, os.environ.get("PYTHONPATH")]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(str(path) for path in paths if path)}


def end(process: subprocess.Popen) -> None:
    """Kill it with all that it started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def run_together(commands: list[Command], scratch: Path, seconds: float) -> tuple[list[int | None], list[str]]:
    """Exit codes, None where it was killed for time, and what each process printed."""
    until = time.monotonic() + seconds
    paths = [scratch / f"{number}.log" for number in range(len(commands))]
    processes, codes = [], []
    try:
        for command, path in zip(commands, paths, strict=True):
            with path.open("wb") as log:
                processes.append(
                    subprocess.Popen(
                        list(map(str, command)),
                        stdin=subprocess.DEVNULL,
                        stdout=log,
                        stderr=subprocess.STDOUT,
                        cwd=ROOT,
                        env=environment(),
                        start_new_session=True,
                    )
                )
        for process in processes:
            try:
                codes.append(process.wait(max(0.0, until - time.monotonic())))
            except subprocess.TimeoutExpired:
                codes.append(None)
    finally:
        for process in processes:
            end(process)
    return codes, [shortened(path) for path in paths]


def shortened(path: Path) -> str:
    text = path.read_bytes()
    if len(text) > LOG_BYTES:
        half = LOG_BYTES // 2
        text = text[:half] + f"\n[... {len(text) - LOG_BYTES} bytes left out ...]\n".encode() + text[-half:]
    return text.decode(errors="replace").replace("\r", "\n")


def run_stage(name: str, stage: Stage, out: Path, seconds: float) -> dict[str, Any]:
    """Run it and say how it ended and what was found; never raises for what the stage does."""
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix=f"{name}-", ignore_cleanup_errors=True) as folder:
        room = Room(out, Path(folder), seconds)
        try:
            commands = stage.commands(room)
        except Unavailable as reason:
            return {"ended": "unavailable", "why": str(reason), "seconds": 0.0}
        try:
            codes, logs = run_together(commands, room.scratch, seconds)
        except OSError as error:  # a program that cannot be started
            codes, logs = [], [f"{type(error).__name__}: {error}"]
        with (out / "log.txt").open("a") as file:
            for command, code, log in zip(commands, [*codes, *[None] * len(commands)], logs, strict=False):
                file.write(f"\n##### {name}: {' '.join(map(str, command))}\n{log}\n##### exit code {code}\n")
        for part in out.glob("*.part"):  # of what was killed while it wrote
            part.unlink()
        try:
            found = stage.read(room, logs)
        except Exception as error:
            found = {"unreadable": f"{type(error).__name__}: {error}"}
    ended = "killed for time" if None in codes else "well" if codes and not any(codes) else "failed"
    failed = [log for code, log in zip(codes or [1], logs, strict=True) if code != 0]
    return {
        "ended": ended,
        "exit_codes": codes,
        "seconds": round(time.monotonic() - began, 1),
        "budget_seconds": round(seconds, 1),
        "last_lines": [line for log in failed for line in log.strip().splitlines()[-1:]],
        "found": found,
    }


# What is kept and printed


def write_summary(out: Path, summary: dict[str, Any]) -> None:
    """Whole or not at all, since a run may be stopped at any moment."""
    part = out / "summary.part"
    part.write_text(json.dumps(summary, indent=1) + "\n")
    part.replace(out / "summary.json")


def earlier_stages(out: Path, gpu: dict[str, Any], besides: Iterable[str]) -> dict[str, Any]:
    """What the summary in the folder says of other stages, if it is this device's."""
    path = out / "summary.json"
    earlier = json.loads(path.read_text()) if path.exists() else {}
    if earlier.get("device") != gpu["device"]:
        return {}
    return {name: record for name, record in earlier["stages"].items() if name not in besides}


def check_row(stages: dict[str, dict]) -> Row:
    found = stages.get("tests", {}).get("found", {})
    ran = bool(found.get("chosen"))
    right = ran and found["passed"] + found["skipped"] == found["chosen"] and found["on_gpu"] > 0
    return Row("kernels' tests that failed", "none, all run", found["failed"] if ran else None, right if ran else None)


def figures_of(stages: dict[str, dict], out: Path) -> list[Row]:
    scores = stages.get("train", {}).get("found", {}).get("scores")
    return [check_row(stages), *rows_of(read_results(out)), *embedded_rows(scores)]


def headline(name: str, record: dict[str, Any]) -> str:
    """What a stage found, in a line, or why it found nothing."""
    found, said = record.get("found", {}), ""
    if "why" in record:
        said = record["why"]
    elif "unreadable" in found:
        said = found["unreadable"]
    elif name == "tests" and found:
        form = "{passed} passed, {failed} failed, {skipped} skipped of {chosen}; {on_gpu} ran on the GPU"
        said = form.format(**found)
    elif found.get("cases"):
        said = f"{found['cases']} cases, {len(found['not_run'])} not run"
    elif "scores" in found:
        score = found["scores"][THINKING]
        said = f"{score['accuracy']:.1%} right with its thoughts, log-likelihood {score['log_likelihood']:.3f}"
    elif found.get("kernels"):
        changed = [each for each in found["kernels"].values() if len(set(each.values())) > 1]
        said = f"{len(found['kernels'])} kernels, {len(changed)} with another tile"
    elif found.get("summaries"):
        said = "; ".join(found["summaries"])
    return (said or next(iter(record.get("last_lines", [])), ""))[:LINE]


def columns(rows: list[Sequence[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )


def tables(summary: dict[str, Any]) -> str:
    stages = [("stage", "ended", "seconds", "found")]
    for name, record in summary["stages"].items():
        stages.append((name, record["ended"], f"{record['seconds']:.0f}", headline(name, record)))
    stages += [(name, "not started", "", why) for name, why in summary["not_started"].items()]
    figures = [("figure", "goal", "measured", "met")]
    for row in (Row(**each) for each in summary["figures"]):
        measured = "not measured" if row.measured is None else f"{row.measured:.4g}"
        figures.append((row.what, row.goal, measured, {True: "yes", False: "NO", None: ""}[row.met]))
    return f"{columns(stages)}\n\n{columns(figures)}"


def describe_gpu() -> dict[str, Any]:
    """Asked in another process, so that this one takes no memory of the device; SystemExit where there is none."""
    code = (
        "import json, torch\n"
        "from lab.device_limits import describe, versions\n"
        "there = torch.cuda.is_available()\n"
        "print(json.dumps({'device': describe(torch.device('cuda')), 'versions': versions()} if there else None))"
    )
    done = subprocess.run(python("-c", code), env=environment(), capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"on_this_gpu.py could not ask for the device:\n{done.stderr.strip()}")
    found = json.loads(done.stdout.splitlines()[-1])
    if found is None:
        raise SystemExit("on_this_gpu.py needs a CUDA device: torch.cuda.is_available() is False")
    return found


def run_stages(stages: dict[str, Stage], gpu: dict[str, Any], out: Path, seconds: float) -> dict[str, Any]:
    """Run those that fit in turn; returns the summary, which lies in ``out`` as well."""
    until = time.monotonic() + seconds
    out.mkdir(parents=True, exist_ok=True)
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    fitting = those_that_fit(stages, seconds)
    left_out = [name for name in stages if name not in fitting]
    summary = {
        **gpu,
        "date": now,
        "seconds": seconds,
        "stages": earlier_stages(out, gpu, besides=stages),
        "not_started": {name: f"{stages[name].seconds:g} s are its least, which were not left" for name in left_out},
        "figures": [],
    }
    for number, name in enumerate(fitting):
        later = [stages[other] for other in fitting[number + 1 :]]
        share = budget(stages[name], later, until - time.monotonic())
        print(f"{name}: {share:.0f} s at most", flush=True)
        record = run_stage(name, stages[name], out, share)
        summary["stages"][name] = record
        summary["figures"] = [row._asdict() for row in figures_of(summary["stages"], out)]
        write_summary(out, summary)
        print(f"{name}: {record['ended']} after {record['seconds']:.0f} s; {headline(name, record)}", flush=True)
    write_summary(out, summary)
    return summary


def stage_lines(stages: dict[str, Stage]) -> str:
    """What each stage does, for the help."""
    return columns([(f"  {name}", f"{stage.seconds:g}", stage.what) for name, stage in stages.items()])


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__.partition("\n")[0],
        epilog=f"stages, and the least seconds of each:\n{stage_lines(STAGES)}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--stages", nargs="+", choices=STAGES, default=list(STAGES), metavar="NAME", help="which, in this order (all)"
    )
    seconds = ("--seconds", "--limit-seconds")
    parser.add_argument(*seconds, type=float, default=SECONDS, help="for all stages together (%(default)s)")
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "on_this_gpu", help="folder (%(default)s)")
    options = parser.parse_args()
    stages = {name: STAGES[name] for name in options.stages}
    summary = run_stages(stages, describe_gpu(), options.out.resolve(), options.seconds)
    print(f"\n{tables(summary)}\n\n{options.out}")
    records = [record for name, record in summary["stages"].items() if name in stages]
    return 0 if all(record["ended"] in ("well", "unavailable") for record in records) else 1


if __name__ == "__main__":
    sys.exit(main())
