"""A run that is killed at random moments ends like an uninterrupted run; see kill_run.py."""

import pathlib

import kill_run


def test_a_killed_run_equals_an_uninterrupted_one(tmp_path: pathlib.Path):
  report = kill_run.run(kills=3, seed=1, root=tmp_path)
  assert report["kills"] == 3 and report["resumed_after"]
  assert report["each_step_once"] and report["figures_equal"] and report["state_equal"]
