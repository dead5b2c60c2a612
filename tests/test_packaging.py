"""Claims about what is installed: the wheel trains from an empty folder, and lists its acts."""

import os
import pathlib
import shutil
import subprocess
import sys
import zipfile

import pytest

from calm_jax import __main__ as command

ROOT = pathlib.Path(__file__).parent.parent
CONFIGS = sorted(path.name for path in (ROOT / "configs").glob("*.py"))


def pip(*words: str, cwd: pathlib.Path) -> None:
  done = subprocess.run(
    [sys.executable, "-m", "pip", *words, "--quiet", "--no-deps", "--no-index"],
    cwd=cwd,
    capture_output=True,
    text=True,
    check=False,
  )
  assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
  """A wheel of this checkout, built in a copy: the checkout may hold an old build/."""
  pytest.importorskip("pip")
  root = tmp_path_factory.mktemp("wheel")
  ignore_patterns = shutil.ignore_patterns(
    ".*", "build", "*.egg-info", "__pycache__", "runs", "venv*"
  )
  shutil.copytree(ROOT, root / "source", ignore=ignore_patterns)
  pip("wheel", ".", "--no-build-isolation", f"--wheel-dir={root}", cwd=root / "source")
  (path,) = root.glob("*.whl")
  return path


@pytest.fixture(scope="module")
def installed(wheel: pathlib.Path, tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
  """The folder that the wheel is installed into."""
  target = tmp_path_factory.mktemp("installed")
  pip("install", str(wheel), f"--target={target}", cwd=target)
  return target


@pytest.fixture
def run(installed: pathlib.Path, tmp_path: pathlib.Path):
  """Runs a command on the installed package in an empty folder."""

  def go(*words: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": str(installed)}
    return subprocess.run(
      [sys.executable, *words],
      cwd=tmp_path,
      env=environment,
      capture_output=True,
      text=True,
      check=False,
    )

  code = "import calm_jax; print(calm_jax.__file__)"
  assert go("-c", code).stdout.strip() == str(installed / "calm_jax/__init__.py")
  return go


def test_the_wheel_holds_settings_types_and_code_that_is_copied_but_no_tests(wheel: pathlib.Path):
  with zipfile.ZipFile(wheel) as file:
    names = set(file.namelist())
    (metadata,) = (name for name in names if name.endswith("entry_points.txt"))
    assert "calm-jax = calm_jax.__main__:main" in file.read(metadata).decode()
  assert {f"calm_jax/configs/{name}" for name in CONFIGS} <= names
  assert {"calm_jax/py.typed", "calm_jax/interchange/torch_module/modeling_calm.py"} <= names
  code = {
    str(path.relative_to(ROOT))
    for path in (ROOT / "calm_jax").rglob("*.py")
    if "__pycache__" not in path.parts
  }
  assert code <= names
  assert {name.split("/")[0] for name in names if "dist-info" not in name} == {"calm_jax"}


def test_the_command_lists_every_act_with_what_it_does(run):
  acts = {path.stem for path in (ROOT / "calm_jax").glob("*.py") if "cli.run(" in path.read_text()}
  assert set(command.ACTS) == acts
  listings = [run("-m", "calm_jax", *words) for words in ([], ["--help"])]
  for done in listings:
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == command.listing() + "\n"
  assert all(command.summary(act) for act in acts)


def test_the_command_does_not_import_jax_to_list_acts(run):
  code = "import sys; from calm_jax import __main__ as c; c.listing(); print('jax' in sys.modules)"
  assert run("-c", code).stdout == "False\n"


def test_an_unknown_act_names_the_nearest(run):
  done = run("-m", "calm_jax", "evalute", "--workdir=W")
  assert (done.returncode, done.stdout) == (2, "")
  assert done.stderr.startswith("error: no act 'evalute': did you mean 'evaluate'? known: bench")
  assert done.stderr.count("\n") == 1


def test_the_console_script_runs_an_act_as_python_m_does(installed: pathlib.Path, run):
  words = ("cost", "--config=calm.py:quickstart", "--batch=0")
  script = run(str(installed / "bin/calm-jax"), *words)
  module = run("-m", f"calm_jax.{words[0]}", *words[1:])
  assert (script.returncode, script.stdout, script.stderr) == (2, "", module.stderr)
  assert module.stderr == "error: --batch=0 must be a positive integer\n"


@pytest.mark.parametrize("name", CONFIGS)
def test_shipped_settings_are_found_by_their_name(name: str, run):
  done = run("-m", "calm_jax.benchmark", f"--config={name}", "--help")  # Imports no JAX.
  assert (done.returncode, done.stderr) == (0, "")
  assert f"settings of {name} and" in done.stdout


def test_companions_of_a_shipped_size_are_found(run):
  done = run("-m", "calm_jax", "cost", "--config=transformer.py:quickstart", "--baseline=calm.py:m")
  assert done.returncode == 0 and done.stderr.startswith("vocabulary 1,024 (--vocab_size)")


def test_an_unknown_config_file_names_those_that_are_shipped(run):
  done = run("-m", "calm_jax", "cost", "--config=configs/clam.py")
  assert done.stderr == (
    "error: --config=configs/clam.py: no such file; nearest: calm.py; shipped are "
    f"{', '.join(CONFIGS)}\n"
  )


def test_a_local_file_takes_precedence_over_a_shipped_file_of_its_name(run, tmp_path: pathlib.Path):
  (tmp_path / "calm.py").write_text("def get_config(size=''):\n  raise ValueError('own')")
  done = run("-m", "calm_jax", "cost", "--config=calm.py")
  assert done.stderr == "error: can't load --config=calm.py: ValueError: own\n"


def test_without_benchmarks_the_error_says_how_to_install_them(run):
  done = run("-m", "calm_jax.benchmark", "--suite=loss")
  assert (done.returncode, done.stdout) == (2, "")
  assert done.stderr.startswith("error: the wheel has no benchmarks")
  assert "pip install -e ." in done.stderr and done.stderr.count("\n") == 1


def test_an_installed_package_prepares_and_trains(run, tmp_path: pathlib.Path):
  (tmp_path / "text.txt").write_text("The cats ate and said meow. " * 2000)
  tokens = ("--input=text.txt", "--output=D", "--tokenizer=train:300", "--workers=1")
  prepared = run("-m", "calm_jax", "prepare", *tokens)
  assert prepared.returncode == 0, prepared.stderr
  sizes = ("--config.model.width=16", "--config.model.ffn=16", "--config.training.batch=2")
  flags = ("--config.data.path=D", "--config.training.steps=1", *sizes, "--workdir=W")
  trained = run("-m", "calm_jax", "main", "--config=autoencoder.py:quickstart", *flags)
  assert trained.returncode == 0, trained.stderr
  assert (tmp_path / "W/config.json").is_file()
