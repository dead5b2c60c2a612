"""The paper's ablations: one command per row.

  python -m calm_jax.main --config=configs/ablations.py:NAME --config.data.path=DATA \
    --config.autoencoder=AE --workdir=RUNS/NAME

Names that begin with `ae_` are autoencoders (omit --config.autoencoder); their BrierLM
is that of `reference` trained on them. Unless stated otherwise a row is CALM-M trained
for 50k steps of 2M tokens on the published autoencoder, for which `reference` has
BrierLM 4.70. All figures are the paper's.

  regularisation  ae_plain 3.99, ae_kl 3.48, ae_kl_floor 4.13, ae_drop_token 4.55,
                  ae_reference 4.70; ae_kl_weight_0.1 is worse
  latent size     ae_latent_32, _64, _128 (best), _256
  samples N       samples_2 4.37, _4 4.53, _8 4.70, _12 4.72
  draws M         draws_1 4.50, _16 4.56, _100 4.70
  alpha           alpha_0.75 diverges, _1 4.70, _1.25 4.42, _1.5 4.46, _1.75 4.30, _2 0
  input           input_discrete 4.70, _continuous 3.25, _both 4.40
  head            head_energy 4.70, _flow about 4.1, _diffusion about 3.1
  patch size      k_1 7.15, k_2 7.03, k_4 6.58, k_8 5.31: CALM-L, 250k steps, each on
                  its own ae_k_1, ae_k_2, ae_k_4, ae_k_8

`ae_plain` has KL weight 0: the posterior may collapse to a point, but it is still
sampled. The autoencoder with attention is not implemented: the paper found it worse.
"""

import dataclasses
import pathlib
import runpy

from ml_collections import ConfigDict

from calm_jax import config, resolve

_CALM = runpy.run_path(str(pathlib.Path(__file__).with_name("calm.py")))["SIZES"]
_PAPER = runpy.run_path(str(pathlib.Path(__file__).with_name("autoencoder.py")))["PAPER"]
_REFERENCE = dataclasses.replace(
  _CALM["m"], training=dataclasses.replace(_CALM["m"].training, steps=50_000)
)


def _changed(run: config.Run, part: str, **changes) -> config.Run:
  """Returns `run` with settings of one group changed."""
  return dataclasses.replace(run, **{part: dataclasses.replace(getattr(run, part), **changes)})


def _autoencoder(**loss) -> config.Run:
  """Returns the autoencoder with only the regularizers that are named."""
  none = {"kl_weight": 0.0, "kl_floor": 0.0, "drop_token": 0.0, "drop_latent": 0.0}
  return _changed(_PAPER, "loss", **(none | loss))


def _patches_of(k: int) -> config.Run:
  """Returns CALM-L over 2048 patches of K tokens, with 2M tokens per step."""
  run = _changed(_changed(_CALM["l"], "model", patch_size=k), "data", context=2048 * k)
  return _changed(run, "training", batch=_CALM["l"].training.batch * 4 // k)


KL = {"kl_weight": 1e-3}
FLOOR = KL | {"kl_floor": 0.5}
DROP_TOKEN = FLOOR | {"drop_token": 0.15}

ROWS: dict[str, config.Run] = {
  "reference": _REFERENCE,
  "ae_reference": _PAPER,
  "ae_plain": _autoencoder(),
  "ae_kl": _autoencoder(**KL),
  "ae_kl_floor": _autoencoder(**FLOOR),
  "ae_drop_token": _autoencoder(**DROP_TOKEN),
  "ae_kl_weight_0.1": _changed(_PAPER, "loss", kl_weight=0.1),
  **{f"ae_latent_{z}": _changed(_PAPER, "model", latent=z) for z in (32, 64, 128, 256)},
  **{f"samples_{n}": _changed(_REFERENCE, "loss", samples=n) for n in (2, 4, 8, 12)},
  **{f"draws_{m}": _changed(_REFERENCE, "loss", posterior_draws=m) for m in (1, 16, 100)},
  **{
    f"alpha_{alpha:g}": _changed(_REFERENCE, "loss", alpha=alpha)
    for alpha in (0.75, 1.0, 1.25, 1.5, 1.75, 2.0)
  },
  **{
    f"input_{kind}": _changed(_REFERENCE, "model", input=kind)
    for kind in ("discrete", "continuous", "both")
  },
  **{
    f"head_{kind}": _changed(_REFERENCE, "head", kind=kind)
    for kind in ("energy", "flow", "diffusion")
  },
  **{f"ae_k_{k}": _changed(_PAPER, "model", patch_size=k, latent=32 * k) for k in (1, 2, 4, 8)},
  **{f"k_{k}": _patches_of(k) for k in (1, 2, 4, 8)},
}


def get_config(name: str = "reference") -> ConfigDict:
  return resolve.to_config_dict(resolve.choose(ROWS, name))


def get_companions(name: str = "reference") -> config.Companions:
  own = ROWS.get(f"ae_{name}")  # The rows `k_` have their own autoencoders.
  return config.Companions(parents={"autoencoder": own} if own else {})
