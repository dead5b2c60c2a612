"""Claims about sources: each format gives its documents, whole or in spans, or says why not."""

import gzip
import json
import pathlib
import platform

import pyarrow as pa
import pytest
from pyarrow import parquet

from calm_jax import errors
from calm_jax.data import sources

TEXTS = ["one\r\n\ttab", "  two\n", "drei, 三", "x" * 300]


def read(*inputs: str, part_bytes: int = 10**9, field: str = "text") -> list[sources.Item]:
  _, spans = sources.find(inputs)
  parts = sources.split(spans, part_bytes)
  return [item for part in parts for span in part for item in sources.documents(span, field)]


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


def test_parquet_gives_a_column_and_counts_nulls_as_bad(tmp_path: pathlib.Path):
  path = tmp_path / "a.parquet"
  parquet.write_table(pa.table({"body": [TEXTS[0], None, TEXTS[1]], "n": [1, 2, 3]}), path)
  bad = sources.BadLine(f"{path}:2", "null, not text")
  assert read(str(path), field="body") == [TEXTS[0], bad, TEXTS[1]]
  with pytest.raises(errors.CalmError, match=r"no column 'text' .* but body, n"):
    read(str(path))
  with pytest.raises(errors.CalmError, match=r"'n' of .* holds int64, not text"):
    read(str(path), field="n")


@pytest.mark.parametrize("part_bytes", [1, 7, 50, 100, 350, 10**6])
def test_spans_of_json_lines_give_every_line_once(tmp_path: pathlib.Path, part_bytes: int):
  path = tmp_path / "a.jsonl"
  path.write_bytes(json_lines(TEXTS) + b"\r\nbroken\n" + json_lines(TEXTS))
  bad = sources.BadLine(f"{path}:6", "not JSON (Expecting value at column 1)")
  assert read(str(path), part_bytes=part_bytes) == [*TEXTS, bad, *TEXTS]


def test_small_files_share_a_part_and_a_big_one_is_cut(tmp_path: pathlib.Path):
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
    (b"[" * 100_000, ""),
  ],
)
def test_a_bad_line_is_told_with_its_number(tmp_path: pathlib.Path, line: bytes, reason: str):
  path = tmp_path / "a.jsonl"
  path.write_bytes(json_lines(TEXTS) + line + b"\n" + json_lines(TEXTS[:1]))
  *before, bad, after = read(str(path))
  assert before == TEXTS and after == TEXTS[0]
  assert isinstance(bad, sources.BadLine)
  assert bad.where == f"{path}:5" and reason in bad.reason


def test_a_folder_gives_its_text_files_in_order_and_nothing_hidden(tmp_path: pathlib.Path):
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
@pytest.mark.parametrize("kept", [1, 100, -1])
def test_a_truncated_file_is_an_error(tmp_path: pathlib.Path, suffix: str, kept: int):
  path = tmp_path / f"a.jsonl{suffix}"
  path.write_bytes(compress(json_lines([str(i) for i in range(1000)]), suffix)[:kept])
  with pytest.raises(errors.CalmError, match=r"can't read .*a\.jsonl.*: Truncated"):
    read(str(path))


def test_text_that_is_not_utf8_is_an_error(tmp_path: pathlib.Path):
  (tmp_path / "a.txt").write_bytes(b"caf\xe9")
  with pytest.raises(errors.CalmError, match=r"can't read .*a\.txt: not UTF-8"):
    read(str(tmp_path))


def test_an_input_that_gives_no_files_is_an_error(tmp_path: pathlib.Path):
  with pytest.raises(errors.CalmError, match=r"no such file: --input=.* matches nothing"):
    sources.find([f"{tmp_path}/*.txt"])
  with pytest.raises(errors.CalmError, match="no text in --input="):
    sources.find([str(tmp_path)])
  (tmp_path / "a.pdf").touch()
  with pytest.raises(errors.CalmError, match=r"a\.pdf has a suffix .* \.jsonl, \.parquet, \.txt"):
    sources.find([f"{tmp_path}/*"])


def test_the_standard_library_gives_over_10_mb_without_tests():
  (name,), spans = sources.find([sources.STDLIB])
  assert name == f"stdlib:python-{platform.python_version()}"
  paths = [pathlib.PurePath(span.path) for span in spans]
  assert not [path for path in paths if {"test", "site-packages"} & set(path.parts[-3:])]
  texts = [item for span in spans for item in sources.documents(span, "text")]
  assert all(isinstance(text, str) for text in texts)
  assert sum(len(str(text).encode()) for text in texts) > 10e6
  # The topics are there as prose, and not as the source that holds them.
  assert any(str(text).startswith('The "for" statement') for text in texts)
  assert not any("topics = {'" in str(text) for text in texts)
