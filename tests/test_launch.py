"""Claims about the launch scripts, run with stand-ins for Python and pip."""

import os
import pathlib
import shutil
import subprocess

import pytest

ROOT = pathlib.Path(__file__).parent.parent

# Records each module that it should run; fails once if a file fail_MODULE exists.
PYTHON = """#!/usr/bin/env bash
case "$1" in
  --version) echo "Python $(cat "$(dirname "$0")/../version")" ;;
  -c) exit 0 ;;
  -m)
    echo "$2" >>"$FAKE/ran"
    if [ "$2" = venv ]; then
      rm -rf .venv && mkdir -p .venv/bin
      cp "$0" "$FAKE/pip" .venv/bin
      cp "$FAKE/../version" .venv
    elif [ -e "$FAKE/fail_$2" ]; then
      rm "$FAKE/fail_$2"
      exit 3
    fi ;;
esac
"""
PIP = '#!/usr/bin/env bash\necho "pip ${*: -1}" >>"$FAKE/ran"\n'
TEXTS = ("generate", "main", "generate", "report")
ACTS = ("prepare", "main", "evaluate", "main", "evaluate", *TEXTS)


@pytest.fixture
def checkout(tmp_path: pathlib.Path) -> pathlib.Path:
  """A checkout that holds only the scripts, and a folder of stand-ins next to it."""
  for name, text in (("python", PYTHON), ("pip", PIP)):
    file = tmp_path / "fake" / name
    file.parent.mkdir(exist_ok=True)
    file.write_text(text)
    file.chmod(0o755)
  (tmp_path / "version").write_text("3.11.7")
  shutil.copytree(ROOT / "launch", tmp_path / "repo/launch")
  shutil.copy(ROOT / "setup.py", tmp_path / "repo")
  return tmp_path / "repo"


def launch(checkout: pathlib.Path, script: str, *words: str) -> tuple[int, list[str]]:
  """Runs a script with the stand-ins first on PATH; returns its exit code and what they ran."""
  fake = checkout.parent / "fake"
  (fake / "ran").write_text("")
  environment = os.environ | {
    "FAKE": str(fake),
    "PYTHON": f"{fake}/python",
    "QUICKSTART_DIR": f"{checkout}/out",
    "PATH": f"{fake}:{os.environ['PATH']}",
  }
  command = [f"{checkout}/launch/{script}", *words]
  done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
  return done.returncode, (fake / "ran").read_text().split("\n")[:-1]


def acts(*names: str) -> list[str]:
  return [f"calm_jax.{name}" for name in names]


def test_the_quickstart_installs_once_and_runs_every_act(checkout: pathlib.Path):
  assert launch(checkout, "quickstart.sh") == (0, ["venv", "pip .", *acts(*ACTS)])
  assert launch(checkout, "quickstart.sh") == (0, acts("report"))


def test_a_failed_step_ends_the_quickstart_and_the_next_run_resumes_from_it(checkout: pathlib.Path):
  (checkout.parent / "fake/fail_calm_jax.generate").touch()
  code, ran = launch(checkout, "quickstart.sh")
  assert code == 3 and ran[-1] == "calm_jax.generate"
  assert launch(checkout, "quickstart.sh") == (0, acts(*TEXTS))


def test_the_tests_install_their_extra_and_another_python_makes_a_new_environment(
  checkout: pathlib.Path,
):
  launch(checkout, "quickstart.sh")
  assert launch(checkout, "test.sh") == (0, ["pip .[dev]", "pytest"])
  (checkout.parent / "version").write_text("3.12.1")
  assert launch(checkout, "test.sh") == (0, ["venv", "pip .[dev]", "pytest"])


def test_a_gpu_machine_is_installed_for_its_driver_and_runs_the_command(
  checkout: pathlib.Path,
):
  driver = checkout.parent / "fake/nvidia-smi"
  driver.write_text("#!/usr/bin/env bash\necho '570.10, NVIDIA H100, 81559 MiB'\n")
  driver.chmod(0o755)
  words = ("--", "python", "-m", "calm_jax.main", "--workdir=W")
  assert launch(checkout, "gpu_node.sh", *words) == (0, ["venv", "pip .[cuda12]", *acts("main")])
  (checkout.parent / "fake/fail_calm_jax.main").touch()
  assert launch(checkout, "gpu_node.sh", *words) == (3, acts("main"))
