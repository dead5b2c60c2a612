"""The baseline: a Llama that predicts the next token, for comparison with CALM.

  python -m calm_jax.main --config=configs/transformer.py:s --config.data.path=DATA \
    --workdir=RUNS/transformer

Sizes after the colon: the published `s`, `m` and `l` (250k steps of 2M tokens in
contexts of 2048; BrierLM 6.05, 7.07 and 8.98 in the paper, which states no number of
heads for `l`: 16 is our choice), and `quickstart`, with the same Transformer layers as
`configs/calm.py:quickstart`.
"""

import pathlib
import runpy

from ml_collections import ConfigDict

from calm_jax import config, resolve
from calm_jax.stages import transformer

S = transformer.Run(model=config.Transformer(layers=12, width=768, ffn=2048))
M = transformer.Run(model=config.Transformer(layers=16, width=1024, ffn=2752))
L = transformer.Run(model=config.Transformer(layers=16, width=1536, ffn=4096))

QUICKSTART = transformer.Run(
  data=config.Data(context=256),
  model=config.Transformer(layers=4, width=256, ffn=688, heads=4, kv_heads=4, init="fan_in"),
  optimizer=config.Optimizer(learning_rate=1e-3, warmup_steps=150, schedule="cosine"),
  training=config.Training(
    steps=1500,
    batch=4,
    compute_dtype="float32",
    eval_every=250,
    eval_blocks=32,
    checkpoint_every=250,
  ),
  mesh=config.Mesh(fsdp=1),  # The batch is for one device.
)

SIZES = {"s": S, "m": M, "l": L, "quickstart": QUICKSTART}
_COMPANIONS = runpy.run_path(str(pathlib.Path(__file__).with_name("autoencoder.py")))["COMPANIONS"]


def get_config(size: str = "s") -> ConfigDict:
  return resolve.to_config_dict(resolve.choose(SIZES, size))


def get_companions(size: str = "s") -> config.Companions:
  return _COMPANIONS.get(size, _COMPANIONS["paper"])
