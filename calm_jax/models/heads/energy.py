"""Hidden -> samples: the energy head, one pass of the network per sample."""

import dataclasses
from collections.abc import Callable

import jax
from flax import linen as nn
from jax import numpy as jnp

from calm_jax import config
from calm_jax.figures import HIGHER, LOWER, Figure
from calm_jax.kernels import dense
from calm_jax.models import foreign, layers, remat
from calm_jax.models.heads import head
from calm_jax.objectives import energy_score
from calm_jax.parallel import mesh


class Block(nn.Module):
  """x + Linear(SwiGLU-like MLP of [LayerNorm(x), y]): [N, ..., D], [..., D] -> [N, ..., D].

  The first Linear of the paper reads the concatenation of x and the condition y. Here it
  is two matrices, because y is the same for all N samples: `condition` computes its half
  once, not N times.
  """

  width: int
  scheme: str
  dtype: jnp.dtype

  def setup(self):
    def linear(features, **kwargs):
      return layers.linear(None, features, self.scheme, self.dtype, **kwargs)

    self.norm = layers.layer_norm(None, self.dtype)
    self.sample_in = linear(self.width, bias=False, share=0.5)
    self.hidden_in = linear(self.width, share=0.5)
    self.middle = linear(self.width)
    self.gate_up = linear(2 * self.width)
    self.down = linear(self.width)

  def condition(self, y_D: jax.Array) -> jax.Array:
    """Returns y's half of the first Linear, which all samples share: [..., D]."""
    return mesh.constrain(self.hidden_in(y_D), "position", "width")

  def __call__(self, x_ND: jax.Array, condition_D: jax.Array) -> jax.Array:
    def along(x_ND, axis=None):
      return mesh.constrain(x_ND, "position", axis)

    u_ND = self.sample_in(self.norm(x_ND)) + condition_D[None]
    u_ND = along(self.middle(nn.silu(along(u_ND, "width"))))
    gate_ND, up_ND = jnp.split(along(self.gate_up(nn.silu(u_ND)), "width"), 2, axis=-1)
    return along(x_ND + self.down(nn.silu(gate_ND) * up_ND))


def _along(x_ND: jax.Array) -> jax.Array:
  return mesh.constrain(x_ND, "position", None)


class Network(nn.Module):
  """Hidden states and noise -> samples, in one pass: [..., D], [N, ..., R] -> [N, ..., Z]."""

  sizes: config.Head
  width: int
  latent: int
  scheme: str
  dtype: jnp.dtype
  remat: str

  def setup(self):
    def linear(features):
      return layers.linear(None, features, self.scheme, self.dtype)

    self.noise_in, self.noise_norm = linear(self.width), layers.layer_norm(None, self.dtype)
    self.hidden_in, self.hidden_norm = linear(self.width), layers.layer_norm(None, self.dtype)
    block = remat.wrapped(Block, self.remat)
    self.blocks = [
      block(self.width, self.scheme, self.dtype, name=f"block_{i}")
      for i in range(self.sizes.blocks)
    ]
    self.norm, self.middle = layers.layer_norm(None, self.dtype), linear(self.width)
    zeros = nn.initializers.zeros_init()
    self.out = nn.Dense(
      self.latent, dtype=self.dtype, kernel_init=zeros, dot_general=dense.dot_general
    )

  def condition(self, hidden_D: jax.Array) -> list[jax.Array]:
    """Returns what all samples of a hidden state share: one array [..., D] per block."""
    y_D = self.hidden_norm(_along(self.hidden_in(hidden_D)))
    return [block.condition(y_D) for block in self.blocks]

  def predict(self, condition: list[jax.Array], noise_NR: jax.Array) -> jax.Array:
    """Returns N samples [N, ..., Z] float32, given `condition`."""
    x_ND = self.noise_norm(_along(self.noise_in(noise_NR)))
    for block, condition_D in zip(self.blocks, condition, strict=True):
      x_ND = block(x_ND, condition_D)
    x_ND = nn.silu(_along(self.middle(self.norm(x_ND))))
    return _along(self.out(x_ND)).astype(jnp.float32)

  def __call__(self, hidden_D: jax.Array, noise_NR: jax.Array) -> jax.Array:
    """Returns samples of hidden states [..., D]; creates every parameter."""
    return self.predict(self.condition(hidden_D), noise_NR)


def _drawn(key, sample_NPZ, mean_PZ, std_PZ, settings: config.CalmLoss) -> jax.Array:
  count = settings.posterior_draws
  return energy_score.drawn_attraction(key, sample_NPZ, mean_PZ, std_PZ, count, settings.alpha)


def _expected(key, sample_NPZ, mean_PZ, std_PZ, settings: config.CalmLoss) -> jax.Array:
  return energy_score.expected_attraction(sample_NPZ, mean_PZ, std_PZ, settings.alpha)


# How samples are compared with the posterior, by `settings.targets`.
TARGETS: dict[str, Callable[..., jax.Array]] = {"draws": _drawn, "exact": _expected}

# The head's name in the reference, and in its older checkpoints.
NAME, OLDER_NAME = "generative_head", "mlp_generator"


class EnergyHead(head.Head):
  """Turns uniform noise into samples of the next latent, given the hidden state.

  Source: CALM (arXiv:2510.27688), section 4.3.
  """

  loss_unit = "latent unit^alpha"
  noise_law = "uniform in [-0.5, 0.5)"
  shaping = ("kind", "blocks", "noise")
  reference_kind = "energy"
  figures = (
    Figure("attraction", "Attraction, sample to target", loss_unit, LOWER, console="value"),
    Figure("repulsion", "Repulsion, sample to sample", loss_unit, HIGHER, console="value"),
  )

  def __init__(self, sizes: config.Head, trunk: head.Trunk):
    self.network = Network(sizes, **dataclasses.asdict(trunk))
    self.width, self.noise_shape = trunk.width, (sizes.noise,)

  def init(self, key: jax.Array) -> head.Params:
    """Returns initial parameters, float32, with which every sample is zero."""
    noise_1R = jnp.zeros((1, *self.noise_shape))
    return self.network.init(key, jnp.zeros((self.width,)), noise_1R)["params"]

  def loss(
    self,
    params: head.Params,
    hidden_PD: jax.Array,
    posterior: head.Posterior,
    key: jax.Array,
    settings: config.CalmLoss,
  ) -> tuple[jax.Array, head.Figures]:
    """Energy loss of N samples against the posterior, [P]; see `energy_score.energy_loss`."""
    sample_key, target_key = jax.random.split(key)
    sample_NPZ = self.sample(params, hidden_PD, sample_key, settings.samples)
    mean_PZ, log_std_PZ = posterior
    attraction_P = TARGETS[settings.targets](
      target_key, sample_NPZ, mean_PZ, jnp.exp(log_std_PZ), settings
    )
    energy_P, repulsion_P = energy_score.energy_loss(sample_NPZ, attraction_P, settings.alpha)
    return energy_P, {"attraction": attraction_P, "repulsion": repulsion_P}

  def draw_noise(self, key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Returns uniform noise [*shape, R] in [-0.5, 0.5)."""
    return jax.random.uniform(key, (*shape, *self.noise_shape), minval=-0.5, maxval=0.5)

  def condition(self, params: head.Params, hidden_D: jax.Array) -> list[jax.Array]:
    """Returns what all samples of hidden states [..., D] share: one array [..., D] per block."""
    return layers.apply(self.network, params, hidden_D, method="condition")

  def samples(self, params: head.Params, condition: list[jax.Array], noise: jax.Array) -> jax.Array:
    """Returns N latents [N, ..., Z] float32, given `condition` and noise [N, ..., R]."""
    return layers.apply(self.network, params, condition, noise, method="predict")

  @classmethod
  def train_flops(cls, sizes: config.Head, width: int, latent: int) -> int:
    """Forward FLOPs of one training sample of a patch, as the reference computes it.

    The reference computes both halves of each block's first Linear for every sample; we
    compute the hidden state's half once, see `computed_flops`.
    """
    block = 2 * width * (2 * width + width + 2 * width + width)
    return sizes.blocks * block + 2 * width * (sizes.noise + width + width + latent)

  @classmethod
  def sampling_flops(cls, sizes: config.Head, width: int, latent: int) -> tuple[int, int]:
    """Forward FLOPs of sampling: once per hidden state, and per sample."""
    shared = 2 * width * width * (sizes.blocks + 1)
    block = 2 * width * (width + width + 2 * width + width)
    return shared, sizes.blocks * block + 2 * width * (sizes.noise + width + latent)

  @classmethod
  def computed_flops(cls, sizes: config.Head, width: int, latent: int, samples: int) -> float:
    """Training FLOPs of a patch that our program computes for `samples` (N) samples.

    The hidden state's part is computed once, and noise needs no gradient.
    """
    once, per_sample = cls.sampling_flops(sizes, width, latent)
    noise_gradient = 2 * sizes.noise * width
    return 3 * (once + samples * per_sample) - samples * noise_gradient

  @classmethod
  def tensors(cls, sizes: config.Head) -> list[foreign.Tensor]:
    """Returns the head's tensors under the reference's names."""
    linear, norm = foreign.linear, foreign.norm
    result = linear(f"{NAME}.noise_embd", "head/noise_in")
    result += linear(f"{NAME}.hidden_embd", "head/hidden_in")
    result += norm(f"{NAME}.norm_noise", "head/noise_norm", bias=True)
    result += norm(f"{NAME}.norm_hidden", "head/hidden_norm", bias=True)
    for i in range(sizes.blocks):
      result += _block_tensors(f"{NAME}.mlp_blocks.{i}", f"head/block_{i}")
    result += norm(f"{NAME}.final_layer.in_ln", "head/norm", bias=True)
    result += linear(f"{NAME}.final_layer.linears.0", "head/middle")
    result += linear(f"{NAME}.final_layer.linears.2", "head/out")
    return [dataclasses.replace(t, also=(t.name.replace(NAME, OLDER_NAME),)) for t in result]

  @classmethod
  def recognize(cls, folder: foreign.Folder, latent: int) -> dict[str, int] | None:
    """Returns the head's settings in a folder of the reference, None if it holds another head."""
    if not any(x.startswith((f"{NAME}.mlp_blocks.", f"{OLDER_NAME}.")) for x in folder.tensors):
      return None
    blocks = folder.count(*(f"{name}.mlp_blocks" for name in (NAME, OLDER_NAME)))
    inputs = (f"{name}.noise_embd.weight" for name in (NAME, OLDER_NAME))
    noise = folder.matrix(*inputs)[1].shape[1]
    folder.settings.require(num_mlp_layers=blocks, noise_size=noise)
    return {"blocks": blocks, "noise": noise}


def _block_tensors(name: str, path: str) -> list[foreign.Tensor]:
  """Returns the tensors of a block. The reference holds the first Linear as one matrix."""
  halves = (f"{path}/sample_in/kernel", f"{path}/hidden_in/kernel")
  return [
    *foreign.norm(f"{name}.in_ln", f"{path}/norm", bias=True),
    foreign.Tensor(f"{name}.linears.0.weight", halves, transposed=True),
    foreign.Tensor(f"{name}.linears.0.bias", (f"{path}/hidden_in/bias",)),
    *foreign.linear(f"{name}.linears.2", f"{path}/middle"),
    *foreign.linear(f"{name}.linears.4", f"{path}/gate_up"),
    *foreign.linear(f"{name}.down_proj", f"{path}/down"),
  ]
