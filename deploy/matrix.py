"""Install one built wheel into fresh environments of many Pythons and torches, and run it there.

    python -m deploy.matrix dist/spectral_ops-*.whl --python PATH... --torch 2.10.0 2.11.0 2.14.1
    python -m deploy.matrix --table                       renew the table in the documentation, and run nothing

Every torch is tried with the first Python, and every Python with the last torch; ``--full`` tries every pair. Each
environment gets that torch and then the wheel, by uv where it is on PATH and else by pip, and is deleted afterwards.
The checkout is out of reach: the commands run in an empty folder. In each environment

* the torch that was there before the wheel must be there after it;
* ``python -m spectral_ops check`` holds every operator against float64;
* ``deploy/train_step.py`` trains every method, compiled against the reference;
* ``python -m spectral_ops info`` must end well.

A torch that the wheel's metadata exclude gets the wheel without its dependencies. Nothing compiled is wanted there, but
the reference must do all of the above, and the row has the sentence that says why.

Each environment's row is written to ``--results`` at once, in the place of an older row of the same pair. Rows of
another wheel are dropped. Exit status 1 where a row is red.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import hashlib
import json
import math
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from deploy.metadata import extensions, wants_torch
from spectral_ops import _files

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "deploy" / "results" / "matrix.json"
TRAIN_STEP = ROOT / "deploy" / "train_step.py"
MARKER = "<!-- matrix -->"


def fail(text: str) -> SystemExit:
    return SystemExit(f"deploy.matrix: {text}")


# --- one environment ---


class Environment:
    """A fresh environment in ``folder``, and the commands that are run in it."""

    def __init__(self, folder: Path, base: str) -> None:
        self.python, self.cwd = folder / "venv" / "bin" / "python", folder / "empty"
        self.cwd.mkdir(parents=True)
        self.uv = shutil.which("uv")
        make = [self.uv, "venv", "--quiet", "--python", base] if self.uv else [base, "-m", "venv"]
        self._call(*make, folder / "venv")

    def _call(self, *command: str | Path, check: bool = True) -> subprocess.CompletedProcess:
        env = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "SPECTRAL_OPS_"))}
        done = subprocess.run(command, cwd=self.cwd, capture_output=True, text=True, env=env)
        if check and done.returncode:
            lines = (done.stderr or done.stdout).strip().splitlines() or [f"exit status {done.returncode}"]
            raise RuntimeError(f"{' '.join(map(str, command))}: {lines[-1]}")
        return done

    def install(self, *arguments: str | Path) -> None:
        pip = [self.uv, "pip", "install", "--quiet", "--python", self.python]
        self._call(*(pip if self.uv else [self.python, "-m", "pip", "install", "--quiet"]), *arguments)

    def run(self, *arguments: str | Path, check: bool = True) -> subprocess.CompletedProcess:
        return self._call(self.python, "-W", "ignore", *arguments, check=check)

    def version(self, package: str) -> str:
        code = f"from importlib.metadata import version; print(version({package!r}))"
        return self.run("-I", "-c", code).stdout.strip()


def last_line(done: subprocess.CompletedProcess) -> str:
    return ((done.stdout if done.stdout.strip() else done.stderr).strip().splitlines() or ["no output"])[-1]


def cell(wheel: Path, base: str, torch: str) -> dict:
    """The row of one Python and one torch; ``red`` lists what went wrong."""
    began, wanted = time.monotonic(), wants_torch(wheel)
    row = {"torch": torch, "python": base, "red": []}
    folder = Path(tempfile.mkdtemp(prefix="spectral-ops-matrix-"))
    try:
        there = Environment(folder, base)
        row["python"] = there.run("-I", "-c", "import platform; print(platform.python_version())").stdout.strip()
        there.install(f"torch=={torch}")
        row["torch"] = before = there.version("torch")
        row["supported"] = wanted.specifier.contains(before, prereleases=True)
        there.install(*([] if row["supported"] else ["--no-deps"]), wheel)
        if there.version("torch") != before:
            row["red"].append(f"installing the wheel replaced torch {before} by {there.version('torch')}")
        check = there.run("-m", "spectral_ops", "check", check=False)
        row["check"] = last_line(check)
        if check.returncode:
            row["red"].append(f"check: {row['check']}")
        row |= trained(there, folder, row, extensions(wheel))
        info = there.run("-m", "spectral_ops", "info", check=False)
        if info.returncode:
            row["red"].append(f"info: {last_line(info)}")
    except RuntimeError as error:  # an interpreter or a torch that cannot be had is a row too
        row["red"].append(str(error))
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return {**row, "seconds": round(time.monotonic() - began)}


def trained(there: Environment, folder: Path, row: dict, compiled: list[str]) -> dict:
    """What deploy/train_step.py found; adds to ``row["red"]`` what is wrong with it."""
    done = there.run("-I", TRAIN_STEP, "--json", check=False)
    try:
        found = json.loads(done.stdout)
    except ValueError:
        row["red"].append(f"training: {last_line(done)}")
        return {}
    if not Path(found["package"]).is_relative_to(folder):
        row["red"].append(f"training: imported {found['package']}, wanted the installed package")
    row["red"] += [f"training: {r['method']}, {r['dtype']}: {r['failed']}" for r in found["rows"] if r["failed"]]
    states = {name: each for name, each in found["extensions"].items() if name in compiled}
    for name, each in states.items():
        each["error"] = each["error"] and each["error"].replace(f"{folder}/", "")
        if each["error"] and row["supported"] and not no_match(name, each["error"], found["cuda"]):
            row["red"].append(f"{name}: {each['error']}")
    worst = {}
    for r in found["rows"]:
        apart = math.inf if r["failed"] else r["difference"]
        worst[r["dtype"]] = max(worst.get(r["dtype"], 0.0), apart)
    return {
        "cuda": found["cuda"],
        "extensions": states,
        "methods": len({r["method"] for r in found["rows"]}),
        "difference": worst,
    }


def no_match(name: str, error: str, cuda: str | None) -> str | None:
    """Why an extension is rightly refused: its CUDA kernels need a torch of CUDA's same major version."""
    if name == "_C_cuda" and cuda is None:
        return "torch has no CUDA"
    return "of another CUDA" if name == "_C_cuda" and "was built for CUDA" in error else None


# --- the table ---


def natural(version: str) -> list[int]:
    return [int(n) for n in re.findall(r"\d+", version)]


def state(row: dict, name: str) -> str:
    each = row.get("extensions", {}).get(name)
    if each is None:
        return "–"
    if not each["error"]:
        return f"{each['operators']} operators"
    return (row["supported"] and no_match(name, each["error"], row["cuda"])) or "refused"


def render(results: dict) -> str:
    """The Markdown that stands between the markers: the table, and what the wheel was."""
    heads = ["torch", "Python", "`_C`", "`_C_cuda`, no GPU", "`check`", "training: float32, bfloat16", "result"]
    lines = [heads, ["---"] * len(heads)]
    for row in results["rows"]:
        worst = row.get("difference", {})
        apart = ", ".join(f"{worst[dtype]:.0e}" for dtype in ("float32", "bfloat16") if dtype in worst)
        good = "ok" if row.get("supported") else "ok, on the reference"
        build = f", CUDA {row['cuda']}" if row.get("cuda") and "+" not in row["torch"] else ""
        lines.append(
            [
                row["torch"] + build,
                row["python"],
                state(row, "_C"),
                state(row, "_C_cuda"),
                "ok" if row.get("check", "").startswith("All operators agree") else "red",
                f"{row['methods']} methods, {apart}" if worst else "–",
                "red: " + "; ".join(row["red"]).replace("|", "/") if row["red"] else good,
            ]
        )
    meta = results["meta"]
    table = "\n".join("| " + " | ".join(line) + " |" for line in lines)
    refused = "".join(
        f"torch {row['torch']}: {row['extensions']['_C']['error']}.\n"
        for row in results["rows"]
        if "_C" in row.get("extensions", {}) and not row["supported"]
    )
    return (
        f"{table}\n\n{refused}`{meta['wheel']}`, SHA-256 `{meta['sha256'][:16]}…`, {meta['date']},"
        f" `{meta['command']}`.\n"
        "Training: the greatest difference of a loss between the kernels and the reference, relative, over three steps."
    )


def page_with_table() -> Path:
    pages = [page for page in sorted((ROOT / "docs").glob("*.md")) if f"\n{MARKER}\n" in page.read_text()]
    if len(pages) != 1:
        raise fail(f"docs: got {len(pages)} pages with {MARKER}, wanted one that has it and then <!-- end -->")
    return pages[0]


def write_table(results: dict, page: Path, write: bool = True) -> bool:
    """Renew the table between the markers of ``page``; whether it changed."""
    text = page.read_text()
    block = f"{MARKER}\n{render(results)}\n<!-- end -->"
    new, found = re.subn(rf"^{MARKER}\n.*?^<!-- end -->$", lambda _: block, text, flags=re.M | re.S)
    if not found:
        raise fail(f"{page}: got no section from {MARKER} to <!-- end -->, wanted one")
    if write and new != text:
        _files.write(page, lambda part: part.write_text(new))
    return new != text


def read(path: Path) -> dict:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise fail(f"{path}: {error}; wanted results, which a run with a wheel writes") from None


def renewed(results: dict, row: dict) -> dict:
    """``results`` with ``row`` in the place of an older one of its pair, in the order of the table."""
    rows = [r for r in results["rows"] if (r["torch"], r["python"]) != (row["torch"], row["python"])] + [row]
    return {**results, "rows": sorted(rows, key=lambda r: (natural(r["torch"]), natural(r["python"])))}


def pairs(pythons: list[str], torches: list[str], full: bool) -> list[tuple[str, str]]:
    """Every torch with the first Python, then the other Pythons with the last torch; or all of them."""
    if full:
        return [(python, torch) for torch in torches for python in pythons]
    return [(pythons[0], torch) for torch in torches] + [(python, torches[-1]) for python in pythons[1:]]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m deploy.matrix", description=__doc__.splitlines()[0])
    parser.add_argument("wheel", type=Path, nargs="?", help="the built wheel")
    parser.add_argument("--python", nargs="+", default=[sys.executable], metavar="PATH", help="interpreters")
    parser.add_argument("--torch", nargs="+", metavar="VERSION", help="such as 2.10.0 2.14.1")
    parser.add_argument("--full", action="store_true", help="every pair of them")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--table", action="store_true", help="only renew the table in docs/ from the results")
    options = parser.parse_args(argv)
    if options.table:
        page = page_with_table()
        print(f"{page} changed" if write_table(read(options.results), page) else "nothing changed")
        return 0
    if options.wheel is None or not options.torch:
        parser.error("wanted a wheel and --torch, or --table")
    requirement = wants_torch(options.wheel)
    digest = hashlib.sha256(options.wheel.read_bytes()).hexdigest()
    command = f"python -m deploy.matrix dist/{options.wheel.name}"
    meta = {
        "wheel": options.wheel.name,
        "sha256": digest,
        "bytes": options.wheel.stat().st_size,
        "wants": str(requirement),
    }
    results = {"meta": meta, "rows": []}
    with contextlib.suppress(SystemExit):  # there may be no results yet
        if (old := read(options.results))["meta"]["sha256"] == digest:
            results["rows"] = old["rows"]
    red = 0
    options.results.parent.mkdir(parents=True, exist_ok=True)
    for python, torch in pairs(options.python, options.torch, options.full):
        row = cell(options.wheel.resolve(), python, torch)
        red += bool(row["red"])
        results = renewed(results, row)
        results["meta"] |= {"date": str(datetime.date.today()), "command": command}
        text = json.dumps(results, indent=1) + "\n"
        _files.write(options.results, lambda part, text=text: part.write_text(text))
        what = "RED: " + "; ".join(row["red"]) if row["red"] else "ok" if row["supported"] else "ok, on the reference"
        print(f"torch {row['torch']}, Python {row['python']}: {what} ({row['seconds']} s)", flush=True)
    return int(bool(red))


if __name__ == "__main__":
    raise SystemExit(main())
