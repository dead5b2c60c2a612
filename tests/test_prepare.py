"""Claims about prepare: runs, restarts and workers give the same bytes; errors say why not."""

import dataclasses
import gzip
import itertools
import json
import os
import pathlib
import signal
import subprocess
import sys

import numpy as np
import pytest

from calm_jax import errors, prepare
from calm_jax.data import corpus as corpus_lib
from calm_jax.data import holdout, parts, sources
from calm_jax.data import manifest as manifest_lib
from calm_jax.data import store as store_lib
from calm_jax.data import tokenizer as tokenizer_lib

DOCUMENTS = [f"document {i} {'says so ' * (i % 7)}\n\tand ends {i * i}" for i in range(200)]


@pytest.fixture(autouse=True)
def small_parts(monkeypatch: pytest.MonkeyPatch):
  monkeypatch.setattr(prepare, "_MIN_PART_BYTES", 2000)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> str:
  path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
  return tokenizer_lib.train(DOCUMENTS, 300, str(path)).path


@pytest.fixture
def settings(tmp_path: pathlib.Path, tokenizer: str) -> prepare.Settings:
  """A corpus of two files and ten parts."""
  for name, documents in (("a", DOCUMENTS[:150]), ("b", DOCUMENTS[150:])):
    lines = "".join(json.dumps({"text": text}) + "\n" for text in documents)
    (tmp_path / f"{name}.jsonl").write_text(lines)
  return prepare.Settings(
    (f"{tmp_path}/a.jsonl", f"{tmp_path}/b.jsonl"),
    f"{tmp_path}/store",
    tokenizer,
    heldout=0.1,
    workers=1,
  )


@pytest.fixture
def few(settings: prepare.Settings) -> prepare.Settings:
  """The same two files with 60 long documents; the end of the text is held out."""
  for path, documents in zip(settings.input, (DOCUMENTS[:40], DOCUMENTS[40:60]), strict=True):
    lines = "".join(json.dumps({"text": text * 5}) + "\n" for text in documents)
    pathlib.Path(path).write_text(lines)
  return settings


def with_bad_line(settings: prepare.Settings) -> prepare.Settings:
  """Adds a broken line to the end of the corpus, in its last part."""
  with open(settings.input[-1], "a") as file:
    file.write("broken\n")
  return settings


def texts(store: store_lib.TokenStore, split: str) -> list[str]:
  tokenizer = tokenizer_lib.load(f"{store.path}/{store.manifest.tokenizer.file}")
  offsets = store.offsets(split)
  pairs = itertools.pairwise(map(int, offsets))
  return [tokenizer.decode(store.read(split, start, stop)) for start, stop in pairs]


def files(folder: str) -> dict[str, bytes]:
  root = pathlib.Path(folder)
  return {str(p.relative_to(root)): p.read_bytes() for p in root.rglob("*") if p.is_file()}


def run(*flags: str) -> subprocess.CompletedProcess[str]:
  command = [sys.executable, "-m", "calm_jax.prepare", *flags]
  return subprocess.run(command, capture_output=True, text=True, timeout=60)


def as_flags(settings: prepare.Settings) -> list[str]:
  values = dataclasses.asdict(settings) | {"input": ",".join(settings.input)}
  return [f"--{name}={value}" for name, value in values.items()]


def test_every_document_is_in_one_split_in_order(settings: prepare.Settings):
  store = prepare.prepare(settings)
  train, heldout = texts(store, "train"), texts(store, "heldout")
  assert not set(train) & set(heldout)
  assert train == [text for text in DOCUMENTS if text not in heldout]
  assert heldout == [text for text in DOCUMENTS if text in heldout]
  assert 5 < len(heldout) < 40


def test_copies_of_a_document_share_a_split(settings: prepare.Settings, tmp_path: pathlib.Path):
  (tmp_path / "c.jsonl").write_bytes((tmp_path / "a.jsonl").read_bytes())
  inputs = (*settings.input, f"{tmp_path}/c.jsonl")
  store = prepare.prepare(dataclasses.replace(settings, input=inputs))
  assert not set(texts(store, "train")) & set(texts(store, "heldout"))
  assert sum(store.manifest.splits[split].documents for split in store_lib.SPLITS) == 350


@pytest.mark.parametrize("append_eos", [True, False])
def test_eos_ends_every_document_or_none(settings: prepare.Settings, append_eos: bool):
  store = prepare.prepare(dataclasses.replace(settings, append_eos=append_eos))
  assert store.manifest.appends_eos == append_eos
  for split in store_lib.SPLITS:
    tokens = store.read(split, 0, store.num_tokens(split))
    ends = np.flatnonzero(tokens == store.manifest.tokenizer.eos_id)
    np.testing.assert_array_equal(ends, store.offsets(split)[1:] - 1 if append_eos else [])


def test_the_manifest_counts_bytes_and_documents_of_each_source(settings: prepare.Settings):
  manifest = prepare.prepare(settings).manifest
  sizes = [sum(len(text.encode()) for text in part) for part in (DOCUMENTS[:150], DOCUMENTS[150:])]
  assert manifest.sources == (
    manifest_lib.Source("a.jsonl", sizes[0], 150),
    manifest_lib.Source("b.jsonl", sizes[1], 50),
  )
  assert manifest.dtype == "uint16" and manifest.skipped_lines == 0


@pytest.mark.parametrize("corpus", ["settings", "few"])
@pytest.mark.parametrize("name", ["file", "train:300"])
def test_the_number_of_workers_does_not_change_the_store(
  request: pytest.FixtureRequest, corpus: str, name: str
):
  settings = request.getfixturevalue(corpus)
  if name != "file":
    settings = dataclasses.replace(settings, tokenizer=name)
  alone = prepare.prepare(settings)
  together = prepare.prepare(dataclasses.replace(settings, output=f"{settings.output}2", workers=3))
  assert alone.hash == together.hash
  assert files(alone.path) == files(together.path)
  assert alone.manifest.heldout_by == ("documents" if corpus == "settings" else "end")


def test_with_few_documents_the_end_of_the_text_is_held_out(
  few: prepare.Settings, capfd: pytest.CaptureFixture[str]
):
  store = prepare.prepare(few)
  output = capfd.readouterr().err
  assert "holding out the last 10.00% of the text" in output
  assert "there are 60 documents, fewer than 100" in output
  train, heldout = texts(store, "train"), texts(store, "heldout")
  expected = [text * 5 for text in DOCUMENTS[:60]]
  cut = train[-1] + heldout[0]
  assert [*train[:-1], cut, *heldout[1:]] == expected
  assert train[-1][-1].isspace()  # No word is cut.
  assert 0.1 <= len("".join(heldout)) / len("".join(expected)) < 0.12
  assert store.manifest.splits["heldout"].documents == len(heldout)
  assert sum(source.documents for source in store.manifest.sources) == 60


def test_a_single_text_file_can_be_prepared_whatever_its_hash(
  settings: prepare.Settings, tmp_path: pathlib.Path
):
  text = "\n".join(DOCUMENTS)
  (tmp_path / "a.txt").write_text(text)
  store = prepare.prepare(dataclasses.replace(settings, input=(f"{tmp_path}/a.txt",), heldout=0.02))
  (train,), (heldout,) = texts(store, "train"), texts(store, "heldout")
  assert train + heldout == text and 0.02 <= len(heldout) / len(text) < 0.025


def test_if_a_split_would_be_empty_the_end_of_the_text_is_held_out(
  settings: prepare.Settings, monkeypatch: pytest.MonkeyPatch
):
  monkeypatch.setattr(holdout, "is_heldout", lambda text, share: False)
  store = prepare.prepare(settings)
  assert store.manifest.heldout_by == "end"
  assert texts(store, "heldout")[1:] == DOCUMENTS[-len(texts(store, "heldout")) + 1 :]


def test_a_tokenizer_is_not_trained_on_held_out_text(few: prepare.Settings):
  _, spans = sources.find(few.input)
  corpus = corpus_lib.Corpus(sources.split(spans, 10**9), few.text_field, few.skip_bad_lines)
  sample = "".join(corpus.sample(corpus.divide(few.heldout)))
  heldout = texts(prepare.prepare(few), "heldout")
  all_text = "".join(text * 5 for text in DOCUMENTS[:60])
  assert sample == all_text.removesuffix("".join(heldout)) and sample != all_text


def test_a_share_of_zero_holds_nothing_out(settings: prepare.Settings):
  store = prepare.prepare(dataclasses.replace(settings, heldout=0.0))
  assert texts(store, "train") == DOCUMENTS
  assert (store.num_tokens("heldout"), store.manifest.heldout_by) == (0, "nothing")
  np.testing.assert_array_equal(store.offsets("heldout"), [0])
  for _, check in store.checks():
    check()


def test_a_small_split_causes_a_warning(
  settings: prepare.Settings, capfd: pytest.CaptureFixture[str]
):
  size = prepare.prepare(settings).num_tokens("heldout")
  warning = f"warning: the heldout split holds only {size:,} tokens, fewer than 20 blocks of 256"
  assert warning in capfd.readouterr().err


@pytest.mark.parametrize("text", ["", "short"])
def test_a_corpus_that_can_not_be_divided_is_refused_before_tokenization(
  settings: prepare.Settings, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, text: str
):
  for name in ("make_part", "make_parts"):
    monkeypatch.setattr(parts, name, None)
  monkeypatch.setattr(tokenizer_lib, "train", None)
  (tmp_path / "a.txt").write_text(text)
  bad = dataclasses.replace(settings, input=(f"{tmp_path}/a.txt",), tokenizer="train:300")
  with pytest.raises(errors.CalmError, match=r"there is no text|leaves nothing for the heldout"):
    prepare.prepare(bad)


def test_long_documents_are_encoded_in_pieces_without_loss(
  settings: prepare.Settings, monkeypatch: pytest.MonkeyPatch
):
  monkeypatch.setattr(parts, "_PIECE_LENGTH", 10)
  store = prepare.prepare(settings)
  assert sorted(texts(store, "train") + texts(store, "heldout")) == sorted(DOCUMENTS)


def test_a_large_corpus_is_sampled_everywhere_outside_the_held_out_text(
  settings: prepare.Settings, monkeypatch: pytest.MonkeyPatch
):
  monkeypatch.setattr(corpus_lib, "_SAMPLE_BYTES", 4000)
  _, spans = sources.find(settings.input)
  corpus = corpus_lib.Corpus(sources.split(spans, 2000), "text", skip_bad_lines=False)
  sample = list(corpus.sample(holdout.Division(settings.heldout)))
  heldout = {text for text in DOCUMENTS if holdout.is_heldout(text, settings.heldout)}
  assert 3000 < sum(map(len, sample)) < 5000
  assert not heldout & set(sample)
  assert any(text.startswith("document 18") for text in sample)


def test_long_documents_are_cut_after_newlines_where_there_are_any(
  monkeypatch: pytest.MonkeyPatch,
):
  monkeypatch.setattr(parts, "_PIECE_LENGTH", 4)
  assert list(parts._pieces("ab\nc\nd\nabcdefg")) == ["ab\n", "c\nd\n", "abcd", "efg"]


KILLED = """
import os, signal, sys
from calm_jax import prepare
from calm_jax.data import parts
make_part = parts.make_part

def killed_at_the_third(job, part, spans):
  if part == 3:
    os.kill(os.getpid(), signal.SIGKILL)
  return make_part(job, part, spans)

parts.make_part = killed_at_the_third
prepare._MIN_PART_BYTES = 2000
prepare.prepare(prepare.Settings(tuple(sys.argv[1].split(",")), sys.argv[2], sys.argv[3],
                                 heldout=0.1, workers=1))
"""


def kill(settings: prepare.Settings) -> pathlib.Path:
  """Runs prepare until it is killed after three parts, and returns its work folder."""
  arguments = [",".join(settings.input), settings.output, settings.tokenizer]
  killed = subprocess.run([sys.executable, "-c", KILLED, *arguments], timeout=60)
  assert killed.returncode == -signal.SIGKILL
  (work,) = (pathlib.Path(settings.output) / "unfinished").iterdir()
  return work


@pytest.mark.parametrize("corpus", ["settings", "few"])
def test_a_killed_run_resumes_after_its_finished_parts(
  request: pytest.FixtureRequest,
  corpus: str,
  monkeypatch: pytest.MonkeyPatch,
  capfd: pytest.CaptureFixture[str],
):
  settings = dataclasses.replace(request.getfixturevalue(corpus), tokenizer="train:300")
  kill(settings)
  with pytest.raises(errors.CalmError, match="unfinished"):
    store_lib.TokenStore.open(settings.output)

  made, make_part = [], parts.make_part
  monkeypatch.setattr(
    parts, "make_part", lambda job, part, spans: made.append(part) or make_part(job, part, spans)
  )
  monkeypatch.setattr(tokenizer_lib, "train", None)  # The trained tokenizer is reused.
  resumed = prepare.prepare(settings)
  total = len(sources.split(sources.find(settings.input)[1], 2000))
  assert made == list(range(3, total))
  assert f"resuming: 3 of {total} parts are finished" in capfd.readouterr().err

  monkeypatch.undo()
  monkeypatch.setattr(prepare, "_MIN_PART_BYTES", 2000)
  whole = prepare.prepare(dataclasses.replace(settings, output=f"{settings.output}2"))
  assert files(resumed.path) == files(whole.path)


def edited(path: pathlib.Path) -> None:
  values = json.loads(path.read_text())
  values["counts"]["train.tokens"] -= 1
  path.write_text(json.dumps(values))


@pytest.mark.parametrize(
  ("name", "damage"),
  [
    ("00001.train.tokens", lambda path: path.write_bytes(bytes(path.stat().st_size))),
    ("00001.train.tokens", lambda path: path.write_bytes(path.read_bytes()[:-2])),
    ("00001.train.lengths", lambda path: path.write_bytes(b"")),
    ("00001.heldout.tokens", lambda path: path.unlink()),
    ("00001.json", lambda path: path.write_text("{}")),
    ("00001.json", lambda path: path.write_text("[]")),
    ("00001.json", lambda path: path.write_text("")),
    ("00001.json", edited),
    ("tokenizer.model", lambda path: path.write_bytes(path.read_bytes()[:-9])),
    ("tokenizer.model", lambda path: tokenizer_lib.train([*DOCUMENTS, "else"], 290, str(path))),
    ("tokenizer.sum.json", lambda path: path.write_text("{}")),
  ],
)
def test_a_damaged_part_or_tokenizer_is_made_again(
  settings: prepare.Settings,
  monkeypatch: pytest.MonkeyPatch,
  name: str,
  damage,
):
  settings = dataclasses.replace(settings, tokenizer="train:300")
  work = kill(settings)
  damage(work / name)
  made, make_part = [], parts.make_part
  monkeypatch.setattr(
    parts, "make_part", lambda job, part, spans: made.append(part) or make_part(job, part, spans)
  )
  store = prepare.prepare(settings)
  assert made[:2] == ([1, 3] if name.startswith("00001") else [3, 4])
  for _, check in store.checks():
    check()
  whole = prepare.prepare(dataclasses.replace(settings, output=f"{settings.output}2"))
  assert files(store.path) == files(whole.path)


def test_parts_of_another_tokenizer_are_not_reused(settings: prepare.Settings):
  settings = dataclasses.replace(settings, tokenizer="train:300")
  work = kill(settings)
  tokenizer_lib.train([*DOCUMENTS, "another"], 290, str(work / "tokenizer.model"))
  sha256 = tokenizer_lib.load(str(work / "tokenizer.model")).sha256
  (work / "tokenizer.sum.json").write_text(json.dumps({"sha256": sha256}))
  store = prepare.prepare(settings)
  heldout = {text for text in DOCUMENTS if holdout.is_heldout(text, settings.heldout)}
  assert set(texts(store, "heldout")) == heldout and store.manifest.tokenizer.vocab_size == 290


def test_parts_of_other_spans_are_not_reused(
  settings: prepare.Settings, monkeypatch: pytest.MonkeyPatch
):
  kill(settings)
  monkeypatch.setattr(prepare, "_MIN_PART_BYTES", 3000)  # Another version may use this size.
  store = prepare.prepare(settings)
  whole = prepare.prepare(dataclasses.replace(settings, output=f"{settings.output}2"))
  assert files(store.path) == files(whole.path)


def test_a_part_that_changes_after_it_was_made_leaves_no_store(
  settings: prepare.Settings, monkeypatch: pytest.MonkeyPatch
):
  make_parts = parts.make_parts

  def zeroed(job, *arguments):
    make_parts(job, *arguments)
    path = pathlib.Path(job.file(2, "train.tokens"))
    path.write_bytes(bytes(path.stat().st_size))

  monkeypatch.setattr(parts, "make_parts", zeroed)
  with pytest.raises(errors.CalmError, match=r"00002\.train\.tokens changed since it was written"):
    prepare.prepare(settings)
  monkeypatch.undo()
  with pytest.raises(errors.CalmError, match="unfinished"):
    store_lib.TokenStore.open(settings.output)


def test_a_tokenizer_that_changes_while_it_is_used_is_an_error(
  settings: prepare.Settings, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
):
  own = tmp_path / "own.model"
  own.write_bytes(pathlib.Path(settings.tokenizer).read_bytes())
  make_parts = parts.make_parts

  def replaced(*arguments):
    make_parts(*arguments)
    tokenizer_lib.train([*DOCUMENTS, "another"], 290, str(own))

  monkeypatch.setattr(parts, "make_parts", replaced)
  with pytest.raises(errors.CalmError, match=r"own\.model changed while it was used"):
    prepare.prepare(dataclasses.replace(settings, tokenizer=str(own)))


def test_a_source_that_changes_while_it_is_read_leaves_no_store(
  settings: prepare.Settings, monkeypatch: pytest.MonkeyPatch
):
  make_parts = parts.make_parts

  def appended(*arguments):
    make_parts(*arguments)
    with_bad_line(settings)

  monkeypatch.setattr(parts, "make_parts", appended)
  with pytest.raises(errors.CalmError, match=r"b\.jsonl changed while it was read"):
    prepare.prepare(settings)


def test_the_files_of_a_part_are_flushed_before_its_counts(
  settings: prepare.Settings, monkeypatch: pytest.MonkeyPatch
):
  synced, fsync = [], os.fsync

  def note(descriptor: int) -> None:
    synced.append(os.path.basename(os.path.realpath(f"/proc/self/fd/{descriptor}")))
    fsync(descriptor)

  monkeypatch.setattr(os, "fsync", note)
  prepare.prepare(settings)
  raw = {
    f"00000.{split}.{name}" for split in ("train", "heldout") for name in ("tokens", "lengths")
  }
  assert raw <= set(synced[: synced.index(f"00000.json.{os.getpid()}.tmp")])


def test_parts_of_other_settings_are_not_reused(settings: prepare.Settings):
  broken = with_bad_line(dataclasses.replace(settings, append_eos=False))
  with pytest.raises(errors.CalmError, match="not JSON"):
    prepare.prepare(broken)
  (work,) = (pathlib.Path(settings.output) / "unfinished").iterdir()
  assert (work / "00000.json").exists()
  pathlib.Path(settings.input[1]).write_text(pathlib.Path(settings.input[1]).read_text()[:-7])
  assert texts(prepare.prepare(settings), "heldout")
  assert not (pathlib.Path(settings.output) / "unfinished").exists()


def test_a_finished_store_is_left_alone(
  settings: prepare.Settings, capfd: pytest.CaptureFixture[str]
):
  first = prepare.prepare(settings)
  before = files(first.path)
  again = prepare.prepare(dataclasses.replace(settings, workers=2))
  assert "exists already" in capfd.readouterr().err
  assert again.hash == first.hash and files(first.path) == before


def test_another_plan_is_refused_and_the_differences_are_named(settings: prepare.Settings):
  before = files(prepare.prepare(settings).path)
  other = dataclasses.replace(settings, heldout=0.2, append_eos=False)
  with pytest.raises(errors.CalmError, match=r"append_eos \(True there, False now\); heldout"):
    prepare.prepare(other)
  os.utime(settings.input[0], (1, 1))
  with pytest.raises(errors.CalmError, match=r"differs in files \(2 files, .*another --output"):
    prepare.prepare(settings)
  assert files(settings.output) == before


@pytest.mark.parametrize(
  "damage", [lambda path: path.unlink(), lambda path: path.write_text("{}"), lambda path: None]
)
def test_a_plan_that_is_not_the_stores_own_is_refused(settings: prepare.Settings, damage):
  plan = pathlib.Path(prepare.prepare(settings).path) / "plan.json"
  other = dataclasses.replace(settings, output=f"{settings.output}2", append_eos=False)
  plan.write_bytes((pathlib.Path(prepare.prepare(other).path) / "plan.json").read_bytes())
  damage(plan)
  with pytest.raises(errors.CalmError, match=r"plan\.json(: .*No such file| has SHA-256)"):
    prepare.prepare(settings)


@pytest.mark.parametrize("workers", [1, 2])
def test_a_bad_line_stops_the_run_and_can_be_skipped(settings: prepare.Settings, workers: int):
  settings = with_bad_line(dataclasses.replace(settings, workers=workers))
  with pytest.raises(errors.CalmError, match=r"b\.jsonl:51: not JSON .*; --skip_bad_lines") as bad:
    prepare.prepare(settings)
  assert "\n" not in str(bad.value)
  with pytest.raises(errors.CalmError, match="unfinished"):
    store_lib.TokenStore.open(settings.output)
  store = prepare.prepare(dataclasses.replace(settings, skip_bad_lines=True))
  assert store.manifest.skipped_lines == 1
  assert sum(store.manifest.splits[split].documents for split in store_lib.SPLITS) == 200


@pytest.mark.parametrize(
  ("change", "reason"),
  [
    ({"heldout": -0.1}, r"--heldout=-0.1 is not in \[0, 1\)"),
    ({"heldout": 1.0}, r"--heldout=1.0 is not in \[0, 1\)"),
    ({"heldout": float("nan")}, r"--heldout=nan is not in \[0, 1\)"),
    ({"heldout": 1e-9}, r"=1e-09 of [\d,]+ characters leaves nothing for the heldout split"),
    ({"heldout": 1 - 1e-9}, "leaves nothing for the train split"),
    ({"workers": -1}, "--workers=-1 is negative"),
    ({"input": ()}, "must not be empty"),
    ({"output": ""}, "must not be empty"),
    ({"output": "a\\b"}, "can't hold a backslash"),
    ({"output": "/dev/null/store"}, "can't write /dev/null/store"),
    ({"text_field": "body"}, r"a\.jsonl:1: no field 'body'"),
    ({"tokenizer": "train:many"}, "names no vocabulary size, as train:1024 does"),
    ({"tokenizer": "train:10"}, "can't train a tokenizer of 10 pieces"),
    ({"tokenizer": "train:100000"}, "can't train a tokenizer of 100000 pieces"),
    ({"tokenizer": "train:300", "eos_token": "</s>"}, "--eos_token is for a tokenizer's file"),
    ({"tokenizer": "nowhere.model"}, r"no such tokenizer: nowhere\.model"),
    ({"tokenizer": "train:99999999999999"}, "can't train a tokenizer of 99999999999999 pieces"),
    ({"tokenizer": "/dev/zero"}, "'/dev/zero' is not a tokenizer"),
    ({"input": ("/dev/zero",)}, "/dev/zero has an unknown suffix"),
    ({"input": ("a\0b",)}, "matches nothing"),
    ({"tokenizer": "a\0b.model"}, "can't read tokenizer"),
    ({"output": "a\0b"}, "can't "),
    ({"tokenizer": "gpt2"}, "'gpt2' is not a tokenizer"),
    ({"eos_token": "<fin>"}, "no token that ends a document"),
  ],
)
def test_bad_settings_are_reported_in_one_line(settings: prepare.Settings, change, reason: str):
  with pytest.raises(errors.CalmError, match=reason) as caught:
    prepare.prepare(dataclasses.replace(settings, **change))
  assert "\n" not in str(caught.value)
  assert not (pathlib.Path(settings.output) / "manifest.json").exists()


@pytest.mark.parametrize("name", ["file", "train:300"])
def test_a_corpus_without_text_is_an_error(
  settings: prepare.Settings, tmp_path: pathlib.Path, name: str
):
  (tmp_path / "empty.jsonl").write_text("\n\n")
  tokenizer = settings.tokenizer if name == "file" else name
  empty = dataclasses.replace(settings, input=(f"{tmp_path}/empty.jsonl",), tokenizer=tokenizer)
  with pytest.raises(errors.CalmError, match="there is no text"):
    prepare.prepare(empty)


def test_a_truncated_file_stops_the_run(settings: prepare.Settings, tmp_path: pathlib.Path):
  whole = gzip.compress((tmp_path / "a.jsonl").read_bytes())
  (tmp_path / "c.jsonl.gz").write_bytes(whole[: len(whole) // 2])
  cut = dataclasses.replace(settings, input=(f"{tmp_path}/c.jsonl.gz",), skip_bad_lines=True)
  with pytest.raises(errors.CalmError, match="Truncated"):
    prepare.prepare(cut)


def test_the_command_prepares_a_store_and_prints_its_sizes(settings: prepare.Settings):
  done = run(*as_flags(dataclasses.replace(settings, workers=2)))
  assert (done.returncode, done.stdout) == (0, ""), done.stderr
  assert "200 documents" in done.stderr and "bytes a token" in done.stderr
  assert store_lib.TokenStore.open(settings.output).manifest.splits["train"].documents > 100


def test_bad_input_ends_the_command_with_one_line_and_code_2(settings: prepare.Settings):
  done = run(*as_flags(with_bad_line(settings)))
  assert done.returncode == 2
  assert done.stderr.splitlines()[-1].startswith("error: ") and "Traceback" not in done.stderr


@pytest.mark.parametrize("size", [500, 3000])  # Too small for a part, and for the store.
def test_a_full_disk_is_reported_in_one_line(settings: prepare.Settings, size: int):
  limited = f"import resource; resource.setrlimit(resource.RLIMIT_FSIZE, ({size}, {size})); "
  limited += "import runpy; runpy.run_module('calm_jax.prepare', run_name='__main__')"
  command = [sys.executable, "-c", limited, *as_flags(settings)]
  done = subprocess.run(command, capture_output=True, text=True, timeout=60)
  assert done.returncode == 2
  assert f"error: can't write {settings.output}" in done.stderr and "Traceback" not in done.stderr
  assert run(*as_flags(settings)).returncode == 0
