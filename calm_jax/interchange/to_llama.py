"""A workdir of the baseline -> a folder that transformers loads as LlamaForCausalLM."""

import pathlib

from calm_jax import files, workdir
from calm_jax.interchange import companions, names, settings, tensors

_USE = """```python
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained(FOLDER)
```"""


def write(
  trained: workdir.TrainedTransformer, folder: pathlib.Path, source: str, output: str
) -> None:
  """Writes the folder."""
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
  companions.write(folder, trained, source, _USE)
