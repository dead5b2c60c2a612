"""Claims about the act of writing, by its functions and by its command."""

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


def generate(*given: str, code: int = 0, text: str = "") -> subprocess.CompletedProcess[str]:
  command = [sys.executable, "-m", "calm_jax.generate", *given]
  done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240, input=text)
  assert done.returncode == code, done.stderr
  assert "Traceback" not in done.stderr
  return done


def test_a_file_of_prompts_is_written_and_gone_on_with(
  trained_calm: pathlib.Path, tmp_path: pathlib.Path
):
  """Cut in the middle of a line, the file ends as it did whole."""
  asked = [{"prompt": f"The cat {i}" + i * " sat", "seed": i} for i in range(5)]
  asked[1] |= {"temperature": 0.5, "num_candidates": 8, "max_tokens": 5}
  (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(x) + "\n" for x in asked))
  flags = (
    f"--workdir={trained_calm}", f"--prompts={tmp_path}/prompts.jsonl", "--max_tokens=8",
    f"--output={tmp_path}/texts.jsonl", "--batch=2",
  )  # fmt: skip
  told = generate(*flags).stderr
  assert "5 of 5 texts" in told and "tokens/s" in told
  whole = (tmp_path / "texts.jsonl").read_text()
  records = [json.loads(line) for line in whole.splitlines()]
  assert [record["prompt"] for record in records] == [x["prompt"] for x in asked]
  assert [record["tokens"] for record in records] == [8, 5, 8, 8, 8]
  assert all(len(record["draws"]) >= record["tokens"] / 4 for record in records)
  (tmp_path / "texts.jsonl").write_text(whole[: len(whole) // 2])
  assert "resuming" in generate(*flags).stderr
  again = [json.loads(line) for line in (tmp_path / "texts.jsonl").read_text().splitlines()]
  assert [x["text"] for x in again] == [x["text"] for x in records]
  assert not list(tmp_path.glob("*.lease"))
  other = generate(*flags, "--seed=9", "--temperature=0.5", code=2).stderr
  assert "line 1 is no text of these prompts and settings" in other.splitlines()[-1]
  assert "line 1 is no text" in generate(*flags, "--rule=exact", code=2).stderr


def test_lines_of_standard_input_are_gone_on_with(trained_calm: pathlib.Path):
  done = generate(
    f"--workdir={trained_calm}", "--interactive", "--max_tokens=4", text="one\ntwo \\\nthree\n"
  )
  assert done.stdout.startswith("one") and "\ntwo \nthree" in done.stdout


def test_several_texts_of_a_prompt_are_those_of_their_numbers(trained_calm: pathlib.Path):
  flags = (f"--workdir={trained_calm}", "--prompt=The cat sat on", "--max_tokens=8")
  three = generate(*flags, "--num_texts=3")
  assert "--- text 3 of 3" in three.stderr
  assert three.stdout.startswith(generate(*flags).stdout.rstrip("\n"))


@pytest.mark.parametrize(
  ("content", "reason"),
  [
    ("{", "line 1 is no valid JSON"),
    ('{"text": "a"}', 'line 1 has no "prompt"'),
    ('{"prompt": "a"}\n{"prompt": "a", "temprature": 1}', "line 2 .* did you mean 'temperature'"),
    ('{"prompt": "a", "seed": "x"}', "line 1: seed must be a whole number, got 'x'"),
    ("", "holds no prompt"),
    ('{"prompt": "a\u2028b"}\n{', "line 2 is no valid JSON"),
    ('{"prompt": "a"}\n\n', "line 2 is no valid JSON"),
    ('{"prompt": "a"}\n[1]', "line 2 must hold a JSON object, got list"),
    ("[" * 100_000, "line 1 is no valid JSON: nested too deep"),
    ('{"prompt": "a", "seed": 1' + "0" * 5000 + "}", "line 1 is no valid JSON: Exceeds the limit"),
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
    (r'{"prompt": "a", "stop": ["\ud800"]}', r"line 1: a stop string is no text: '\\ud800'"),
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
  with pytest.raises(errors.CalmError, match="line 2 is no valid JSON"):
    prompts.read(str(tmp_path / "prompts.jsonl"), COMMON)


ASKED = [
  {**COMMON, "prompt": prompt, "number": number, "rule": "first", "step": 4}
  for number, prompt in enumerate(('She said "" }', ""))
]
FIRST, SECOND = (prompts.line(wish, {"text": 'a"} \x1b', "tokens": 3}) for wish in ASKED)


@pytest.mark.parametrize("kept", ["", FIRST], ids=["the first line", "the second"])
def test_every_beginning_of_the_next_line_is_cut_and_the_rest_kept(
  kept: str, tmp_path: pathlib.Path
):
  path = tmp_path / "texts.jsonl"
  following = SECOND if kept else FIRST
  for size in range(len(following)):
    path.write_text(kept + following[:size])
    assert prompts.written(str(path), ASKED) == (1 if kept else 0)
    assert path.read_bytes() == kept.encode()
  path.write_text(kept + following)
  assert prompts.written(str(path), ASKED) == (2 if kept else 1)
  assert path.read_text() == kept + following


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
  "a text with no text": prompts.line(ASKED[0], {}).encode(),
  "a carriage return": FIRST.encode() + b"\r",
  "nested too deep": b"[" * 100_000 + b"\n",
  "another line end": FIRST.encode() + SECOND[:-1].encode() + b" \x0b mine \n",
}


@pytest.mark.parametrize("content", NOT_OURS.values(), ids=NOT_OURS.keys())
def test_a_file_that_this_command_did_not_write_is_left_as_it_is(
  content: bytes, tmp_path: pathlib.Path
):
  path = tmp_path / "texts.jsonl"
  path.write_bytes(content)
  with pytest.raises(errors.CalmError, match=r"line \d .*give another --output") as caught:
    prompts.written(str(path), ASKED)
  assert "\n" not in str(caught.value) and path.read_bytes() == content


def test_a_temperature_that_the_model_has_not_is_named_before_anything_is_written(
  trained_calm: pathlib.Path, tmp_path: pathlib.Path
):
  (tmp_path / "prompts.jsonl").write_text('{"prompt": "a"}\n{"prompt": "a", "temperature": 1.5}\n')
  told = generate(
    f"--workdir={trained_calm}", f"--prompts={tmp_path}/prompts.jsonl", "--batch=1",
    f"--output={tmp_path}/texts.jsonl", code=2,
  ).stderr  # fmt: skip
  assert "prompts.jsonl, line 2: CALM's temperature must lie in (0, 1], got 1.5" in told
  assert not (tmp_path / "texts.jsonl").exists()


@pytest.mark.parametrize(
  ("given", "shown"),
  [
    ("a\tb\nc", "a\tb\nc"),
    ("caf\u00e9 \u05d0 \U0001f600", "caf\u00e9 \u05d0 \U0001f600"),
    ("\x1b[2J\r\b\0\x7f", "\\x1b[2J\\r\\x08\\x00\\x7f"),
    ("\x85\x9b31m", "\\x85\\x9b31m"),
    ("\u202ee\u202c \u2066a\u2069", "\\u202ee\\u202c \\u2066a\\u2069"),
    ("\ud800", "\\ud800"),
  ],
)
def test_characters_that_act_are_written_out_for_a_terminal_alone(given: str, shown: str):
  terminal, pipe = io.StringIO(), io.StringIO()
  terminal.isatty = lambda: True
  assert text.for_stream(terminal, given) == shown
  assert text.for_stream(terminal, given, raw=True) == text.for_stream(pipe, given) == given


def test_a_terminal_is_shown_a_prompt_and_its_text_without_what_acts(trained_calm: pathlib.Path):
  ours, theirs = os.openpty()
  command = [sys.executable, "-m", "calm_jax.generate", f"--workdir={trained_calm}", "--prompt=-"]
  with subprocess.Popen(
    [*command, "--max_tokens=4"], cwd=ROOT, stdin=subprocess.PIPE, stdout=theirs
  ) as done:
    done.communicate("\x1b[31mred \u202e".encode(), timeout=240)
  os.close(theirs)
  shown = os.read(ours, 1000)
  os.close(ours)
  assert shown.startswith(rb"\x1b[31mred \u202e") and b"\x1b" not in shown


def test_a_line_that_is_not_utf8_is_told_and_the_next_is_gone_on_with(trained_calm: pathlib.Path):
  command = [sys.executable, "-m", "calm_jax.generate", f"--workdir={trained_calm}"]
  done = subprocess.run(
    [*command, "--interactive", "--max_tokens=4"], cwd=ROOT, capture_output=True, timeout=240,
    input=b"caf\xe9\none\n", env={**os.environ, "PYTHONIOENCODING": "ascii"},
  )  # fmt: skip
  assert done.returncode == 0 and b"error: the prompt is not UTF-8" in done.stderr
  assert done.stdout.startswith(b"one") and b"Traceback" not in done.stderr


def test_the_baseline_takes_the_likeliest_token_as_the_temperature_falls(
  trained_transformer: pathlib.Path,
):
  """Below 1e-38 1/T is beyond float32: the law's limit, not NaN."""
  near, *others = texts(
    str(trained_transformer),
    "float32",
    [
      requests.Request((20, 21), temperature=value, max_tokens=12, seed=seed)
      for seed, value in enumerate((1e-6, 1e-20, 1e-37, 1e-39, 5e-324))
    ],
  )
  assert near.tokens and all(other.text == near.text for other in others)


def texts(directory: str, kind: str, wishes: list[requests.Request]) -> list[session.Text]:
  """What a workdir's model writes, its weights kept as `kind`."""
  trained = precision.WEIGHTS[kind](loading.load(directory))
  decoder = texts_lib.decoder(trained, requests.Sampler(), lambda line: None)
  return session.Session(decoder, workdir.tokenizer(directory, trained.origin)).write(wishes, 4)


WISHES = [
  requests.Request(tuple(range(20, 24 + 4 * i)), 0.5, 16, 24, seed=i, stop=(".",)) for i in range(4)
]


def test_a_mesh_writes_what_one_device_does(trained_calm, trained_transformer):
  for directory in (trained_calm, trained_transformer):
    alone = texts(str(directory), "float32", WISHES)
    with jax.set_mesh(mesh.build(config.Mesh(data=2, fsdp=2, tensor=2))):
      together = texts(str(directory), "float32", WISHES)
    assert [x.text for x in together] == [x.text for x in alone]


def test_a_text_ends_before_a_stop_string(trained_calm: pathlib.Path):
  trained = loading.load(str(trained_calm))
  tokenizer = workdir.tokenizer(str(trained_calm), trained.origin)
  decoder = texts_lib.decoder(trained, requests.Sampler(), lambda line: None)
  (free,) = session.Session(decoder, tokenizer).write([requests.Request((), max_tokens=32)], 2)
  stop = free.text[5:7]
  wish = requests.Request((), max_tokens=32, stop=(stop,))
  (found,) = session.Session(decoder, tokenizer).write([wish], 2)
  assert found.text == free.text[: free.text.index(stop)]


@pytest.mark.parametrize("kind", [x for x in precision.WEIGHTS if x != "float32"])
def test_smaller_weights_draw_nearly_the_same_patches(kind: str, trained_calm: pathlib.Path):
  """With the same noise: the share that differs bounds the laws' total variation."""
  if kind == "int8":
    pytest.importorskip("qwix")
  trained = loading.load(str(trained_calm))
  small = precision.WEIGHTS[kind](trained)
  held = [sum(x.nbytes for x in jax.tree.leaves(one.params)) for one in (trained, small)]
  assert held[1] < 0.6 * held[0]
  token_1PK = np.arange(20, 52, dtype=np.int32).reshape(1, 8, 4)

  def drawn(one):
    hidden_1PD, _ = one.model.hidden(one.params, token_1PK)
    z_N1PZ = one.model.sample(one.params, hidden_1PD, jax.random.key(0), 50)
    return calm.decode_tokens(
      one.parents["autoencoder"].model, one.parents["autoencoder"].params, z_N1PZ
    )

  differs = jnp.any(drawn(trained) != drawn(small), axis=-1)
  assert jnp.mean(differs) < 0.2
  (text,) = texts(str(trained_calm), kind, WISHES[:1])
  assert text.tokens


def test_a_baseline_of_int8_writes(trained_transformer: pathlib.Path):
  pytest.importorskip("qwix")
  (text,) = texts(str(trained_transformer), "int8", WISHES[:1])
  assert text.tokens
