"""Claims about sources and readers: each format yields its documents, or an error says why not."""

import gzip
import json
import os
import pathlib
import platform
import re
import tracemalloc

import pyarrow as pa
import pytest
from pyarrow import parquet

from calm_jax import errors
from calm_jax.data import readers, sources

TEXTS = ["one\r\n\ttab", "  two\n", "drei, 三", "x" * 300]


def read(*inputs: str, part_bytes: int = 10**9, field: str = "text") -> list[readers.Item]:
  _, spans = sources.find(inputs)
  parts = sources.split(spans, part_bytes)
  return [item for part in parts for span in part for item in readers.documents(span, field)]


def json_lines(texts: list[str], field: str = "text") -> bytes:
  return "".join(json.dumps({field: text, "id": 1}) + "\n" for text in texts).encode()


def compress(content: bytes, suffix: str) -> bytes:
  return gzip.compress(content) if suffix == ".gz" else pa.compress(content, "zstd", asbytes=True)


@pytest.mark.parametrize("suffix", ["", ".gz", ".zst"])
def test_compression_does_not_change_documents(tmp_path: pathlib.Path, suffix: str):
  pack = (lambda content: compress(content, suffix)) if suffix else bytes
  (tmp_path / f"a.jsonl{suffix}").write_bytes(pack(json_lines(TEXTS)))
  (tmp_path / f"b.txt{suffix}").write_bytes(pack(TEXTS[0].encode()))
  assert read(f"{tmp_path}/*{suffix or '.*'}") == [*TEXTS, TEXTS[0]]


def test_parquet_yields_a_column_and_counts_nulls_as_bad_lines(tmp_path: pathlib.Path):
  path = tmp_path / "a.parquet"
  parquet.write_table(pa.table({"body": [TEXTS[0], None, TEXTS[1]], "n": [1, 2, 3]}), path)
  bad = readers.BadLine(f"{path}:2", "null, not text")
  assert read(str(path), field="body") == [TEXTS[0], bad, TEXTS[1]]
  with pytest.raises(errors.CalmError, match=r"no column 'text' .* but body, n"):
    read(str(path))
  with pytest.raises(errors.CalmError, match=r"'n' of .* holds int64, not text"):
    read(str(path), field="n")


@pytest.mark.parametrize("part_bytes", [1, 7, 50, 100, 350, 10**6])
def test_spans_of_json_lines_yield_every_line_once(tmp_path: pathlib.Path, part_bytes: int):
  path = tmp_path / "a.jsonl"
  path.write_bytes(json_lines(TEXTS) + b"\r\nbroken\n" + json_lines(TEXTS))
  bad = readers.BadLine(f"{path}:6", "not JSON (Expecting value at column 1)")
  assert read(str(path), part_bytes=part_bytes) == [*TEXTS, bad, *TEXTS]


def test_small_files_share_a_part_and_a_large_file_is_cut(tmp_path: pathlib.Path):
  for name, size in (("a", 10), ("b", 10), ("c", 10), ("d", 50)):
    (tmp_path / f"{name}.jsonl").write_bytes(b"\n" * size)
  _, spans = sources.find([str(tmp_path)])
  parts = sources.split(spans, 20)
  assert [[span.num_bytes for span in part] for part in parts] == [[10, 10], [10], [20], [20], [10]]


@pytest.mark.parametrize(
  ("line", "reason"),
  [
    (b'{"text": "cut', "not JSON"),
    (b'{"text": "\xff"}', "not UTF-8"),
    (b'{"body": "a"}', "no field 'text'"),
    (b'["text"]', "no field 'text'"),
    (b'{"text": 3}', "holds int, not text"),
    (b'{"text": "\\ud800"}', "half a surrogate pair"),
    (b"[" * 100_000, "nested too deep"),
    (b'{"text": "a", "n": %s}' % (b"1" * 5000), "JSON that can't be read .*4300 digits"),
  ],
)
def test_a_bad_line_is_reported_with_its_number(tmp_path: pathlib.Path, line: bytes, reason: str):
  path = tmp_path / "a.jsonl"
  path.write_bytes(json_lines(TEXTS) + line + b"\n" + json_lines(TEXTS[:1]))
  *before, bad, after = read(str(path))
  assert before == TEXTS and after == TEXTS[0]
  assert isinstance(bad, readers.BadLine)
  assert bad.where == f"{path}:5" and re.search(reason, bad.reason)


def test_a_folder_yields_its_visible_text_files_in_order(tmp_path: pathlib.Path):
  names = ["b.md", "a/z.py", "a/b.txt", "a.c", ".git/x.py", "__pycache__/x.py", ".x.py", "a.so"]
  for name in names:
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    path.write_text(name)
  assert read(str(tmp_path)) == ["a.c", "a/b.txt", "a/z.py", "b.md"]


def test_a_file_that_two_inputs_match_is_read_once(tmp_path: pathlib.Path):
  for name in "ab":
    (tmp_path / f"{name}.txt").write_text(name)
  assert read(f"{tmp_path}/b.txt", f"{tmp_path}/*.txt") == ["b", "a"]


def test_empty_documents_are_left_out(tmp_path: pathlib.Path):
  (tmp_path / "a.jsonl").write_bytes(json_lines(["", "a"]))
  (tmp_path / "b.txt").touch()
  assert read(str(tmp_path)) == ["a"]


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_a_document_that_unpacks_beyond_the_limit_is_an_error(
  tmp_path: pathlib.Path, suffix: str, monkeypatch: pytest.MonkeyPatch
):
  monkeypatch.setattr(readers, "_DOCUMENT_BYTES", 2**20)
  (tmp_path / f"a.txt{suffix}").write_bytes(compress(bytes(2**26), suffix))
  tracemalloc.start()
  with pytest.raises(errors.CalmError, match=r"more than 1,048,576 bytes, the most a document may"):
    read(str(tmp_path))
  assert tracemalloc.get_traced_memory()[1] < 2**24
  tracemalloc.stop()


@pytest.mark.parametrize("suffix", ["", ".gz", ".zst"])
@pytest.mark.parametrize("part_bytes", [2**14, 2**40])
def test_a_line_that_is_too_long_is_a_bad_line_and_not_held_in_memory(
  tmp_path: pathlib.Path, suffix: str, part_bytes: int, monkeypatch: pytest.MonkeyPatch
):
  monkeypatch.setattr(readers, "_LINE_BYTES", 2**10)
  monkeypatch.setattr(readers, "_READ_BYTES", 2**12)
  path = tmp_path / f"a.jsonl{suffix}"
  content = json_lines(TEXTS) + bytes(2**22) + b"\n" + json_lines(TEXTS)
  path.write_bytes(compress(content, suffix) if suffix else content)
  del content
  tracemalloc.start()
  items = read(str(path), part_bytes=part_bytes)
  assert tracemalloc.get_traced_memory()[1] < 2**22
  tracemalloc.stop()
  bad = readers.BadLine(f"{path}:5", "longer than 1,024 bytes, the most a line may have")
  assert items == [*TEXTS, bad, *TEXTS]


def test_a_long_line_is_read_once_however_many_spans_it_crosses(
  tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
):
  path, size = tmp_path / "a.jsonl", 2**20
  path.write_bytes(json_lines(TEXTS) + bytes(size) + b"\n" + json_lines(TEXTS))
  monkeypatch.setattr(readers, "_LINE_BYTES", 2**10)
  skipped, skip = [], readers._skip_line
  monkeypatch.setattr(readers, "_skip_line", lambda *a: skipped.append(skip(*a)) or skipped[-1])
  assert len(read(str(path), part_bytes=2**12)) == 9
  assert sum(skipped) < 2.1 * size  # Once in the span it begins in, once in those it crosses.


def test_a_long_value_that_parquet_repeats_is_held_once(tmp_path: pathlib.Path):
  values = pa.array(["x" * 2**20])
  column = pa.DictionaryArray.from_arrays(pa.array([0] * 2000, pa.int32()), values)
  path = tmp_path / "a.parquet"
  parquet.write_table(pa.table({"text": column}), path, compression="zstd", store_schema=False)
  assert path.stat().st_size < 10_000
  before = pa.default_memory_pool().max_memory()
  _, (span,) = sources.find([str(path)])
  assert sum(len(str(text)) for text in readers.documents(span, "text")) == 2000 * 2**20
  assert pa.default_memory_pool().max_memory() < before + 2**26


def test_a_parquet_page_that_differs_from_its_checksum_is_an_error(tmp_path: pathlib.Path):
  path = tmp_path / "a.parquet"
  table, plain = pa.table({"text": TEXTS}), {"compression": "none", "use_dictionary": False}
  parquet.write_table(table, path, write_page_checksum=True, write_statistics=False, **plain)
  assert read(str(path)) == TEXTS
  path.write_bytes(path.read_bytes().replace(b"drei", b"vier"))
  with pytest.raises(errors.CalmError, match=r"can't read .*a\.parquet: .*CRC"):
    read(str(path))


def test_parquet_text_that_is_not_utf8_is_a_bad_line_with_its_row(tmp_path: pathlib.Path):
  column = pa.array([b"a", b"\xff", b"b"], pa.binary()).view(pa.string())
  path = tmp_path / "a.parquet"
  parquet.write_table(pa.table({"text": column}), path)
  *_, bad, after = read(str(path))
  assert after == "b" and isinstance(bad, readers.BadLine) and bad.where == f"{path}:2"
  assert "not UTF-8" in bad.reason


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.parquet", "a.txt.gz"])
def test_pipes_and_devices_are_refused_and_do_not_block(tmp_path: pathlib.Path, name: str):
  path = tmp_path / "in" / name
  path.parent.mkdir()
  for make, kind in (
    (lambda: os.mkfifo(path), "a pipe"),
    (lambda: path.symlink_to("/dev/zero"), "a pipe, a device"),
  ):
    make()
    for pattern in (path, path.parent, path.parent / "*"):
      with pytest.raises(errors.CalmError, match=f"{name} is {kind}.*, not a file"):
        sources.find([str(pattern)])
    path.unlink()
  path.write_bytes(b"x")
  _, (span,) = sources.find([str(path)])
  path.unlink()
  os.mkfifo(path)  # After it was found.
  with pytest.raises(errors.CalmError, match=f"{name} is a pipe.*, not a file"):
    list(readers.documents(span, "text"))


def test_a_file_that_changed_since_it_was_found_is_an_error(tmp_path: pathlib.Path):
  path = tmp_path / "a.txt"
  path.write_text("a")
  _, spans = sources.find([str(path), sources.STDLIB])
  sources.require_unchanged(spans)
  path.write_text("ab")
  with pytest.raises(
    errors.CalmError, match=r"a\.txt changed while it was read: run prepare again"
  ):
    sources.require_unchanged(spans)


def test_a_folder_that_can_not_be_listed_is_an_error_and_not_left_out(
  tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
):
  (tmp_path / "a.txt").write_text("a")
  (tmp_path / "closed").mkdir()
  scandir = os.scandir

  def refusing(path):
    if str(path).endswith("closed"):
      raise PermissionError(13, "Permission denied", str(path))
    return scandir(path)

  monkeypatch.setattr(os, "scandir", refusing)
  with pytest.raises(errors.CalmError, match=r"can't read .*closed: Permission denied"):
    sources.find([str(tmp_path)])


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
@pytest.mark.parametrize("size", [1, 100, -1])
def test_a_truncated_file_is_an_error(tmp_path: pathlib.Path, suffix: str, size: int):
  path = tmp_path / f"a.jsonl{suffix}"
  path.write_bytes(compress(json_lines([str(i) for i in range(1000)]), suffix)[:size])
  with pytest.raises(errors.CalmError, match=r"can't read .*a\.jsonl.*: Truncated"):
    read(str(path))


def test_text_that_is_not_utf8_is_an_error(tmp_path: pathlib.Path):
  (tmp_path / "a.txt").write_bytes(b"caf\xe9")
  with pytest.raises(errors.CalmError, match=r"can't read .*a\.txt: not UTF-8"):
    read(str(tmp_path))


def test_an_input_without_files_is_an_error(tmp_path: pathlib.Path):
  with pytest.raises(errors.CalmError, match=r"no such file: --input=.* matches nothing"):
    sources.find([f"{tmp_path}/*.txt"])
  with pytest.raises(errors.CalmError, match="no text in --input="):
    sources.find([str(tmp_path)])
  (tmp_path / "a.pdf").touch()
  with pytest.raises(errors.CalmError, match=r"a\.pdf has an unknown suffix: .*\.jsonl, \.parquet"):
    sources.find([f"{tmp_path}/*"])


def test_the_standard_library_yields_over_10_mb_without_tests():
  (name,), spans = sources.find([sources.STDLIB])
  assert name == f"stdlib:python-{platform.python_version()}"
  paths = [pathlib.PurePath(span.path) for span in spans]
  assert not [path for path in paths if {"test", "site-packages"} & set(path.parts[-3:])]
  texts = [item for span in spans for item in readers.documents(span, "text")]
  assert all(isinstance(text, str) for text in texts)
  assert sum(len(str(text).encode()) for text in texts) > 10e6
  # The topics are read as prose, not as the source of a dict.
  assert any(str(text).startswith('The "for" statement') for text in texts)
  assert not any("topics = {'" in str(text) for text in texts)
