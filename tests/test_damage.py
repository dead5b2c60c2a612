"""Damage and faults of the file system, in the short form of damage.py and faults.py.

Both run in a process of their own, which forks: this one has threads of JAX.
"""

import collections
import json
import os
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parent.parent
BAD = ("silent", "traceback", "hang", "spoilt", "left")
# Each of another kind, by acts that take a fraction of a second or little more.
TARGETED = (
  "manifest_checksum", "manifest_nested", "plan_list", "plan_fifo", "store_tokens_zeroed",
  "part_counts_empty_object", "part_tokens_zeroed", "part_tokens_cut", "checkpoint_swapped",
  "checkpoints_removed", "metrics_list_line", "samples_torn",
  "rubbish_lease_of_store", "rubbish_lease_of_parts", "weights_nan_of_llama", "weight_changed",
  "bin_deflated", "import_config_nested", "import_million_layers", "index_nested",
)  # fmt: skip
OPERATIONS = ("write", "rename", "fsync", "read")
FAULTS = (
  *(f"prepare/{operation}/{number}" for operation in OPERATIONS for number in (1, 3)),
  "export/write/2",
)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
  """The toys, made by whoever comes first."""
  return tmp_path_factory.mktemp("toys")


def outcomes(tool: str, cache: pathlib.Path, *flags: str) -> list[dict]:
  path = cache / "outcomes.json"
  path.unlink(missing_ok=True)
  command = [sys.executable, f"tests/{tool}", f"--cache={cache}", f"--output={path}", *flags]
  # On one device, which is quicker than the eight of other tests.
  environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
  done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
  assert path.exists(), done.stderr
  return json.loads(path.read_text())


def assert_good(found: list[dict]) -> None:
  bad = [
    f"{each['outcome']}: {each['name']} ({each['said'].strip()[-200:]})"
    for each in found if each["outcome"] in BAD
  ]  # fmt: skip
  assert not bad, "\n".join(bad)


def test_random_damage_is_told_or_does_no_harm(cache: pathlib.Path):
  found = outcomes("damage.py", cache, "--count=20", "--targeted=none", "--seed=1")
  assert len(found) == 20
  assert_good(found)


def test_damage_with_a_name_is_told_or_does_no_harm(cache: pathlib.Path):
  found = outcomes("damage.py", cache, "--only=" + ",".join(TARGETED))
  counts = collections.Counter(each["name"] for each in found)
  assert counts.keys() >= set(TARGETED) - {"bin_deflated"}  # It needs torch.
  assert_good(found)


def test_an_act_whose_file_system_fails_ends_in_a_line_and_the_next_makes_up_for_it(
  cache: pathlib.Path,
):
  found = outcomes("faults.py", cache, "--only=" + ",".join(FAULTS))
  assert len(found) == len(FAULTS)
  assert_good(found)


def test_outcomes_are_told_apart_on_endings_that_are_made_up():
  code = """
import damage
from harm import forked
whole = forked.Ending(0, "", {"x": 1})
for ending, expected in (
  (forked.Ending(2, "error: no such thing\\n", None), "told"),
  (forked.Ending(2, "error: one\\nerror: two\\n", None), "traceback"),
  (forked.Ending(2, "usage\\n", None), "traceback"),
  (forked.Ending(0, "", {"x": 1}), "harmless"),
  (forked.Ending(0, "", {"x": 2}), "silent"),
  (forked.Ending(0, "x is left out\\n", {"x": 2}), "told"),
  (forked.Ending(1, "Traceback (most recent call last):\\n", None), "traceback"),
  (forked.Ending(0, "Traceback (most recent call last):\\n", {"x": 1}), "traceback"),
  (forked.Ending(-11, "", None), "traceback"),
  (forked.Ending(None, "", None), "hang"),
):
  found = damage.outcome(ending, whole, taken=False, must_tell=False)
  assert found == expected, (ending, found)
assert damage.outcome(whole, whole, taken=True, must_tell=True) == "silent"
"""
  done = subprocess.run(
    [sys.executable, "-c", code], cwd=ROOT / "tests", capture_output=True, text=True
  )
  assert not done.returncode, done.stderr
