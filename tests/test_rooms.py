"""Claims about the rooms: a module imports from its own room and from those before it."""

import ast
import pathlib

ROOT = pathlib.Path(__file__).parent.parent
PACKAGE = ROOT / "calm_jax"

# In the order in which text becomes tokens, patches, latents, hidden states, samples and text.
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
# Modules beside the folders that are no acts.
FOUNDATION = {
  "__init__",
  "command_line",
  "config",
  "distributed",
  "errors",
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
# Modules beside the folders that know checkpoints or stores.
ELSEWHERE = {
  "workdir": "data",
  "run_flags": "running",
  "workdir_checks": "running",
  "cli": "running",
}
# Imports inside functions that are not counted: what is imported when it is asked for.
LAZY = {("settings", "calm_jax.stages")}


def room_of(parts: tuple[str, ...]) -> str:
  """The room of a module, by its path inside the package."""
  if parts[0] == "planning" and len(parts) > 1 and parts[1] == "compiled":
    return "compiled"
  if len(parts) > 1 or (PACKAGE / parts[0]).is_dir():
    return parts[0]
  return ELSEWHERE.get(parts[0], "foundation" if parts[0] in FOUNDATION else "acts")


def imported(path: pathlib.Path) -> set[tuple[str, ...]]:
  """The modules of ours that a file imports, as paths inside the package."""
  found = set()
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
        found.add(parts)
  return found


def upward() -> list[str]:
  """Imports from a later room, as `importer -> imported`."""
  wrong = []
  for path in sorted(PACKAGE.rglob("*.py")):
    own = path.relative_to(PACKAGE).with_suffix("").parts
    for other in sorted(imported(path)):
      later = ROOMS.index(room_of(other)) > ROOMS.index(room_of(own))
      if later and (own[-1], "calm_jax." + other[0]) not in LAZY:
        wrong.append(f"{'.'.join(own)} -> {'.'.join(other)}")
  return wrong


def test_no_room_imports_from_a_later_one():
  assert upward() == []


def test_every_folder_is_a_room():
  folders = {path.name for path in PACKAGE.iterdir() if (path / "__init__.py").exists()}
  assert folders <= set(ROOMS)


def test_what_reads_compiled_programs_knows_nothing_of_calm():
  for path in (PACKAGE / "planning/compiled").glob("*.py"):
    assert imported(path) <= {
      ("errors",),
      ("planning", "compiled"),
      *(("planning", "compiled", other.stem) for other in path.parent.glob("*.py")),
    }, path.name
