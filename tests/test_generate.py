"""Claims about generate, by its functions and by its command."""

import io
import json
import os
import pathlib
import subprocess
import sys

import jax
import numpy as np
import pytest
from jax import numpy as jnp

from calm_jax import config, errors, workdir
from calm_jax.generation import precision, prompts, requests, session, text
from calm_jax.models import calm
from calm_jax.parallel import mesh
from calm_jax.running import loading
from calm_jax.running import texts as texts_lib

ROOT = pathlib.Path(__file__).parent.parent
COMMON = {"temperature": 1.0, "num_candidates": 8, "max_tokens": 8, "seed": 0, "stop": []}


def generate(*flags: str, code: int = 0, text: str = "") -> subprocess.CompletedProcess[str]:
  command = [sys.executable, "-m", "calm_jax.generate", *flags]
  done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240, input=text)
  assert done.returncode == code, done.stderr
  assert "Traceback" not in done.stderr
  return done


def test_a_file_of_prompts_is_generated_and_resumed(
  trained_calm: pathlib.Path, tmp_path: pathlib.Path
):
  """After truncation inside a line, the resumed file has the same texts."""
  prompt_lines = [{"prompt": f"The cat {i}" + i * " sat", "seed": i} for i in range(5)]
  prompt_lines[1] |= {"temperature": 0.5, "num_candidates": 8, "max_tokens": 5}
  (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(x) + "\n" for x in prompt_lines))
  flags = (
    f"--workdir={trained_calm}",
    f"--prompts={tmp_path}/prompts.jsonl",
    "--max_tokens=8",
    f"--output={tmp_path}/texts.jsonl",
    "--batch=2",
  )
  errors_printed = generate(*flags).stderr
  assert "5 of 5 texts" in errors_printed and "tokens/s" in errors_printed
  whole = (tmp_path / "texts.jsonl").read_text()
  records = [json.loads(line) for line in whole.splitlines()]
  assert [record["prompt"] for record in records] == [x["prompt"] for x in prompt_lines]
  assert [record["tokens"] for record in records] == [8, 5, 8, 8, 8]
  assert all(len(record["draws"]) >= record["tokens"] / 4 for record in records)
  (tmp_path / "texts.jsonl").write_text(whole[: len(whole) // 2])
  assert "resuming" in generate(*flags).stderr
  again = [json.loads(line) for line in (tmp_path / "texts.jsonl").read_text().splitlines()]
  assert [x["text"] for x in again] == [x["text"] for x in records]
  assert not list(tmp_path.glob("*.lease"))
  other = generate(*flags, "--seed=9", "--temperature=0.5", code=2).stderr
  assert "line 1 is not a text of these prompts and settings" in other.splitlines()[-1]
  assert "line 1 is not a text" in generate(*flags, "--rule=exact", code=2).stderr


def test_each_line_of_standard_input_is_continued(trained_calm: pathlib.Path):
  done = generate(
    f"--workdir={trained_calm}", "--interactive", "--max_tokens=4", text="one\ntwo \\\nthree\n"
  )
  assert done.stdout.startswith("one") and "\ntwo \nthree" in done.stdout


def test_the_first_of_several_texts_equals_a_single_text(trained_calm: pathlib.Path):
  flags = (f"--workdir={trained_calm}", "--prompt=The cat sat on", "--max_tokens=8")
  three = generate(*flags, "--num_texts=3")
  assert "--- text 3 of 3" in three.stderr
  assert three.stdout.startswith(generate(*flags).stdout.rstrip("\n"))


@pytest.mark.parametrize(
  ("content", "reason"),
  [
    ("{", "line 1 is not valid JSON"),
    ('{"text": "a"}', 'line 1 has no "prompt"'),
    ('{"prompt": "a"}\n{"prompt": "a", "temprature": 1}', "line 2 .* did you mean 'temperature'"),
    ('{"prompt": "a", "seed": "x"}', "line 1: seed must be a whole number, got 'x'"),
    ("", "holds no prompt"),
    ('{"prompt": "a\u2028b"}\n{', "line 2 is not valid JSON"),
    ('{"prompt": "a"}\n\n', "line 2 is not valid JSON"),
    ('{"prompt": "a"}\n[1]', "line 2 must hold a JSON object, got list"),
    ("[" * 100_000, "line 1 is not valid JSON: nested too deep"),
    ('{"prompt": "a", "seed": 1' + "0" * 5000 + "}", "line 1 is not valid JSON: Exceeds the limit"),
    ('{"prompt": "a", "seed": 1' + "0" * 4000 + "}", r"line 1: seed must lie in \[0, 4294967295\]"),
    ('{"prompt": "a", "seed": -1}', "line 1: seed must lie in .* got -1"),
    ('{"prompt": "a", "seed": true}', "line 1: seed must be a whole number, got True"),
    ('{"prompt": "a", "seed": 1.0}', "line 1: seed must be a whole number, got 1.0"),
    ('{"prompt": "a", "max_tokens": false}', "line 1: max_tokens must be a whole number"),
    ('{"prompt": "a", "max_tokens": 2147483648}', r"max_tokens must lie in \[1, 1073741824\]"),
    ('{"prompt": "a", "max_tokens": 0}', "line 1: max_tokens must lie in .* got 0"),
    ('{"prompt": "a", "num_candidates": 2147483648}', r"num_candidates must lie in \[1, 65536\]"),
    ('{"prompt": "a", "temperature": true}', "line 1: temperature must be a number, got True"),
    ('{"prompt": "a", "temperature": NaN}', "line 1: temperature must be above 0 .* got nan"),
    ('{"prompt": "a", "temperature": Infinity}', "line 1: temperature must be .* got inf"),
    ('{"prompt": "a", "temperature": 0}', "line 1: temperature must be above 0 .* got 0"),
    ('{"prompt": "a", "temperature": 1' + "0" * 400 + "}", "line 1: temperature must be above 0"),
    ('{"prompt": "a", "stop": "b"}', "line 1: stop must be a list of strings, got 'b'"),
    ('{"prompt": "a", "stop": ["b", 1]}', r"stop must be a list of strings, got \['b', 1\]"),
    ('{"prompt": "a", "stop": [""]}', "line 1: a stop string is empty"),
    (r'{"prompt": "a", "stop": ["\ud800"]}', r"line 1: a stop string is not valid text: '\\ud800'"),
    (r'{"prompt": "a\udfff"}', "line 1: the prompt holds half of a surrogate pair"),
    ('{"prompt": ["a"]}', r"line 1: prompt must be a string, got \['a'\]"),
    ('{"prompt": "a", "\\u001b[2J": 1}', r"line 1 has '\\x1b\[2J': known: "),
  ],
)
def test_bad_lines_are_named(content: str, reason: str, tmp_path: pathlib.Path):
  (tmp_path / "prompts.jsonl").write_text(content)
  with pytest.raises(errors.CalmError, match=reason) as caught:
    prompts.read(str(tmp_path / "prompts.jsonl"), COMMON)
  assert "\n" not in str(caught.value) and len(str(caught.value)) < 1000


def test_prompts_that_are_not_utf8_are_named(tmp_path: pathlib.Path):
  (tmp_path / "prompts.jsonl").write_bytes(b'{"prompt": "a"}\n{"prompt": "caf\xe9"}')
  with pytest.raises(errors.CalmError, match="line 2 is not valid JSON"):
    prompts.read(str(tmp_path / "prompts.jsonl"), COMMON)


BATCH = [
  {**COMMON, "prompt": prompt, "number": number, "rule": "first", "step": 4}
  for number, prompt in enumerate(('She said "" }', ""))
]
FIRST, SECOND = (prompts.line(request, {"text": 'a"} \x1b', "tokens": 3}) for request in BATCH)


@pytest.mark.parametrize("complete", ["", FIRST], ids=["the first line", "the second"])
def test_an_incomplete_last_line_is_removed_and_complete_lines_are_kept(
  complete: str, tmp_path: pathlib.Path
):
  path = tmp_path / "texts.jsonl"
  following = SECOND if complete else FIRST
  for size in range(len(following)):
    path.write_text(complete + following[:size])
    assert prompts.written(str(path), BATCH) == (1 if complete else 0)
    assert path.read_bytes() == complete.encode()
  path.write_text(complete + following)
  assert prompts.written(str(path), BATCH) == (2 if complete else 1)
  assert path.read_text() == complete + following


NOT_OURS = {
  "a line of someone": b"my only copy of a letter",
  "a line without an end": b'{"text": "mine"}',
  "another prompt, cut": FIRST[:-3].replace("She", "He").encode(),
  "other settings, cut": FIRST[:-3].replace('"seed": 0', '"seed": 1').encode(),
  "another step, cut": FIRST[:-3].replace('"step": 4', '"step": 5').encode(),
  "no UTF-8": b"caf\xe9",
  "zeros": FIRST.encode() + b"\0" * 64,
  "a third, begun": (FIRST + SECOND + FIRST[:9]).encode(),
  "a third, whole": (FIRST + SECOND + FIRST).encode(),
  "an empty line": b"\n",
  "a text with no text": prompts.line(BATCH[0], {}).encode(),
  "a carriage return": FIRST.encode() + b"\r",
  "nested too deep": b"[" * 100_000 + b"\n",
  "another line end": FIRST.encode() + SECOND[:-1].encode() + b" \x0b mine \n",
}


@pytest.mark.parametrize("content", NOT_OURS.values(), ids=NOT_OURS.keys())
def test_a_file_of_another_command_is_not_changed(content: bytes, tmp_path: pathlib.Path):
  path = tmp_path / "texts.jsonl"
  path.write_bytes(content)
  with pytest.raises(errors.CalmError, match=r"line \d .*give another --output") as caught:
    prompts.written(str(path), BATCH)
  assert "\n" not in str(caught.value) and path.read_bytes() == content


def test_an_unsupported_temperature_is_refused_before_the_output_is_written(
  trained_calm: pathlib.Path, tmp_path: pathlib.Path
):
  (tmp_path / "prompts.jsonl").write_text('{"prompt": "a"}\n{"prompt": "a", "temperature": 1.5}\n')
  errors_printed = generate(
    f"--workdir={trained_calm}",
    f"--prompts={tmp_path}/prompts.jsonl",
    "--batch=1",
    f"--output={tmp_path}/texts.jsonl",
    code=2,
  ).stderr
  assert "prompts.jsonl, line 2: CALM's temperature must lie in (0, 1], got 1.5" in errors_printed
  assert not (tmp_path / "texts.jsonl").exists()


@pytest.mark.parametrize(
  ("content", "shown"),
  [
    ("a\tb\nc", "a\tb\nc"),
    ("caf\u00e9 \u05d0 \U0001f600", "caf\u00e9 \u05d0 \U0001f600"),
    ("\x1b[2J\r\b\0\x7f", "\\x1b[2J\\r\\x08\\x00\\x7f"),
    ("\x85\x9b31m", "\\x85\\x9b31m"),
    ("\u202ee\u202c \u2066a\u2069", "\\u202ee\\u202c \\u2066a\\u2069"),
    ("\ud800", "\\ud800"),
  ],
)
def test_control_characters_are_escaped_only_for_terminals(content: str, shown: str):
  terminal, pipe = io.StringIO(), io.StringIO()
  terminal.isatty = lambda: True
  assert text.for_stream(terminal, content) == shown
  assert text.for_stream(terminal, content, raw=True) == text.for_stream(pipe, content) == content


def test_a_terminal_shows_prompt_and_text_without_control_characters(trained_calm: pathlib.Path):
  reader, terminal_end = os.openpty()
  command = [sys.executable, "-m", "calm_jax.generate", f"--workdir={trained_calm}", "--prompt=-"]
  with subprocess.Popen(
    [*command, "--max_tokens=4"], cwd=ROOT, stdin=subprocess.PIPE, stdout=terminal_end
  ) as done:
    done.communicate("\x1b[31mred \u202e".encode(), timeout=240)
  os.close(terminal_end)
  shown = os.read(reader, 1000)
  os.close(reader)
  assert shown.startswith(rb"\x1b[31mred \u202e") and b"\x1b" not in shown


def test_a_line_that_is_not_utf8_is_reported_and_the_next_one_is_continued(
  trained_calm: pathlib.Path,
):
  command = [sys.executable, "-m", "calm_jax.generate", f"--workdir={trained_calm}"]
  done = subprocess.run(
    [*command, "--interactive", "--max_tokens=4"],
    cwd=ROOT,
    capture_output=True,
    timeout=240,
    input=b"caf\xe9\none\n",
    env={**os.environ, "PYTHONIOENCODING": "ascii"},
  )
  assert done.returncode == 0 and b"error: the prompt is not UTF-8" in done.stderr
  assert done.stdout.startswith(b"one") and b"Traceback" not in done.stderr


def test_the_baseline_takes_the_most_likely_token_at_temperatures_near_zero(
  trained_transformer: pathlib.Path,
):
  """Below T = 1e-38, 1/T exceeds float32: the limit is used, not NaN."""
  near, *others = texts(
    str(trained_transformer),
    "float32",
    [
      requests.Request((20, 21), temperature=value, max_tokens=12, seed=seed)
      for seed, value in enumerate((1e-6, 1e-20, 1e-37, 1e-39, 5e-324))
    ],
  )
  assert near.tokens and all(other.text == near.text for other in others)


def texts(directory: str, kind: str, batch: list[requests.Request]) -> list[session.Text]:
  """Returns the texts of a workdir's model, with its weights in the number format `kind`."""
  trained = precision.WEIGHTS[kind](loading.load(directory))
  decoder = texts_lib.decoder(trained, requests.Sampler(), lambda line: None)
  return session.Session(decoder, workdir.tokenizer(directory, trained.origin)).write(batch, 4)


REQUESTS = [
  requests.Request(tuple(range(20, 24 + 4 * i)), 0.5, 16, 24, seed=i, stop=(".",)) for i in range(4)
]


def test_a_mesh_generates_the_same_texts_as_one_device(trained_calm, trained_transformer):
  for directory in (trained_calm, trained_transformer):
    one_device = texts(str(directory), "float32", REQUESTS)
    with jax.set_mesh(mesh.build(config.Mesh(data=2, fsdp=2, tensor=2))):
      eight_devices = texts(str(directory), "float32", REQUESTS)
    assert [x.text for x in eight_devices] == [x.text for x in one_device]


def test_a_text_ends_before_a_stop_string(trained_calm: pathlib.Path):
  trained = loading.load(str(trained_calm))
  tokenizer = workdir.tokenizer(str(trained_calm), trained.origin)
  decoder = texts_lib.decoder(trained, requests.Sampler(), lambda line: None)
  (unstopped,) = session.Session(decoder, tokenizer).write([requests.Request((), max_tokens=32)], 2)
  stop = unstopped.text[5:7]
  request = requests.Request((), max_tokens=32, stop=(stop,))
  (result,) = session.Session(decoder, tokenizer).write([request], 2)
  assert result.text == unstopped.text[: unstopped.text.index(stop)]


@pytest.mark.parametrize("kind", [x for x in precision.WEIGHTS if x != "float32"])
def test_smaller_weights_sample_nearly_the_same_patches(kind: str, trained_calm: pathlib.Path):
  """With the same noise; the differing share bounds the distributions' total variation."""
  if kind == "int8":
    pytest.importorskip("qwix")
  trained = loading.load(str(trained_calm))
  small = precision.WEIGHTS[kind](trained)
  num_bytes = [sum(x.nbytes for x in jax.tree.leaves(stage.params)) for stage in (trained, small)]
  assert num_bytes[1] < 0.6 * num_bytes[0]
  token_1PK = np.arange(20, 52, dtype=np.int32).reshape(1, 8, 4)

  def sample_tokens(stage):
    hidden_1PD, _ = stage.model.hidden(stage.params, token_1PK)
    z_N1PZ = stage.model.sample(stage.params, hidden_1PD, jax.random.key(0), 50)
    return calm.decode_tokens(
      stage.parents["autoencoder"].model, stage.parents["autoencoder"].params, z_N1PZ
    )

  differs = jnp.any(sample_tokens(trained) != sample_tokens(small), axis=-1)
  assert jnp.mean(differs) < 0.2
  (text,) = texts(str(trained_calm), kind, REQUESTS[:1])
  assert text.tokens


def test_a_baseline_with_int8_weights_generates(trained_transformer: pathlib.Path):
  pytest.importorskip("qwix")
  (text,) = texts(str(trained_transformer), "int8", REQUESTS[:1])
  assert text.tokens
