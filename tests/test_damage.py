"""Damaged files and file system faults: a short run of damage.py and faults.py.

Both run in their own process and fork it, because this process has threads of JAX.
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
# One case of each kind, with acts that take about a fraction of a second.
TARGETED = (
  "manifest_checksum",
  "manifest_nested",
  "plan_list",
  "plan_fifo",
  "store_tokens_zeroed",
  "part_counts_empty_object",
  "part_tokens_zeroed",
  "part_tokens_cut",
  "checkpoint_swapped",
  "checkpoints_removed",
  "metrics_list_line",
  "samples_torn",
  "garbage_lease_of_store",
  "garbage_lease_of_parts",
  "weights_nan_of_llama",
  "weight_changed",
  "bin_deflated",
  "import_config_nested",
  "import_million_layers",
  "index_nested",
)
OPERATIONS = ("write", "rename", "fsync", "read")
FAULTS = (
  *(f"prepare/{operation}/{number}" for operation in OPERATIONS for number in (1, 3)),
  "export/write/2",
)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
  """The folder of the toys, which the first test makes."""
  return tmp_path_factory.mktemp("toys")


def outcomes(tool: str, cache: pathlib.Path, *flags: str) -> list[dict]:
  """Runs damage.py or faults.py and returns the outcomes."""
  path = cache / "outcomes.json"
  path.unlink(missing_ok=True)
  command = [sys.executable, f"tests/{tool}", f"--cache={cache}", f"--output={path}", *flags]
  # Without XLA_FLAGS there is one device, which is faster than the eight of other tests.
  environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
  done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
  assert path.exists(), done.stderr
  return json.loads(path.read_text())


def assert_good(cases: list[dict]) -> None:
  bad = [case for case in cases if case["outcome"] in BAD]
  lines = [f"{x['outcome']}: {x['name']} ({x['stderr'].strip()[-200:]})" for x in bad]
  assert not bad, "\n".join(lines)


def test_random_damage_is_reported_or_harmless(cache: pathlib.Path):
  cases = outcomes("damage.py", cache, "--count=20", "--targeted=none", "--seed=1")
  assert len(cases) == 20
  assert_good(cases)


def test_named_damage_is_reported_or_harmless(cache: pathlib.Path):
  cases = outcomes("damage.py", cache, "--only=" + ",".join(TARGETED))
  counts = collections.Counter(case["name"] for case in cases)
  assert counts.keys() >= set(TARGETED) - {"bin_deflated"}  # It needs torch.
  assert_good(cases)


def test_a_file_system_fault_is_reported_and_the_next_run_recovers(cache: pathlib.Path):
  cases = outcomes("faults.py", cache, "--only=" + ",".join(FAULTS))
  assert len(cases) == len(FAULTS)
  assert_good(cases)


def test_endings_get_the_right_class():
  code = """
import damage
from harm import forked
undamaged = forked.Ending(0, "", {"x": 1})
for ending, expected in (
  (forked.Ending(2, "error: no such thing\\n", None), "reported"),
  (forked.Ending(2, "error: one\\nerror: two\\n", None), "traceback"),
  (forked.Ending(2, "usage\\n", None), "traceback"),
  (forked.Ending(0, "", {"x": 1}), "harmless"),
  (forked.Ending(0, "", {"x": 2}), "silent"),
  (forked.Ending(0, "x is left out\\n", {"x": 2}), "reported"),
  (forked.Ending(1, "Traceback (most recent call last):\\n", None), "traceback"),
  (forked.Ending(0, "Traceback (most recent call last):\\n", {"x": 1}), "traceback"),
  (forked.Ending(-11, "", None), "traceback"),
  (forked.Ending(None, "", None), "hang"),
):
  outcome = damage.outcome(ending, undamaged, accepted=False, must_report=False)
  assert outcome == expected, (ending, outcome)
assert damage.outcome(undamaged, undamaged, accepted=True, must_report=True) == "silent"
"""
  done = subprocess.run(
    [sys.executable, "-c", code], cwd=ROOT / "tests", capture_output=True, text=True
  )
  assert not done.returncode, done.stderr
