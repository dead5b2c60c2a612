"""Claims about the order of folders: a module imports only from its own and earlier ones."""

import ast
import pathlib

ROOT = pathlib.Path(__file__).parent.parent
PACKAGE = ROOT / "calm_jax"

# In the order of the data flow: tokens, patches, latents, hidden states, samples, text.
ROOMS = (
  "foundation",
  "data",
  "parallel",
  "kernels",
  "objectives",
  "models",
  "training",
  "generation",
  "interchange",
  "reporting",
  "compiled",
  "stages",
  "running",
  "planning",
  "acts",
)
# Top-level modules that are no acts.
FOUNDATION = {
  "__init__",
  "command_line",
  "config",
  "distributed",
  "errors",
  "figures",
  "files",
  "holder",
  "interrupts",
  "lease",
  "resolve",
  "seal",
  "sealed_json",
  "settings",
  "spelling",
}
# Top-level modules that know checkpoints or stores.
ELSEWHERE = {
  "workdir": "data",
  "run_flags": "running",
  "workdir_checks": "running",
  "cli": "running",
}
# Imports inside functions, which are not checked.
LAZY = {("settings", "calm_jax.stages")}


def room_of(parts: tuple[str, ...]) -> str:
  """Returns the room of a module, given its path inside the package."""
  if parts[0] == "planning" and len(parts) > 1 and parts[1] == "compiled":
    return "compiled"
  if len(parts) > 1 or (PACKAGE / parts[0]).is_dir():
    return parts[0]
  return ELSEWHERE.get(parts[0], "foundation" if parts[0] in FOUNDATION else "acts")


def imported(path: pathlib.Path) -> set[tuple[str, ...]]:
  """Returns the modules of the package that a file imports, as paths inside the package."""
  modules = set()
  for node in ast.walk(ast.parse(path.read_text())):
    names = []
    if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "calm_jax":
      names = [f"{node.module}.{alias.name}" for alias in node.names]
    elif isinstance(node, ast.Import):
      names = [alias.name for alias in node.names if alias.name.startswith("calm_jax.")]
    for name in names:
      parts = tuple(name.split(".")[1:])
      while parts and not (
        (PACKAGE.joinpath(*parts)).is_dir()
        or PACKAGE.joinpath(*parts[:-1], f"{parts[-1]}.py").is_file()
      ):
        parts = parts[:-1]  # A name inside a module.
      if parts:
        modules.add(parts)
  return modules


def upward() -> list[str]:
  """Returns the imports from a later room, as `importer -> imported`."""
  wrong = []
  for path in sorted(PACKAGE.rglob("*.py")):
    own = path.relative_to(PACKAGE).with_suffix("").parts
    for target in sorted(imported(path)):
      later = ROOMS.index(room_of(target)) > ROOMS.index(room_of(own))
      if later and (own[-1], "calm_jax." + target[0]) not in LAZY:
        wrong.append(f"{'.'.join(own)} -> {'.'.join(target)}")
  return wrong


def test_no_room_imports_from_a_later_one():
  assert upward() == []


def test_every_folder_is_a_room():
  folders = {path.name for path in PACKAGE.iterdir() if (path / "__init__.py").exists()}
  assert folders <= set(ROOMS)


def test_planning_compiled_imports_nothing_of_calm_but_errors():
  for path in (PACKAGE / "planning/compiled").glob("*.py"):
    assert imported(path) <= {
      ("errors",),
      ("planning", "compiled"),
      *(("planning", "compiled", module.stem) for module in path.parent.glob("*.py")),
    }, path.name
