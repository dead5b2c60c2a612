"""A trained stage -> ONNX graphs, exported by PyTorch from our module for PyTorch."""

import contextlib
import dataclasses
import importlib
import importlib.util
import logging
import pathlib
import tempfile
import warnings
from typing import Any

from calm_jax import errors, files
from calm_jax.interchange import export, to_torch
from calm_jax.training import trained as trained_lib

OPSET = 18


def _require_packages() -> None:
  missing = [
    name
    for name in ("torch", "transformers", "onnxscript")
    if importlib.util.find_spec(name) is None
  ]
  if missing:
    raise errors.CalmError(f"--format=onnx needs {' and '.join(missing)}: pip install -e '.[onnx]'")


def _open(write: export.Writer, request: export.Export, kind: str) -> Any:
  """Returns the PyTorch model, loaded from a temporary folder in the format `torch`.

  Args:
    write: writer of the format `torch`.
    kind: class of the model in our module for PyTorch.
  """
  import torch
  import transformers

  module = importlib.import_module(f"calm_jax.interchange.torch_module.{to_torch.MODULE}")
  with tempfile.TemporaryDirectory() as folder:
    write(dataclasses.replace(request, folder=pathlib.Path(folder), output=folder))
    with _quiet():
      transformers.utils.logging.disable_progress_bar()
      return getattr(module, kind).from_pretrained(folder, dtype=torch.float32).eval()


@contextlib.contextmanager
def _quiet():
  """Silences the exporter's log on the operators it tries."""
  loggers = [logging.getLogger(name) for name in ("onnx_ir", "torch.onnx")]
  levels = [logger.level for logger in loggers]
  with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    for logger in loggers:
      logger.setLevel(logging.ERROR)
    try:
      yield
    finally:
      for logger, level in zip(loggers, levels, strict=True):
        logger.setLevel(level)


def _export(folder: pathlib.Path, name: str, module, inputs: dict, outputs: list[str]) -> None:
  """Writes a graph.

  Args:
    inputs: name -> (example tensor, {dynamic axis: its name}).
    outputs: names of the results.
  """
  import torch

  examples = tuple(tensor for tensor, _ in inputs.values())
  axes = [
    {axis: torch.export.Dim(name) for axis, name in names.items()} for _, names in inputs.values()
  ]
  with _quiet():
    program = torch.onnx.export(
      module,
      examples,
      dynamic_shapes={"args": tuple(axes)},
      dynamo=True,
      opset_version=OPSET,
      input_names=list(inputs),
      output_names=outputs,
      verbose=False,
    )
    assert program is not None
    program.save(folder / f"{name}.onnx", external_data=True)


def _export_autoencoder(folder: pathlib.Path, model, sizes) -> None:
  import torch

  class Encode(torch.nn.Module):
    def __init__(self):
      super().__init__()
      self.model = model

    def forward(self, *args):
      (token_BK,) = args
      return tuple(self.model.encode(token_BK))

  class Decode(Encode):
    def forward(self, *args):
      (z_BZ,) = args
      return self.model.decode(z_BZ)

  tokens = torch.zeros((2, sizes.patch_size), dtype=torch.int64)
  _export(
    folder,
    "encode",
    Encode(),
    {"tokens": (tokens, {0: "batch"})},
    ["posterior_mean", "posterior_log_std"],
  )
  latents = torch.zeros((2, sizes.latent))
  _export(folder, "decode", Decode(), {"latents": (latents, {0: "batch"})}, ["token_logits"])


def _export_step(
  folder: pathlib.Path, model, trained: trained_lib.Trained, least: float | None
) -> None:
  """Writes next_patch.

  Args:
    least: the lowest temperature of a tempered head, whose graph reads the temperature; else None.
  """
  import torch

  sizes, autoencoder_sizes = trained.run.model, trained.model.sizes
  reads_latents = sizes.reads_latents

  class Past:
    """Keys and values of earlier positions, as a replacement for the module's own cache."""

    def __init__(self, position, past):
      self.position, self.past = position, past
      self.present = []

    def extend(self, layer, *new_BG1C):
      past_BGWC = self.past[2 * layer : 2 * layer + 2]
      present_BGWC = [torch.cat(pair, dim=2) for pair in zip(past_BGWC, new_BG1C, strict=True)]
      self.present += present_BGWC
      return present_BGWC

  class NextPatch(torch.nn.Module):
    def __init__(self):
      super().__init__()
      self.model = model

    def forward(self, *args):
      token_BK, position, noise, *rest = args
      temperature = None if least is None else rest.pop(0)
      latent_B1Z = rest.pop(0)[:, None] if reads_latents else None
      past = Past(position, rest)
      hidden_B1D = self.model.hidden_states(token_BK[:, None], latent_B1Z, past)
      sample_NBZ = self.samples(hidden_B1D[:, 0], noise, temperature)
      token_NBK = self.model.decode(sample_NBZ).argmax(-1)
      return token_NBK, sample_NBZ, *past.present

    def samples(self, hidden_BD, noise, temperature):
      if temperature is None:
        return self.model.samples(hidden_BD, noise)
      return torch.cond(
        temperature < 1,
        lambda *args: self.model.tempered_samples(*args[:2], 1 / args[2].clamp(min=least)),
        lambda *args: self.model.samples(*args[:2]),
        (hidden_BD, noise, temperature),
      )

  head = trained.model.head
  batch, patches, candidates = 2, 3, 4
  inputs: dict[str, Any] = {
    "tokens": (torch.zeros((batch, autoencoder_sizes.patch_size), dtype=torch.int64), {0: "batch"}),
    "position": (torch.tensor(5.0), {}),
    "noise": (torch.zeros((candidates, batch, *head.noise_shape)), {0: "candidates", 1: "batch"}),
  }
  if least is not None:
    inputs["temperature"] = (torch.tensor(0.5), {})
  if reads_latents:
    inputs["latents"] = (torch.zeros((batch, autoencoder_sizes.latent)), {0: "batch"})
  shape = (batch, sizes.kv_heads, patches, sizes.width // sizes.heads)
  names = [f"{kind}_{i}" for i in range(sizes.layers) for kind in ("key", "value")]
  for name in names:
    inputs[f"past_{name}"] = (torch.zeros(shape), {0: "batch", 2: "past"})
  outputs = ["candidate_tokens", "candidate_latents", *(f"present_{name}" for name in names)]
  _export(folder, "next_patch", NextPatch(), inputs, outputs)


def write_autoencoder(request: export.Export) -> str:
  """Writes encode and decode; CalmError if a required package is missing."""
  _require_packages()
  model = _open(to_torch.write_autoencoder, request, "CalmAutoencoder")
  _export_autoencoder(request.folder, model, request.trained.run.model)
  files.write(request.folder / "config.json", files.to_json({"opset": OPSET}))
  return f"{_USE}```\n"


def write_calm(request: export.Export) -> str:
  """Writes encode, decode and next_patch.

  Raises:
    CalmError: if a required package is missing, or for a head with an `onnx_obstacle`, such as
      a long loop: exporting 100 steps took minutes for a toy model.
  """
  return _write_model(request, request.trained, to_torch.write_calm)


def write_tempered(request: export.Export) -> str:
  """Writes encode, decode, and next_patch, which reads the temperature; see `write_calm`."""
  least = request.trained.run.loss.least_temperature
  use = _write_model(request, request.trained.parents["calm"], to_torch.write_tempered, least)
  return use + export.temperature_note(least)


def _write_model(
  request: export.Export,
  trained: trained_lib.Trained,
  write: export.Writer,
  least: float | None = None,
) -> str:
  """Writes a language model, `trained`, that `write` writes as `torch`; see `_export_step`."""
  folder = request.folder
  obstacle = trained.model.head.onnx_obstacle
  if obstacle:
    raise errors.CalmError(
      f"--format=onnx is not for {trained.run.head.kind} heads, {obstacle}: use "
      "--format=stablehlo or --format=torch"
    )
  _require_packages()
  model = _open(write, request, "CalmModel")
  autoencoder_sizes, sizes = trained.model.sizes, trained.run.model
  _export_autoencoder(folder, model.ae_model, autoencoder_sizes)
  _export_step(folder, model, trained, least)
  facts = {
    "opset": OPSET,
    "patch_size": autoencoder_sizes.patch_size,
    "latent_size": autoencoder_sizes.latent,
    "head": trained.run.head.kind,
    "noise_shape": list(trained.model.head.noise_shape),
    "input": sizes.input,
    "layers": sizes.layers,
    "past_shape": ["batch", sizes.kv_heads, "past", sizes.width // sizes.heads],
    "window_patches": trained.run.data.context // autoencoder_sizes.patch_size - 1,
  }
  if least is not None:
    facts["least_temperature"] = least
  files.write(folder / "config.json", files.to_json(facts))
  more = ' | {"latents": mean}' if sizes.reads_latents else ""
  if least is not None:
    more += ' | {"temperature": np.array(temperature, np.float32)}'
  step = _STEP.replace("MORE", more).replace("NOISE", trained.model.head.noise_law)
  return _USE + step


_USE = """ONNX graphs, float32, of any batch size; each `.onnx` file needs its `.onnx.data`.

```python
import json
import pathlib

import numpy as np
import onnxruntime

encode, decode = (
  onnxruntime.InferenceSession(f"FOLDER/{name}.onnx") for name in ("encode", "decode")
)
mean, log_std = encode.run(None, {"tokens": tokens})  # int64 [batch, K] -> [batch, latent]
(logits,) = decode.run(None, {"latents": mean})  # [batch, K, vocabulary]
"""
_STEP = """
# Reads one patch and returns candidates for the next one, one per noise array.
facts = json.loads(pathlib.Path("FOLDER/config.json").read_text())
next_patch = onnxruntime.InferenceSession("FOLDER/next_patch.onnx")
_, groups, _, channels = facts["past_shape"]
empty = np.zeros((len(tokens), groups, 0, channels), np.float32)
names = [f"{kind}_{i}" for i in range(facts["layers"]) for kind in ("key", "value")]
past = {f"past_{name}": empty for name in names}
step = {"tokens": tokens, "position": np.array(0, np.float32), "noise": noise}
candidates, latents, *present = next_patch.run(None, step | pastMORE)
past = dict(zip(past, present))  # For the next call, at position 1.
```

`noise` is [candidates, batch, *noise_shape], see config.json: NOISE. Cut `past`
to the last `window_patches`, the number of patches that the model could see in training."""
