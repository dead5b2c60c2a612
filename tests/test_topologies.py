"""Claims about chips, their figures and names of topologies."""

import importlib.util
import math
import pathlib

import pytest

from calm_jax import errors
from calm_jax.planning.compiled import topologies


def test_a_name_gives_chips_and_devices():
  pod = topologies.parse("v5p:8x8x4")
  assert (pod.chip.name, pod.shape, pod.chips, pod.devices) == ("v5p", (8, 8, 4), 256, 256)
  slices = topologies.parse("7x:2x2x2", slices=2)
  assert (slices.name, slices.chips, slices.devices) == ("7x:2x2x2", 16, 32)
  assert topologies.parse("tpu7x:2x2x2").chip is slices.chip


@pytest.mark.parametrize(
  "name, slices, message",
  [
    ("v9:2x2", 1, "known are v4, v5e, v5p, v6e, 7x"),
    ("v5e", 1, "shapes of 2 numbers, as in v5e:1x1"),
    ("v5p:2x2", 1, "shapes of 3 numbers, as in v5p:2x2x1"),
    ("v5e:0x4", 1, "shapes of 2 numbers"),
    ("v5e:32x16", 1, "at most 256: give several slices"),
    ("v5e:4x4", 0, "slices must be above 0, got 0"),
  ],
)
def test_an_error_for_a_wrong_name_lists_valid_ones(name: str, slices: int, message: str):
  with pytest.raises(errors.CalmError, match=message):
    topologies.parse(name, slices)


def test_published_interconnect_is_links_times_directions():
  published = {"v5e": 400e9, "v5p": 1200e9, "v6e": 800e9, "7x": 1200e9}  # Bidirectional, a chip.
  for name, bandwidth in published.items():
    chip = topologies.CHIPS[name]
    assert 2 * 2 * chip.axes * chip.link == bandwidth


def test_a_program_may_use_almost_the_published_memory():
  published = {"v4": 32, "v5e": 16, "v5p": 95, "v6e": 32, "7x": 192}  # GiB a chip.
  for name, size in published.items():
    chip = topologies.CHIPS[name]
    assert 0.95 < chip.usable * chip.devices / (size * topologies.GIB) < 1.01


def test_examples_of_shapes_are_valid_and_grow():
  for chip in topologies.CHIPS.values():
    sizes = [topologies.parse(f"{chip.name}:{example}").chips for example in chip.examples]
    assert sizes == sorted(sizes) and math.prod(sizes) > 0


def test_without_libtpu_the_error_names_the_package(monkeypatch: pytest.MonkeyPatch):
  find = importlib.util.find_spec
  monkeypatch.setattr(
    importlib.util, "find_spec", lambda name: None if name == "libtpu" else find(name)
  )
  with pytest.raises(errors.CalmError, match="pip install libtpu"):
    topologies.devices(topologies.parse("v5e:2x2"))


def test_the_error_for_a_held_lock_names_the_process(
  monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path
):
  locks = tmp_path / "lockfile"
  locks.touch()
  monkeypatch.setattr(topologies, "_LOCK", locks)
  topology = topologies.parse("v5e:2x2")
  message = str(topologies._refusal(topology, "ABORTED: libtpu multi-process lockfile"))
  assert "which trains or compiles" in message and "ALLOW_MULTIPLE_LIBTPU_LOAD" in message
  if pathlib.Path("/proc/locks").exists():
    fcntl = pytest.importorskip("fcntl")
    with locks.open("w") as file:
      fcntl.lockf(file, fcntl.LOCK_EX)
      message = str(topologies._refusal(topology, "ABORTED: libtpu multi-process lockfile"))
    assert "python" in message and "process" in message and "which trains" not in message
