"""Stage one: the autoencoder, patches <-> latents.

  python -m calm_jax.main --config=configs/autoencoder.py \
    --config.data.path=DATA --workdir=RUNS/autoencoder

Sizes after the colon: `paper` (the default: the published recipe, 30k steps of
512k tokens; its figures are the paper's) and `quickstart` (see
launch/quickstart.sh, which prints its time and figures).
"""

from ml_collections import ConfigDict

from calm_jax import config, resolve
from calm_jax.stages import autoencoder

PAPER = autoencoder.Run(
  data=config.Data(context=2048),
  optimizer=config.Optimizer(warmup_steps=1000),
  training=config.Training(steps=30_000, batch=256),
)

# Initial weights have std 1/sqrt(fan_in): with the published std of 0.02 a small model
# needs many times as many steps to become near-lossless.
QUICKSTART = autoencoder.Run(
  data=config.Data(context=128),
  model=config.Autoencoder(width=192, ffn=512, latent=64, init="fan_in"),
  optimizer=config.Optimizer(learning_rate=3e-3, warmup_steps=40, schedule="cosine"),
  training=config.Training(
    steps=300,
    batch=32,
    compute_dtype="float32",
    eval_every=100,
    checkpoint_every=100,
  ),
  mesh=config.Mesh(fsdp=1),  # The batch is for one device.
)

SIZES = {"paper": PAPER, "quickstart": QUICKSTART}
# Companions of the sizes of all stages, for `cost`, `compile_ahead` and `benchmark`.
COMPANIONS = {
  "paper": config.Companions(),
  # 1024 tokens are the vocabulary of launch/quickstart.sh.
  "quickstart": config.Companions(1024, {"autoencoder": QUICKSTART}),
}


def get_config(size: str = "paper") -> ConfigDict:
  return resolve.to_config_dict(resolve.choose(SIZES, size))


def get_companions(size: str = "paper") -> config.Companions:
  return COMPANIONS[size]
