"""A trained stage -> a folder with our PyTorch module, for transformers to open.

Tensors have the reference's names; torch_module/ holds the module's code.
"""

import importlib.resources

from calm_jax import files
from calm_jax.interchange import export, names, settings, tensors, to_reference

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
  trained, run = request.trained, request.trained.run
  tensors.write_folder(request.folder, to_reference.calm_tensors(trained))
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
  _write(request, values)
  return _CALM_USE
