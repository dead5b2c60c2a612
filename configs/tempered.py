"""A tempered head: text at any temperature from one draw per patch.

  python -m calm_jax.main --config=configs/tempered.py:m --config.data.path=DATA \
    --config.calm=RUNS/calm --workdir=RUNS/tempered

Trained on a language model of configs/calm.py, which stays as it is. Sizes after the
colon: those of its published models, `m`, `l` and `xl`, and `quickstart` (see
launch/quickstart.sh).
"""

import dataclasses
import pathlib
import runpy

from ml_collections import ConfigDict

from calm_jax import config, resolve
from calm_jax.stages import tempered

_FOLDER = pathlib.Path(__file__).parent
_CALM = runpy.run_path(str(_FOLDER / "calm.py"))["SIZES"]
_COMPANIONS = runpy.run_path(str(_FOLDER / "autoencoder.py"))["COMPANIONS"]

OPTIMIZER = config.Optimizer(schedule="cosine", weight_decay=0.0)


def _published(size: str) -> tempered.Run:
  return tempered.Run(
    model=_CALM[size].model,
    head=_CALM[size].head,
    optimizer=OPTIMIZER,
    training=config.Training(steps=25_000),
  )


QUICKSTART = tempered.Run(
  data=_CALM["quickstart"].data,
  model=_CALM["quickstart"].model,
  head=_CALM["quickstart"].head,
  loss=tempered.Loss(every=4),
  optimizer=dataclasses.replace(OPTIMIZER, learning_rate=1e-3, warmup_steps=50),
  training=config.Training(
    steps=120,
    batch=4,
    compute_dtype="float32",
    eval_every=120,
    eval_blocks=16,
    checkpoint_every=60,
  ),
  mesh=config.Mesh(fsdp=1),  # The batch is for one device.
)

SIZES = {size: _published(size) for size in ("m", "l", "xl")} | {"quickstart": QUICKSTART}


def get_config(size: str = "m") -> ConfigDict:
  return resolve.to_config_dict(resolve.choose(SIZES, size))


def get_companions(size: str = "m") -> config.Companions:
  companions = _COMPANIONS.get(size, _COMPANIONS["paper"])
  return dataclasses.replace(companions, parents={**companions.parents, "calm": _CALM[size]})
