"""Claims about entry points: foreign JSON, pipes and numbers out of range are one line of error."""

import dataclasses
import errno
import functools
import json
import math
import os
import pathlib
import stat
from collections.abc import Callable

import pytest
from etils import epath

from benchmarks import documents
from calm_jax import errors, files, workdir
from calm_jax.data import tokenizer as tokenizer_lib
from calm_jax.generation import prompts
from calm_jax.planning import comparison
from calm_jax.running import loading
from calm_jax.stages import table


def refused_in_one_line(act: Callable[[], object], reason: str) -> None:
  with pytest.raises(errors.CalmError, match=reason) as caught:
    act()
  assert "\n" not in str(caught.value) and len(str(caught.value)) < 1000


NESTED = "[" * 100_000
# JSON that is not valid settings.
NO_SETTINGS = {
  "nested too deep": (NESTED, "config.json is not valid JSON: nested too deep"),
  "nested in a setting": ('{"stage": "calm", "data": ' + NESTED, "nested too deep"),
  "a list": ("[]", "config.json must hold a JSON object, got list"),
  "no UTF-8": (b"\xff{}", "config.json is not valid JSON"),
  "a list for a stage": ('{"stage": []}', r"config.stage is \[\]"),
  "a list for settings": ('{"stage": "calm", "model": [[[[[[[[]]]]]]]]}', r"hold settings, got \["),
  "a huge number": (f'{{"stage": "calm", "data": {{"context": 1{"0" * 5000}}}}}', "not valid JSON"),
  "a huge float": (
    '{"stage": "calm", "model": {"rope_theta": 1%s}}' % ("0" * 400),
    "rope_theta must be finite",
  ),
  "NaN": ('{"stage": "calm", "optimizer": {"eps": NaN}}', "eps must be finite, got nan"),
  "NUL in a path": (r'{"stage": "calm", "data": {"path": "a\u0000b"}}', r"data.path holds char"),
  "half a pair": (r'{"stage": "calm", "autoencoder": "\ud800"}', r"config.autoencoder holds char"),
}


@pytest.mark.parametrize(("content", "reason"), NO_SETTINGS.values(), ids=NO_SETTINGS.keys())
def test_json_that_is_no_settings_is_refused_in_one_line(
  content: str | bytes, reason: str, tmp_path: pathlib.Path
):
  (tmp_path / "config.json").write_bytes(
    content if isinstance(content, bytes) else content.encode()
  )
  refused_in_one_line(lambda: table.run_from(files.read_json(tmp_path / "config.json")), reason)


ORIGIN = workdir.Origin("tokenizer.json", "ab", "cd", 30, 1, True, (1, 2, 3, 4))
NO_ORIGINS = [
  ({"eos_id": 30}, r"a token must lie in \[0, 30\), got 30"),
  ({"eos_id": -1}, "got -1"),
  ({"eos_id": True}, "eos_id is True"),
  ({"start_patch": [1, 2, 3, 10**12]}, "got 1000000000000"),
  ({"start_patch": [1, 2, "x"]}, "got 'x'"),
  ({"start_patch": 5}, "is not of this version"),
  ({"vocab_size": 2**31}, r"vocab_size must lie in \[1, 2\^31\), got 2147483648"),
  ({"vocab_size": "many"}, "vocab_size is 'many'"),
  ({"appends_eos": 1}, "appends_eos is 1"),
  ({"tokenizer_file": "../x.json"}, "tokenizer_file is '../x.json'"),
  ({"tokenizer_file": []}, r"tokenizer_file is \[\]"),
]


@pytest.mark.parametrize(("changes", "reason"), NO_ORIGINS)
def test_an_impossible_origin_is_refused_in_one_line(changes, reason):
  values = json.loads(json.dumps(ORIGIN.values()))
  assert workdir.Origin.of_json(values, "origin.json") == ORIGIN
  refused_in_one_line(
    lambda: workdir.Origin.of_json(values | changes, "origin.json"), f"origin.json.*{reason}"
  )


@pytest.mark.parametrize("eos_id", [30, -1, 10**12])
def test_an_eos_outside_the_tokenizer_is_refused(eos_id: int, words, tokens: str):
  piece_file = str(pathlib.Path(tokens) / "tokenizer.model")
  for path, size in ((words(30), 30), (piece_file, 300)):
    eos = eos_id if eos_id != 30 else size
    load = functools.partial(tokenizer_lib.load, path, eos=eos)
    refused_in_one_line(load, rf"has no token {eos} to end .* its vocabulary has {size}$")


# Settings of any stage that a program can't represent.
NOT_HELD = {
  "steps": ("calm", "training.steps", 2**31, r"steps must lie in \[1, 2147483647\]"),
  "batch": ("calm", "training.batch", 2**31, r"batch must lie in \[1, 2147483647\]"),
  "evaluations": ("calm", "training.eval_every", 2**70, r"must lie in \[0, 2147483647\]"),
  "tokens a step": ("calm", "training.batch", 2**30, r"batch \* config.data.context must lie in"),
  "context": ("calm", "data.context", 10**20, r"context must lie in \[1, 2147483647\]"),
  "samples": ("calm", "loss.samples", 2**31, r"samples must lie in \[1, 65536\]"),
  "width": ("calm", "model.width", 2**31, r"width must lie in \[1, 1048576\]"),
  "a width that XLA aborts at": ("autoencoder", "model.width", 2**31 - 1, "must lie in"),
  "layers without end": ("autoencoder", "model.encoder_layers", 2**20, r"\[1, 1024\]"),
  "patch": ("autoencoder", "model.patch_size", 2**31, r"patch_size must lie in \[1, 4096\]"),
  "latent": ("autoencoder", "model.latent", 2**31, "latent must lie in"),
  "noise": ("calm", "head.noise", 2**31, "noise must lie in"),
  "heads": ("transformer", "model.heads", 2**31, "heads must lie in"),
  "warmup": ("transformer", "optimizer.warmup_steps", 2**31, "warmup_steps must lie in"),
  "traced steps": ("transformer", "profile.steps", 2**31, "steps must lie in"),
  "port": ("transformer", "profile.port", 2**16, "port must be below 65536"),
  "learning rate": ("calm", "optimizer.learning_rate", 1e300, r"lie in \[1.18e-38, 3.4e\+38\]"),
  "eps that is 0 in float32": ("calm", "optimizer.eps", 1e-300, r"eps must lie in \[1.18e-38"),
  "minutes": ("calm", "limits.step_minutes", 1e300, "step_minutes must lie in"),
  "theta": ("transformer", "model.rope_theta", 1e300, "rope_theta must lie in"),
}


@pytest.mark.parametrize(
  ("stage", "path", "value", "reason"), NOT_HELD.values(), ids=NOT_HELD.keys()
)
def test_a_setting_that_no_program_can_represent_is_refused_with_its_range(
  stage: str, path: str, value: float, reason: str
):
  part, name = path.split(".")
  refused_in_one_line(
    lambda: table.run_from({"stage": stage, part: {name: value}}), f"config.*{reason}"
  )


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
def test_no_float_of_any_setting_may_be_infinite_or_nan(value: float):
  """In a file or a flag, and in a dataclass, as imports make it."""
  for stage, kind in ((name, spec.run) for name, spec in table.STAGES.items()):
    for part in dataclasses.fields(kind):
      own = getattr(kind(), part.name)
      for field in dataclasses.fields(own) if dataclasses.is_dataclass(own) else ():
        if field.type is not float:
          continue
        values = {"stage": stage, part.name: {field.name: value}}
        refused_in_one_line(functools.partial(table.run_from, values), f"{field.name} must be")
        refused_in_one_line(functools.partial(type(own), **{field.name: value}), field.name)


READERS = {
  "prompts": lambda path: prompts.read(path, {}),
  "texts": lambda path: prompts.written(path, []),
  "document": documents.update,
  "plans": comparison.read,
  "settings": lambda path: loading.read_run(os.path.dirname(path)),
  "origin": lambda path: workdir.read_origin(os.path.dirname(path)),
  "tokenizer": tokenizer_lib.load,
  "what is added to": lambda path: files.append(path, "x"),
  "what is written": lambda path: files.write(path, "x"),
}
NAMES = {"settings": "config.json", "origin": "origin.json", "tokenizer": "tokenizer.json"}


@pytest.mark.parametrize("reader", READERS)
def test_pipes_and_devices_do_not_block(reader: str, tmp_path: pathlib.Path):
  place = tmp_path / NAMES.get(reader, "x")
  os.mkfifo(place)
  refused_in_one_line(
    lambda: READERS[reader](str(place)), "is a pipe, a device or a socket, not a file"
  )
  assert stat.S_ISFIFO(place.stat().st_mode)
  place.unlink()
  place.symlink_to("/dev/zero")
  refused_in_one_line(lambda: READERS[reader](str(place)), "not a file")
  assert place.is_symlink()


@pytest.mark.parametrize("reader", [name for name in READERS if not name.startswith("what")])
@pytest.mark.parametrize("code", [errno.EIO, errno.EACCES])
def test_an_unreadable_file_is_reported_in_one_line(
  reader: str, code: int, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
):
  place = tmp_path / NAMES.get(reader, "x")
  place.write_text("{}")

  def fail(path: epath.Path) -> bytes:
    raise OSError(code, os.strerror(code), os.fspath(path))

  monkeypatch.setattr(type(epath.Path("/")), "read_bytes", fail)
  refused_in_one_line(
    lambda: READERS[reader](str(place)), f"can't read .*{place.name}.*{os.strerror(code)}"
  )


def test_a_folder_without_permission_is_reported_in_one_line(
  tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
):
  look = os.stat

  def fail(path, *args, **more):
    if str(path).startswith(f"{tmp_path}/"):
      raise PermissionError(errno.EACCES, "Permission denied", os.fspath(path))
    return look(path, *args, **more)

  monkeypatch.setattr(os, "stat", fail)
  for act in (
    lambda: loading.read_run(str(tmp_path)),
    lambda: prompts.written(f"{tmp_path}/texts", []),
  ):
    refused_in_one_line(act, "can't reach .*Permission denied")


PLAN = {"facts": {"name": "x"}, "topology": {"chips": 4, "chip": {"name": "v5e"}}, "roofline": {}}
NO_PLANS = [
  (NESTED, "nested too deep"),
  ("[]", "must hold a JSON object, got list"),
  ("{}", "holds no plan .KeyError: 'topology'"),
  ('{"facts": [], "topology": [], "roofline": []}', "holds no plan .TypeError"),
  (json.dumps(PLAN), "holds no plan .KeyError: 'all_overlaps'"),
  (
    json.dumps(PLAN | {"topology": {"chips": 4, "chip": {"name": "v0"}}}),
    "holds no plan .ValueErr",
  ),
]


@pytest.mark.parametrize(("content", "reason"), NO_PLANS)
def test_json_that_is_no_plan_is_refused_in_one_line(content, reason, tmp_path: pathlib.Path):
  (tmp_path / "plan.json").write_text(content)
  refused_in_one_line(lambda: comparison.read(f"{tmp_path}/*.json"), f"plan.json.*{reason}")


RECORD = {
  "command": "",
  "suite": "",
  "commit": None,
  "versions": {"jax": "1"},
  "environment": {},
  "processor": "",
  "lines": ["a"],
  "figures": {},
}
WRONG_FIELDS = (
  {"versions": {}},
  {"versions": []},
  {"environment": []},
  {"lines": "ab"},
  {"lines": [1]},
  {"extra": 1},
)
NO_RECORDS = [NESTED, "[]", "{}", *(json.dumps(RECORD | changes) for changes in WRONG_FIELDS)]


@pytest.mark.parametrize("content", NO_RECORDS)
def test_json_that_is_no_benchmark_record_is_refused_in_one_line(content, tmp_path: pathlib.Path):
  (tmp_path / "x.json").write_text(content)
  (tmp_path / "page.md").write_text("<!-- x.json -->\n")
  refused_in_one_line(
    lambda: documents.update(f"{tmp_path}/page.md"), "x.json holds no run of a benchmark"
  )
  assert (tmp_path / "page.md").read_text() == "<!-- x.json -->\n"


def test_a_document_that_is_not_utf8_is_refused_in_one_line(tmp_path: pathlib.Path):
  (tmp_path / "page.md").write_bytes(b"caf\xe9")
  refused_in_one_line(lambda: documents.update(f"{tmp_path}/page.md"), "page.md is not UTF-8")
