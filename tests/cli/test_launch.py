"""The launchers on fake clusters: slurm.sh on two nodes that are real processes, tpu_vm.sh on a host that is a folder.

Also the container image and the manifest that they use.
"""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

from ar_unified.cli.main import VERBS
from tests.cli import readers
from tests.cli.conftest import ROOT, command
from tests.cli.pages import commands
from tests.parallel.job import environment, free_port


@pytest.mark.slow
def test_two_processes_run_as_the_page_says(tmp_path: Path) -> None:
    """The two commands of docs/pretraining.md, on this machine, with texts alone."""
    readers.words(tmp_path)
    port = free_port()
    said = {"FILE": "words.py:words", "/shared/run": "run", "host0:9876": f"localhost:{port}"}
    told = [words[1:] for file, words in commands() if file == "docs/pretraining.md" and "--process" in words]
    assert [words[-1] for words in told] == ["0", "1"]
    job = [
        subprocess.Popen(
            [sys.executable, "-m", "ar_unified.cli.main", *(said.get(word, word) for word in words)],
            env=environment(),
            cwd=tmp_path,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for words in told
    ]
    outputs = [process.communicate(timeout=400)[0] for process in job]
    assert [process.returncode for process in job] == [0, 0], outputs
    assert "report.html" in outputs[0] and not outputs[1], "only process 0 prints"
    assert (tmp_path / "run" / "evaluation.json").exists()


SRUN = """#!/bin/bash
# Starts the two tasks of a step as SLURM does, each with what JAX reads of it.
export SLURM_NTASKS=2 SLURM_STEP_NODELIST=localhost,elsewhere SLURM_LOCALID=0
shift
SLURM_PROCID=1 "$@" &
SLURM_PROCID=0 "$@" && wait $!
"""


@pytest.mark.slow
def test_slurm_trains_both_tokenizers_on_two_nodes(folder: Path, tmp_path: Path) -> None:
    program = f'#!/bin/bash\nexec {sys.executable} -m ar_unified.cli.main "$@"\n'
    for name, text in {"srun": SRUN, "ar-unified": program}.items():
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    workdir = tmp_path / "workdir"
    found = {"PATH": f"{tmp_path}:/usr/bin:/bin", "SLURM_JOB_ID": "7", "JAX_COORDINATOR_PORT": str(free_port())}
    done = subprocess.run(
        [
            "bash",
            ROOT / "experiments/launch/slurm.sh",
            *command("tokenizer", folder, workdir, image_tokenizer__steps=4),
        ],
        env=environment() | found,
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert (workdir / "image_tokenizer" / "weights.safetensors").exists()
    lines = done.stdout.splitlines()
    assert "image_tokenizer: 0.02M parameters on data=2" in done.stdout
    # Only process 0 prints, at the start and at the end of a stage.
    assert len([line for line in lines if line.startswith("==== text_tokenizer")]) == 2
    assert "step 4/4" in (workdir / "logs" / "process-1.log").read_text()


GCLOUD = """#!/bin/bash
# A queued resource that is there, and its one host, which is this machine with a home of its own.
case "$*" in
  *"queued-resources describe"*) echo ACTIVE ;;
  *"tpu-vm ssh"*) cd "$HOST" && exec bash -c "${@: -1}" ;;
esac
"""
# The host has python3 3.10, like TPU images. pip installs uv, and uv installs a newer Python.
PYTHON3 = """#!/bin/bash
echo "python3 $*" >>"$HOST/log"
[[ "$*" == *"uv venv"* ]] || exit 0
mkdir -p .venv/bin
printf '#!/bin/bash\\necho "new python $*" >>"$HOST/log"\\n' >.venv/bin/python
printf '#!/bin/bash\\necho "ar-unified $*" >>"$HOST/log"\\n' >.venv/bin/ar-unified
chmod +x .venv/bin/*
"""
GIT = """#!/bin/bash
echo "git $*" >>"$HOST/log"
[[ "$1" == clone ]] && mkdir ar_unified
exit 0
"""


def test_a_tpu_vm_gets_a_python_of_its_own_once(tmp_path: Path) -> None:
    programs = {
        "gcloud": GCLOUD,
        "python3": PYTHON3,
        "git": GIT,
        "sudo": "#!/bin/bash\n",
        "mountpoint": "#!/bin/bash\n",
    }
    (tmp_path / "bin").mkdir()
    for name, text in programs.items():
        (tmp_path / "bin" / name).write_text(text)
        (tmp_path / "bin" / name).chmod(0o755)
    environment = {
        "PATH": f"{tmp_path / 'bin'}:/usr/bin:/bin", "HOST": str(tmp_path), "PROJECT": "p", "ZONE": "z",
        "REPOSITORY": "URL", "NFS": "10.0.0.2:/shared",
    }  # fmt: skip
    verb = ["run", "--config", "a file.py", "--workdir", "/shared/runs/a"]
    said = []
    for _ in range(2):
        (tmp_path / "log").write_text("")
        script = [ROOT / "experiments/launch/tpu_vm.sh", "name", "v5p-32", "v2-alpha-tpuv5", *verb]
        done = subprocess.run(["bash", *script], env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        said.append((tmp_path / "log").read_text().splitlines())
    installed = "new python -m pip install --quiet --constraint requirements/py312.txt .[tpu]"
    started = "ar-unified run --config a file.py --workdir /shared/runs/a"
    assert said[0] == [
        "git clone --quiet URL ar_unified",
        "git pull --quiet",
        "python3 -m pip install --quiet --user uv",
        "python3 -m uv venv --quiet --clear --seed --python 3.12 .venv",
        installed,
        started,
    ]
    # The second time, the environment exists, and its new Python is asked for its version and used.
    assert said[1][0] == "git pull --quiet" and said[1][1].startswith("new python -c import sys")
    assert said[1][2:] == [installed, started]


# ---- the image and the manifest ------------------------------------------------------------------------------------


def wrong(value: Any, schema: dict[str, Any], where: str = "") -> list[str]:
    """Where a value violates a Kubernetes schema: unknown and missing fields, types, choices, bounds and patterns."""
    kinds = {"object": dict, "array": list, "string": str, "boolean": bool, "integer": int, "number": int | float}
    if not schema.get("x-kubernetes-int-or-string"):
        kind = kinds[schema["type"]] if "type" in schema else object
        if not isinstance(value, kind) or (isinstance(value, bool) and schema.get("type") == "integer"):
            return [f"{where}: expected {schema['type']}, found {value!r}"]
    elif not isinstance(value, int | str):
        return [f"{where}: expected an integer or a string, found {value!r}"]
    found = []
    if "enum" in schema and value not in schema["enum"]:
        found.append(f"{where}: expected one of {schema['enum']}, found {value!r}")
    if "minimum" in schema and value < schema["minimum"] or "maximum" in schema and value > schema["maximum"]:
        found.append(f"{where}: {value!r} is out of bounds")
    if "pattern" in schema and not re.search(schema["pattern"], str(value)):
        found.append(f"{where}: {value!r} does not match {schema['pattern']}")
    if isinstance(value, list):
        return found + [each for i, x in enumerate(value) for each in wrong(x, schema["items"], f"{where}[{i}]")]
    if isinstance(value, dict):
        fields, more = schema.get("properties", {}), schema.get("additionalProperties")
        if fields:
            found += [f"{where}.{name}: no such field" for name in value if name not in fields and not more]
        found += [f"{where}.{name}: missing" for name in schema.get("required", ()) if name not in value]
        for name, inner in value.items():
            if (kind := fields.get(name, more)) is not None:
                found += wrong(inner, kind, f"{where}.{name}")
    return found


@pytest.fixture
def manifest() -> dict[str, Any]:
    return yaml.safe_load((ROOT / "experiments/launch/gke_jobset.yaml").read_text())


def schema() -> dict[str, Any]:
    return json.loads(Path(__file__).with_name("jobset_schema.json").read_text())["schema"]


def container(manifest: dict[str, Any]) -> dict[str, Any]:
    (jobs,) = manifest["spec"]["replicatedJobs"]
    (found,) = jobs["template"]["spec"]["template"]["spec"]["containers"]
    return found


def test_the_manifest_keeps_to_the_schema_of_jobset(manifest):
    assert wrong(manifest, schema()) == []
    slice_ = manifest["spec"]["replicatedJobs"][0]["template"]["spec"]
    pod = slice_["template"]["spec"]
    chips = math.prod(map(int, pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"].split("x")))
    assert (
        slice_["parallelism"]
        == slice_["completions"]
        == chips / container(manifest)["resources"]["limits"]["google.com/tpu"]
    )
    mounts = {each["name"] for each in container(manifest)["volumeMounts"]}
    assert mounts == {each["name"] for each in pod["volumes"]}


def test_the_check_of_the_manifest_sees_mistakes(manifest):
    manifest["spec"]["network"]["subdomian"] = "x"
    manifest["spec"]["failurePolicy"]["maxRestarts"] = "many"
    container(manifest)["resources"]["limits"]["google.com/tpu"] = 1.5
    del container(manifest)["name"]
    container(manifest)["ports"][0]["containerPort"] = True
    assert [line.partition(":")[0].rpartition(".")[2] for line in sorted(wrong(manifest, schema()))] == [
        "maxRestarts", "subdomian", "name", "containerPort", "com/tpu",
    ]  # fmt: skip


def test_the_image_has_what_the_manifest_and_the_package_need(manifest):
    """The Dockerfile parses as instructions; hadolint checks the rest in `make lint`."""
    text = re.sub(r"\\\n", " ", re.sub(r"^#.*\n", "", (ROOT / "Dockerfile").read_text(), flags=re.MULTILINE))
    lines = [line.split(maxsplit=1) for line in text.splitlines() if line.strip()]
    steps: dict[str, list[str]] = {}
    for word, rest in lines:
        steps.setdefault(word, []).append(rest)
    assert steps["ENTRYPOINT"] == ['["ar-unified"]'] and "command" not in container(manifest)
    assert container(manifest)["args"][0] in VERBS
    # The last user is not root, and the manifest gives the volume to that user's group.
    pod = manifest["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]
    assert steps["USER"][-1] == str(pod["securityContext"]["fsGroup"]) != "0"
    assert lines.index(["USER", steps["USER"][-1]]) > max(i for i, (word, _) in enumerate(lines) if word == "RUN")
    # Every file that is copied exists and is not ignored, and every file that the package's build reads is copied.
    copied = {path for rest in steps["COPY"] for path in rest.split()[:-1] if not path.startswith("--")}
    let_in = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    assert copied == let_in and all((ROOT / path).exists() for path in copied)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    wheel = project["tool"]["hatch"]["build"]["targets"]["wheel"]
    built = [*wheel["packages"], *wheel["force-include"], *project["project"]["license-files"]]
    assert {path.split("/")[0] for path in built} | {project["project"]["readme"]} <= copied
    # Every backend is an extra of the package, and the package allows this version of Python.
    extras = project["project"]["optional-dependencies"]
    (run,) = steps["RUN"]
    cases = re.findall(r"^\s*|(\w+(?: \| \w+)*)\) package=", run)
    offered = {name for case in cases for name in case.split(" | ") if name}
    assert offered == {"cpu", "cuda", "tpu"} and offered - {"cpu"} <= extras.keys()
    version = dict(each.split("=") for each in steps["ARG"])["PYTHON"]
    assert (ROOT / f"requirements/py{version.replace('.', '')}.txt").exists()


@pytest.mark.parametrize("backend, package", [("cpu", "."), ("tpu", ".[tpu]"), ("cuda", ".[cuda]"), ("gpu", None)])
def test_the_image_installs_the_backend_it_is_asked_for(backend, package, tmp_path):
    """Runs the Dockerfile's RUN commands in a shell, with programs that record their arguments."""
    text = (ROOT / "Dockerfile").read_text().partition("\nRUN ")[2]
    command = (
        re.match(r"(?:.*\\\n)*.*\n", text).group().replace("\\\n", "").replace("mkdir /job", f"mkdir {tmp_path}/job")
    )
    for name in ("pip", "useradd", "chown"):
        (tmp_path / name).write_text(f'#!/bin/sh\necho "{name} $*"\n')
        (tmp_path / name).chmod(0o755)
    (tmp_path / "python").symlink_to(sys.executable)
    environment = {"PATH": f"{tmp_path}:/usr/bin:/bin", "BACKEND": backend}
    done = subprocess.run(["sh", "-c", command], cwd=ROOT, env=environment, capture_output=True, text=True)
    if package is None:
        assert done.returncode == 2 and "expected cpu, cuda or tpu; found gpu" in done.stderr
        return
    pins = f"requirements/py{sys.version_info[0]}{sys.version_info[1]}.txt"
    assert done.stdout.splitlines()[0] == f"pip install --no-cache-dir --constraint {pins} {package}"
    assert (tmp_path / "job").is_dir()
