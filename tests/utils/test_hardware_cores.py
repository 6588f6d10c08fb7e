"""Cores that a process may use, and the OpenMP environment that the command line sets for them."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

from smallvit.utils import cores

STEP, JOB = "sys/fs/cgroup/slurm/job_1/step_0", "sys/fs/cgroup/slurm/job_1"
LAYOUTS = {
    "the job around it": ("0::/slurm/job_1/step_0", {STEP: "max 100000", JOB: "300000 100000"}, 3),
    "the smaller of two": ("0::/slurm/job_1/step_0", {STEP: "150000 100000", JOB: "300000 100000"}, 1.5),
    "a container's namespace": ("0::/", {"sys/fs/cgroup": "50000 100000"}, 0.5),
    "without a limit": ("0::/slurm/job_1/step_0", {STEP: "max 100000", JOB: "max 100000"}, math.inf),
    "no CPU controller": ("0::/", {}, math.inf),
    "no control groups": ("", {}, math.inf),
}


def fake_machine(root: Path, layout: str) -> float:
    """Write the files of a machine with a CPU quota, which is returned."""
    group, quotas, expected = LAYOUTS[layout]
    (root / "proc/self").mkdir(parents=True)
    (root / "proc/self/cgroup").write_text(f"8:memory:/elsewhere\n{group}\n" if group else "")
    for folder, quota in quotas.items():
        (root / folder).mkdir(parents=True, exist_ok=True)
        (root / folder / "cpu.max").write_text(quota + "\n")
    return expected


@pytest.mark.parametrize("layout", LAYOUTS)
def test_quotas_are_read_from_the_process_s_own_control_groups(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, layout: str
) -> None:
    expected = fake_machine(tmp_path, layout)
    monkeypatch.setattr(cores, "ROOT", tmp_path)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
    assert cores.cpu_quota() == expected
    assert cores.usable_cores() == max(1, math.ceil(min(8, expected)))
    environment: dict[str, str] = {}
    cores.set_openmp_defaults(environment)
    assert environment == {"OMP_NUM_THREADS": str(cores.usable_cores()), "OMP_WAIT_POLICY": "passive"}


GIB = 2**30
V1, UNLIMITED = "sys/fs/cgroup/memory", 9223372036854771712
MEMORY = {
    "v2, the job around it": ("0::/slurm/job_1/step_0", {STEP: ("max", GIB, 0), JOB: (4 * GIB, 3 * GIB, 0)}, GIB),
    "v2, a container's namespace": ("0::/", {"sys/fs/cgroup": (2 * GIB, GIB // 2, GIB // 4)}, 1.75 * GIB),
    "v2, used up": ("0::/", {"sys/fs/cgroup": (GIB, 2 * GIB, 0)}, 0),
    "v2, without a limit": ("0::/", {"sys/fs/cgroup": ("max", GIB, 0)}, math.inf),
    "v1, the job": ("4:cpu,memory:/job\n0::/", {f"{V1}/job": (3 * GIB, GIB, 0), V1: (UNLIMITED, GIB, 0)}, 2 * GIB),
    "v1, a container that sees its host's name": ("4:memory:/docker/1f", {V1: (5 * GIB, 2 * GIB, GIB)}, 4 * GIB),
    "no control groups": ("", {}, math.inf),
}


@pytest.mark.parametrize("layout", MEMORY)
def test_memory_limits_are_those_of_the_process_s_own_control_groups(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, layout: str
) -> None:
    groups, limits, expected = MEMORY[layout]
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/self/cgroup").write_text(f"3:cpuset:/\n{groups}\n")
    v1 = "v1" in layout
    names = ("memory.limit_in_bytes", "memory.usage_in_bytes") if v1 else ("memory.max", "memory.current")
    for folder, (limit, used, cached) in limits.items():
        (tmp_path / folder).mkdir(parents=True, exist_ok=True)
        for name, value in zip(names, (limit, used), strict=True):
            (tmp_path / folder / name).write_text(f"{value}\n")
        (tmp_path / folder / "memory.stat").write_text(f"anon 5\n{'total_' * v1}inactive_file {cached}\n")
    monkeypatch.setattr(cores, "ROOT", tmp_path)
    assert cores.free_group_memory() == expected


def test_no_proc_means_no_quota(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cores, "ROOT", tmp_path)
    assert cores.cpu_quota() == math.inf


def test_threads_are_physical_cores_within_the_affinity(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for cpu in range(8):  # CPUs n and n + 4 are the two hardware threads of core n
        folder = tmp_path / f"sys/devices/system/cpu/cpu{cpu}/topology"
        folder.mkdir(parents=True)
        (folder / "thread_siblings_list").write_text(f"{cpu % 4},{cpu % 4 + 4}\n")
    monkeypatch.setattr(cores, "ROOT", tmp_path)
    for allowed, threads in ({*range(8)}, 4), ({0, 4}, 1), ({0, 1, 5}, 2):
        monkeypatch.setattr(os, "sched_getaffinity", lambda _, allowed=allowed: allowed, raising=False)
        environment: dict[str, str] = {}
        cores.set_openmp_defaults(environment)
        assert environment["OMP_NUM_THREADS"] == str(threads)
        assert cores.usable_cores() == len(allowed)


@pytest.mark.parametrize("name", [*cores.THREAD_VARIABLES, *cores.WAIT_VARIABLES])
def test_what_the_user_sets_stays(name: str) -> None:
    environment = {name: "7"}
    cores.set_openmp_defaults(environment)
    assert environment[name] == "7"
    if name in cores.THREAD_VARIABLES:
        assert environment == {name: "7", "OMP_WAIT_POLICY": "passive"}
    else:
        assert "OMP_WAIT_POLICY" not in environment.keys() - {name}


SCRIPT = """\
import json, os, runpy, sys
from pathlib import Path
from smallvit.utils import cores
cores.ROOT = Path(sys.argv[1])
os.sched_getaffinity = lambda _: {0, 1, 2, 3, 4, 5, 6, 7}
entry, sys.argv = sys.argv[2], ["smallvit", "--version"]
before = dict(os.environ)
if entry == "-m smallvit":
    try:
        runpy.run_module("smallvit", run_name="__main__")
    except SystemExit:
        pass
elif entry == "console script":
    import smallvit.cli
    smallvit.cli.main()
elif entry == "main with arguments":
    import smallvit.cli
    smallvit.cli.main(["--version"])
assert "torch" not in sys.modules
import smallvit, torch
smallvit.create_model, smallvit.train
changed = {name: value for name, value in os.environ.items() if before.get(name) != value}
print(json.dumps([{name: changed[name] for name in changed if name.startswith(("OMP", "GOMP", "KMP", "MKL"))},
                  torch.get_num_threads()]))
"""


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="cores are counted on Linux")
@pytest.mark.parametrize("entry", ["-m smallvit", "console script", "main with arguments", "import smallvit"])
def test_the_command_line_alone_sets_the_environment_before_torch_loads(tmp_path: Path, entry: str) -> None:
    fake_machine(tmp_path, "a container's namespace")
    environment = {
        name: value
        for name, value in os.environ.items()
        if name not in (*cores.THREAD_VARIABLES, *cores.WAIT_VARIABLES)
    }
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(tmp_path), entry],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    changed, threads = json.loads(done.stdout.splitlines()[-1])
    if entry in ("-m smallvit", "console script"):
        assert (changed, threads) == ({"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"}, 1)
    else:
        assert changed == {}
