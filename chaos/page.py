"""The table of the fault test, and its page docs/faults.md."""

import re
from importlib.metadata import version
from pathlib import Path

from chaos.bench import CHECKPOINT_SECONDS, Bench, Row
from stages.tracking.identity import machine


def table(rows: list[Row], folder: Path) -> str:
    lines = ["| fault | tried | survived | bytes equal | work lost, worst | what the user sees |"]
    lines.append("| --- | ---: | ---: | ---: | ---: | --- |")
    for row in rows:
        lost = f"{max(row.lost):.1f} s" if row.lost else ""
        words = " ".join((row.failure or row.message).replace("|", "\\|").split())
        words = re.sub(re.escape(str(folder)) + r"/[^/\s]+/", "", words)
        words = words if len(words) <= 200 else words[:197] + "..."
        equal = f"{row.compared} of {row.compared}" if row.compared else ""
        lines.append(f"| {row.fault} | {row.tried} | {row.survived} | {equal} | {lost} | {words} |")
    return "\n".join(lines)


def page(bench: Bench, rows: list[Row], kills_asked: int, seconds: float) -> str:
    box = machine()
    tools = ", ".join(f"{name} {version(name)}" for name in ("torch", "lightning", "dvc", "mlflow"))
    kills = sum(row.tried for row in rows if row.lost)
    remedies = sum(row.repaired for row in rows)
    return f"""# Fault test

Written by `make chaos` (here `python -m chaos --seed {bench.seed} --kills {kills_asked}`); `make test` runs a short
form.

The tiny pipeline is broken in {len(rows)} ways, {kills} times by killing it. After each fault, `dvc repro` goes on, and
every out, by SHA-256, and `dvc.lock` are compared with those of a run that nothing disturbed. A case fails where a
byte differs, a process is left behind, a traceback is shown, or nothing says what is wrong.

{table(rows, bench.folder)}

- **tried, survived**: faults made, and those after which everything was as it should be.
- **bytes equal**: comparisons of all outs with the undisturbed run. A kill case compares when its pipeline ends.
- Kills that cut DVC's own writing short, of `dvc.lock` or of `.dvc/tmp/rwlock`, so that it refused the file until the
  documented remedy was taken: {remedies}.
- **work lost**: from the latest save (checkpoint, scores, finished stage), or the start of the stage where it had
  saved nothing yet, to the kill; the worst of the case. Checkpoints were {CHECKPOINT_SECONDS} s apart here (60 s by
  default). The longest time without a save in the undisturbed run, a stage's start-up, was
  {bench.longest_without_save:.1f} s.
- **what the user sees**: the line as shown, without the path of the copy, cut at 200 characters.

Machine: {box["machine.cores"]} cores, {box["machine.processor"]}, accelerator {box["machine.accelerator"]}. Python
{box["machine.python"]}, {tools}.
Commit {bench.commit}, seed {bench.seed}, {seconds / 60:.0f} minutes.
"""
