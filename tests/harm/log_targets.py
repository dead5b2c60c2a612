"""Named damage to the logs of a workdir: figures, the ledger, texts."""

import json
import pathlib
import shutil

from harm import specimens
from harm.targets import nested, target


def lines_of(path: pathlib.Path) -> list[bytes]:
  return path.read_bytes().splitlines(keepends=True)


def _middle_line(place: specimens.Place, line: bytes) -> None:
  lines = lines_of(place.case / "metrics.jsonl")
  lines[1] = line + b"\n"
  (place.case / "metrics.jsonl").write_bytes(b"".join(lines))


@target("autoencoder", "resume", "report", must_report=True, accepted=True)
def metrics_garbage_line(place):
  """A line of metrics.jsonl is garbage."""
  _middle_line(place, b"garbage")


@target("autoencoder", "resume", "report", must_report=True, accepted=True)
def metrics_list_line(place):
  """A line of metrics.jsonl is a list."""
  _middle_line(place, b"[1]")


@target("autoencoder", "resume", "report", must_report=True, accepted=True)
def metrics_line_without_step(place):
  """A line of metrics.jsonl has no step."""
  _middle_line(place, b'{"kind": "train"}')


@target("autoencoder", "resume", "report", must_report=True, accepted=True)
def metrics_text_for_step(place):
  """The step of a line of metrics.jsonl is text."""
  _middle_line(place, b'{"kind": "train", "step": "two"}')


@target("autoencoder", "resume", "report", must_report=True, accepted=True)
def metrics_no_utf8(place):
  """A line of metrics.jsonl is not UTF-8."""
  _middle_line(place, b'{"kind": "train", "step": 2, "x": "\xff\xfe"}')


@target("autoencoder", "resume", "report", must_report=True, accepted=True)
def metrics_nested_line(place):
  """A line of metrics.jsonl is nested 100,000 deep."""
  _middle_line(place, b"[" * 100_000)


@target("autoencoder", "report", accepted=True)
def metrics_odd_figures(place):
  """Figures in metrics.jsonl are text, lists and huge numbers."""
  lines = [json.loads(line) for line in lines_of(place.case / "metrics.jsonl")]
  for line, odd in zip(lines, ("x", [1], 10**400, None), strict=False):
    line |= {"loss": odd, "tokens_per_second": odd, "time": odd}
  text = "".join(json.dumps(line) + "\n" for line in lines)
  (place.case / "metrics.jsonl").write_text(text)


@target("autoencoder", "resume", "report")
def metrics_are_a_folder(place):
  """metrics.jsonl is a folder."""
  (place.case / "metrics.jsonl").unlink()
  (place.case / "metrics.jsonl").mkdir()


def _ledger(place: specimens.Place) -> pathlib.Path:
  return sorted((place.case / "ledger").glob("*.json"))[0]


@target("autoencoder", "resume", "report", must_report=True, accepted=True)
def ledger_empty(place):
  """A file of the ledger is empty."""
  _ledger(place).write_bytes(b"")


@target("autoencoder", "resume", "report", accepted=True)
def ledger_list(place):
  """A file of the ledger is a list."""
  _ledger(place).write_text("[1]")


@target("autoencoder", "report", accepted=True)
def ledger_without_seconds(place):
  """A file of the ledger has no seconds."""
  _ledger(place).write_text('{"started": 1, "written": "x"}')


@target("autoencoder", "resume", "report", accepted=True)
def ledger_name(place):
  """The name of a file in the ledger's folder is not a number."""
  (place.case / "ledger/copy of 0001.json").write_text("{}")


@target("autoencoder", "resume", accepted=True)
def ledger_is_a_file(place):
  """The ledger's folder is a file."""
  shutil.rmtree(place.case / "ledger")
  (place.case / "ledger").write_text("x")


@target("transformer", "generate", "report", accepted=True)
def samples_torn(place):
  """The last line of samples.jsonl is truncated."""
  path = place.case / "samples.jsonl"
  path.write_bytes(path.read_bytes()[:-20])


@target("transformer", "generate", "report", accepted=True)
def samples_list_line(place):
  """A line of samples.jsonl is a list."""
  path = place.case / "samples.jsonl"
  path.write_bytes(b"[1]\n" + path.read_bytes())


@target("transformer", "report", accepted=True)
def samples_odd(place):
  """Values of a text in samples.jsonl have other types."""
  path = place.case / "samples.jsonl"
  line = json.loads(lines_of(path)[0])
  odd = {name: [1] for name in line if name not in ("prompt", "text")}
  path.write_text(json.dumps(line | odd) + "\n")


@target("transformer", "report", "export", accepted=True)
def evaluation_list(place):
  """evaluation.json is a list."""
  (place.case / "evaluation.json").write_text("[1]")


@target("transformer", "report", "export", accepted=True)
def evaluation_nested(place):
  """evaluation.json is nested 100,000 deep."""
  nested(place.case / "evaluation.json")


@target("transformer", "report", "export", accepted=True)
def evaluation_odd(place):
  """Figures in evaluation.json are lists."""
  path = place.case / "evaluation.json"
  path.write_text(json.dumps({name: [1] for name in json.loads(path.read_text())}))


@target("transformer", "report", "export", accepted=True)
def evaluation_text(place):
  """Figures in evaluation.json are text."""
  path = place.case / "evaluation.json"
  path.write_text(json.dumps(dict.fromkeys(json.loads(path.read_text()), "x")))


@target("transformer", "report", accepted=True)
def temperature_list(place):
  """temperature.json is a list."""
  (place.case / "temperature.json").write_text("[1]")


@target("transformer", "report", accepted=True)
def temperature_rows(place):
  """The rows of temperature.json are not a list."""
  (place.case / "temperature.json").write_text('{"rows": {"x": 1}, "baseline": 3}')
