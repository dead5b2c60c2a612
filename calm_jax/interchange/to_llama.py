"""A trained baseline -> a folder that transformers loads as LlamaForCausalLM."""

from calm_jax import files
from calm_jax.interchange import export, names, settings, tensors

_USE = """```python
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained(FOLDER)
```"""


def write(request: export.Export) -> str:
  """Writes the folder; see `export.Writer`."""
  trained, folder = request.trained, request.folder
  run, eos = trained.run, trained.origin.eos_id
  tensors.write_folder(folder, names.outgoing(trained.params, names.transformer(run.model)))
  values = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": trained.origin.vocab_size,
    "max_position_embeddings": run.data.context,
    "bos_token_id": None,
    "eos_token_id": eos,
    **settings.transformer(run.model),
  }
  files.write(folder / "config.json", files.to_json(values))
  files.write(folder / "generation_config.json", files.to_json({"eos_token_id": eos}))
  return _USE
