"""Claims about the documents: the tree is complete, and documented flags and settings exist."""

import dataclasses
import pathlib
import re

from benchmarks import documents
from calm_jax import distributed
from calm_jax.stages import table

ROOT = pathlib.Path(__file__).parent.parent
CONFIGS = sorted(f"configs/{path.name}" for path in (ROOT / "configs").glob("*.py"))
DOCUMENTS = ("README.md", "launch/README.md", "launch/quickstart.sh", *CONFIGS)


def files() -> set[str]:
  """Returns the paths that the tree must name: all but tests and `__init__.py` files."""
  paths = {path for path in ROOT.iterdir() if path.suffix in (".md", ".py", ".toml")}
  paths |= {ROOT / "LICENSE", ROOT / ".ci/run"}
  for folder in ("calm_jax", "configs", "benchmarks"):
    paths |= {path for path in (ROOT / folder).rglob("*") if path.suffix in (".py", ".sh")}
  kinds = (".py", ".sh", ".yaml", ".md")
  paths |= {path for path in (ROOT / "launch").rglob("*") if path.suffix in kinds}
  return {str(path.relative_to(ROOT)) for path in paths if path.name != "__init__.py"}


def tree() -> set[str]:
  """Returns the paths that the README's tree names; indentation is the folder."""
  block = (ROOT / "README.md").read_text().split("## Tree\n")[1].split("```")[1]
  paths, folders = set(), [""]
  for line in block.strip("\n").splitlines():
    depth = (len(line) - len(line.lstrip())) // 2
    names = re.split(r"\s{2,}", line.strip())[0].rstrip(",").split(", ")
    del folders[depth + 1 :]
    if names[0].endswith("/"):
      folders.append(f"{folders[-1]}{names[0]}")
    else:
      paths |= {f"{folders[-1]}{name}" for name in names}
  return paths


def test_the_tree_of_the_readme_names_every_file():
  assert tree() == files()


def test_the_figures_of_the_readme_are_those_of_the_json_files():
  text = (ROOT / "README.md").read_text()
  assert documents.updated(text, ROOT) == text
  json_files = {f"benchmarks/{path.name}" for path in (ROOT / "benchmarks").glob("*.json")}
  assert json_files and json_files == set(re.findall(r"<!-- (\S+\.json) -->", text))


def commands() -> list[tuple[str, str]]:
  text = "\n".join((ROOT / name).read_text() for name in DOCUMENTS)
  joined = re.sub(r"\\\n\s*", " ", text)
  return sorted(set(re.findall(r"python -m calm_jax\.([a-z_]+)([^\n`]*)", joined)))


def test_every_documented_flag_exists():
  assert len({act for act, _ in commands()}) == 10
  for act, rest in commands():
    code = (ROOT / f"calm_jax/{act}.py").read_text()
    if "run_flags.define_processes()" in code:
      names = [field.name for field in dataclasses.fields(distributed.Processes)]
      code += "".join(f'DEFINE_string("{name}")' for name in names)
    if "run_flags.define_sizes()" in code:
      code += (ROOT / "calm_jax/run_flags.py").read_text()
      parents = [name for spec in table.STAGES.values() for name in spec.parents]
      code += "".join(f'DEFINE_file("{name}_config")' for name in parents)
    code = re.sub(r"run_flags\.define\((?!\s*\")", 'DEFINE_file("config"', code)
    code = re.sub(r"\bdefine\(", "DEFINE_file(", code)
    known = {*re.findall(r"DEFINE_\w+\(\s*\"(\w+)\"", code), "help", "verbosity"}
    for name in re.findall(r"--(\w+)", rest):
      assert name in known or name.removeprefix("no") in known, (act, name)


def test_every_documented_setting_exists():
  from configs import autoencoder, calm, tempered, transformer

  stages = (autoencoder, calm, tempered, transformer)
  settings = {name for stage in stages for name in _names(stage.get_config().to_dict())}
  text = "\n".join((ROOT / name).read_text() for name in DOCUMENTS)
  documented = set(re.findall(r"--config\.([\w.]+\w)", text))
  assert documented and documented <= settings


def _names(values: dict, prefix: str = "") -> list[str]:
  return [
    name
    for key, value in values.items()
    for name in (
      _names(value, f"{prefix}{key}.") if isinstance(value, dict) else [f"{prefix}{key}"]
    )
  ]


def test_every_documented_flag_of_a_launcher_exists():
  text = re.sub(r"\\\n\s*", " ", (ROOT / "launch/README.md").read_text())
  calls = re.findall(r"launch/(\w+\.(?:sh|py))([^\n`]*?)(?= -- | --$|\n|`)", text, re.MULTILINE)
  assert {name for name, _ in calls} >= {"tpu_pod.sh", "gke.sh", "slurm.sh", "gpu_node.sh"}
  for name, words in calls:
    code = (ROOT / f"launch/{name}").read_text()
    for flag in re.findall(r"--(\w+)", words):
      assert re.search(rf"\b{flag}\b", code), (name, flag)
