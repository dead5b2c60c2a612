"""A trained stage -> a folder with our PyTorch module, for transformers to open.

Tensors have the reference's names; torch_module/ holds the module's code.
"""

import importlib.resources

from calm_jax import files
from calm_jax.interchange import export, names, settings, tensors, to_reference
from calm_jax.training import trained as trained_lib

MODULE = "modeling_calm"

_USE = """```python
from transformers import AutoModel

model = AutoModel.from_pretrained(FOLDER, trust_remote_code=True)
```

The code is `modeling_calm.py` in this folder; it needs only torch and transformers. """
_AUTOENCODER_USE = (
  f"{_USE}`model.encode(tokens)` returns mean and log std of patches [..., K], and\n\
`model.decode(latents)` the logits of their K tokens."
)
_CALM_USE = f"{_USE}`model.generate(tokens,\n\
max_new_tokens)` generates text; `hidden_states`, `draw_noise`, `samples`, `encode` and `decode`\n\
are its parts."
_TEMPERED_USE = """

`model.generate(tokens, max_new_tokens, temperature=T)` makes one draw per patch for T from LEAST
to 1. Below, T must be 1/n, and `num_candidates` draws at T = 1 are compared. `tempered_samples` are
the draws."""


def _auto(kind: str) -> dict[str, str]:
  model = f"Calm{kind}" if kind else "CalmModel"
  return {"AutoConfig": f"{MODULE}.Calm{kind}Config", "AutoModel": f"{MODULE}.{model}"}


def _write(request: export.Export, values: dict) -> None:
  code = importlib.resources.files("calm_jax.interchange") / f"torch_module/{MODULE}.py"
  files.write(request.folder / f"{MODULE}.py", code.read_text(encoding="utf-8"))
  files.write(request.folder / "config.json", files.to_json(values))


def write_autoencoder(request: export.Export) -> str:
  """Writes an autoencoder's folder; see `export.Writer`."""
  trained, folder = request.trained, request.folder
  tensors.write_folder(folder, names.outgoing(trained.params, names.autoencoder(trained.run.model)))
  values = settings.autoencoder(trained) | {
    "model_type": "calm_autoencoder",
    "architectures": ["CalmAutoencoder"],
    "auto_map": _auto("Autoencoder"),
  }
  _write(request, values)
  return _AUTOENCODER_USE


def write_calm(request: export.Export) -> str:
  """Writes a language model's folder; its weights include those of its autoencoder."""
  tensors.write_folder(request.folder, to_reference.calm_tensors(request.trained))
  _write(request, _calm_values(request.trained))
  return _CALM_USE


def write_tempered(request: export.Export) -> str:
  """Writes a tempered head's folder: that of its language model, with the head added."""
  trained, model = request.trained, request.trained.parents["calm"]
  own_tensors = names.outgoing(trained.params, names.tempered(trained.run.head))
  tensors.write_folder(request.folder, [*to_reference.calm_tensors(model), *own_tensors])
  least = trained.run.loss.least_temperature
  _write(request, _calm_values(model) | {"least_temperature": least})
  return _CALM_USE + _TEMPERED_USE.replace("LEAST", f"{least:g}")


def _calm_values(trained: trained_lib.Trained) -> dict:
  """Returns the config.json of a language model."""
  run = trained.run
  values = {
    **settings.calm(trained),
    "eos_token_id": trained.origin.eos_id if trained.origin.appends_eos else None,
    "model_type": "calm",
    "architectures": ["CalmModel"],
    "auto_map": _auto(""),
    "head": run.head.kind,
    "input": run.model.input,
    "autoencoder": settings.autoencoder(trained.parents["autoencoder"]),
  }
  if run.head.steps:
    values["sampling_steps"] = run.head.steps
  return values
