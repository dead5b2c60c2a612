"""Claims about CONTRIBUTING.md: each example of an addition works as printed."""

import dataclasses
import pathlib
import re

import jax
import numpy as np
import pytest
from jax import numpy as jnp

from calm_jax import config, errors
from calm_jax.data import readers, sources
from calm_jax.interchange import names
from calm_jax.kernels import attention
from calm_jax.models.heads import head as head_lib
from calm_jax.models.heads import registry
from calm_jax.running import conversion, loading, train
from calm_jax.stages import table

ROOT = pathlib.Path(__file__).parent.parent
EXAMPLES = dict(
  re.findall(
    r"^### Add an? (\w+)\n.*?^```python\n(.*?)^```",
    (ROOT / "CONTRIBUTING.md").read_text(),
    re.MULTILINE | re.DOTALL,
  )
)
TABLES: tuple[dict, ...] = (table.STAGES, registry.HEADS, attention.KERNELS, readers.READERS)


def run_example(name: str) -> dict:
  """Runs an example as printed, and returns the names that it defines."""
  defined: dict = {"__name__": "example"}
  exec(compile(EXAMPLES[name], f"CONTRIBUTING.md, {name}", "exec", dont_inherit=True), defined)
  return defined


@pytest.fixture
def added():
  """Runs an example, and restores the tables after the test."""
  before = [dict(rows) for rows in TABLES]
  yield run_example
  for rows, original in zip(TABLES, before, strict=True):
    rows.clear()
    rows.update(original)


def test_every_addition_has_an_example():
  assert set(EXAMPLES) == {"stage", "head", "kernel", "format", "source"}
  for text in EXAMPLES.values():
    assert len([line for line in text.splitlines() if line.strip()]) <= 15


def test_the_stage_trains(added, transformer_run, tmp_path: pathlib.Path):
  run_class = added("stage")["Run"]
  fields = {field.name for field in dataclasses.fields(transformer_run)} - {"stage"}
  run = run_class(**{name: getattr(transformer_run, name) for name in fields})
  train.train_run(run, str(tmp_path / "half"))
  train.train_run(transformer_run, str(tmp_path / "whole"))
  first = [
    re.search(r'"loss": ([\d.]+)', (tmp_path / name / "metrics.jsonl").read_text())
    for name in ("half", "whole")
  ]
  half, whole = (float(match[1]) for match in first if match)
  assert 2 * half == pytest.approx(whole, rel=1e-5)
  assert loading.load(str(tmp_path / "half"), "half").step == run.training.steps


def test_the_head_samples(added):
  added("head")
  sizes = config.Head(kind="normal", blocks=1, noise=4)
  head = registry.build(sizes, head_lib.Trunk(8, 6, "fan_in"))
  noise = head.draw_noise(jax.random.key(0), (1000,))
  assert noise.shape == (1000, 4) and float(jnp.std(noise)) == pytest.approx(1, abs=0.1)
  params = head.init(jax.random.key(1))
  assert head.sample(params, jnp.ones((3, 8)), jax.random.key(2), 5).shape == (5, 3, 6)


def test_the_head_is_not_exported_under_its_parents_name(added):
  """Other frameworks would open it as an energy head, with other noise."""
  added("head")
  with pytest.raises(errors.CalmError, match="'normal' heads have no tensors in the reference"):
    names.calm(config.Backbone(), config.Head(kind="normal"))


def test_the_kernel_equals_the_plain_form(added):
  added("kernel")
  assert attention.choose("builtin", 8, "float32") == "builtin"
  query, key, value = jax.random.normal(jax.random.key(0), (3, 2, 8, 4, 16))
  actual, expected = (attention.causal(query, key, value, kind) for kind in ("builtin", "xla"))
  np.testing.assert_allclose(actual, expected, atol=1e-5)


def test_the_format_is_opened_by_numpy(added, trained_transformer, tmp_path: pathlib.Path):
  added("format")
  conversion.convert(str(trained_transformer), str(tmp_path / "out"), "npz")
  with np.load(tmp_path / "out/weights.npz") as arrays:
    params = loading.load(str(trained_transformer)).params
    np.testing.assert_array_equal(arrays["out/kernel"], params["out"]["kernel"])
  assert "`numpy.load` opens" in (tmp_path / "out/README.md").read_text()


def test_the_source_is_read(added, tmp_path: pathlib.Path):
  added("source")
  (tmp_path / "a.csv").write_text('id,text\n1,"Hello, cat"\n2,Bye\n')
  _, spans = sources.find((str(tmp_path / "a.csv"),))
  assert [list(readers.documents(span, "text")) for span in spans] == [["Hello, cat", "Bye"]]
