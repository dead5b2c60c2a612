"""Claims about the act of writing, by its functions and by its command."""

import json
import pathlib
import subprocess
import sys

import jax
import numpy as np
import pytest
from jax import numpy as jnp

from calm_jax import config, errors, workdir
from calm_jax.generation import decode, precision, prompts, requests, session
from calm_jax.models import calm
from calm_jax.parallel import mesh

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
  assert "going on" in generate(*flags).stderr
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
    ("{", "line 1 is no JSON"),
    ('{"text": "a"}', 'line 1 is no object with a "prompt"'),
    ('{"prompt": "a"}\n{"prompt": "a", "temprature": 1}', "line 2 .* did you mean 'temperature'"),
    ('{"prompt": "a", "seed": "x"}', "line 1: seed must be a whole number, got 'x'"),
    ("", "holds no prompt"),
    ('{"prompt": "a\u2028b"}\n{', "line 2 is no valid JSON"),
  ],
)
def test_bad_lines_are_named(content: str, reason: str, tmp_path: pathlib.Path):
  (tmp_path / "prompts.jsonl").write_text(content)
  with pytest.raises(errors.CalmError, match=reason):
    prompts.read(str(tmp_path / "prompts.jsonl"), COMMON)


def texts(directory: str, kind: str, wishes: list[requests.Request]) -> list[session.Text]:
  """What a workdir's model writes, its weights kept as `kind`."""
  trained = precision.WEIGHTS[kind](workdir.load(directory))
  decoder = decode.Decoder(trained, requests.Sampler(), lambda line: None)
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
  trained = workdir.load_calm(str(trained_calm))
  tokenizer = workdir.tokenizer(str(trained_calm), trained.origin)
  decoder = decode.Decoder(trained, requests.Sampler(), lambda line: None)
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
  trained = workdir.load_calm(str(trained_calm))
  small = precision.WEIGHTS[kind](trained)
  held = [sum(x.nbytes for x in jax.tree.leaves(one.params)) for one in (trained, small)]
  assert held[1] < 0.6 * held[0]
  token_1PK = np.arange(20, 52, dtype=np.int32).reshape(1, 8, 4)

  def drawn(one):
    hidden_1PD, _ = one.model.hidden(one.params, token_1PK)
    z_N1PZ = one.model.sample(one.params, hidden_1PD, jax.random.key(0), 50)
    return calm.decode_tokens(one.model.autoencoder, one.autoencoder.params, z_N1PZ)

  differs = jnp.any(drawn(trained) != drawn(small), axis=-1)
  assert jnp.mean(differs) < 0.2
  (text,) = texts(str(trained_calm), kind, WISHES[:1])
  assert text.tokens


def test_a_baseline_of_int8_writes(trained_transformer: pathlib.Path):
  pytest.importorskip("qwix")
  (text,) = texts(str(trained_transformer), "int8", WISHES[:1])
  assert text.tokens
