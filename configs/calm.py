"""Stage two: the language model over the latents of a trained autoencoder.

  python -m calm_jax.main --config=configs/calm.py:m --config.data.path=DATA \
    --config.autoencoder=RUNS/autoencoder --workdir=RUNS/calm

Sizes after the colon: the published `m`, `l` and `xl` (250k steps of 2M tokens in
contexts of 2048 patches; BrierLM 5.72, 6.58 and 8.53 in the paper, which states no
number of heads for `l` and `xl`: 16 is our choice), and `quickstart` (see
launch/quickstart.sh, which prints its time and figures).
"""

import pathlib
import runpy

from ml_collections import ConfigDict

from calm_jax import config, resolve
from calm_jax.stages import calm

M = calm.Run(model=config.Backbone(layers=16, width=1024, ffn=2752))
L = calm.Run(model=config.Backbone(layers=16, width=1536, ffn=4096))
XL = calm.Run(model=config.Backbone(layers=16, width=2560, ffn=6880))

QUICKSTART = calm.Run(
  data=config.Data(context=256),
  model=config.Backbone(layers=4, width=256, ffn=688, heads=4, kv_heads=4, init="fan_in"),
  head=config.Head(blocks=2, noise=32),
  loss=config.CalmLoss(samples=8, posterior_draws=16),
  # With equally many examples, batches of 4 were better than 8 and 16: see CHANGELOG.md.
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

SIZES = {"m": M, "l": L, "xl": XL, "quickstart": QUICKSTART}
_COMPANIONS = runpy.run_path(str(pathlib.Path(__file__).with_name("autoencoder.py")))["COMPANIONS"]


def get_config(size: str = "m") -> ConfigDict:
  return resolve.to_config_dict(resolve.choose(SIZES, size))


def get_companions(size: str = "m") -> config.Companions:
  return _COMPANIONS.get(size, _COMPANIONS["paper"])
