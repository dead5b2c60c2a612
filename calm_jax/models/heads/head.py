"""Hidden -> samples: the interface of a generative head."""

import abc
import dataclasses
from typing import Any, ClassVar

import jax
from flax import linen as nn
from jax import numpy as jnp

from calm_jax import config, errors
from calm_jax.figures import Figure
from calm_jax.models import foreign

Params = Any
Posterior = tuple[jax.Array, jax.Array]
Figures = dict[str, jax.Array]


@dataclasses.dataclass(frozen=True)
class Trunk:
  """The model that a head belongs to.

  Attributes:
    width: D, width of the hidden state.
    latent: Z, width of a sample.
    scheme: initial values, see `layers.kernel_init`.
    dtype: type of activations.
    remat: policy of the backward pass, see `models.remat`.
  """

  width: int
  latent: int
  scheme: str
  dtype: Any = jnp.float32
  remat: str = "none"


class Head(abc.ABC):
  """A generative head. A new one is a subclass in a file of its own and a row of `registry.HEADS`.

  An instance is a network of given sizes; its methods are pure functions of parameters. Its class
  methods need the settings alone. The names of the network's layers must match
  `parallel.rules.RULES`.

  Attributes:
    network: the Flax module; smaller weights for generation replace it by a quantized one.
    noise_shape: shape of the noise of one sample.
    loss_unit: unit of the training loss, for reports.
    noise_law: distribution of the noise, for model cards.
    shaping: fields of `config.Head` that determine the shapes of the parameters.
    fewest_steps: the least number of sampling steps, where `config.Head.steps` is not 0.
    onnx_obstacle: why ONNX can't export the head; empty if it can.
    reference_kind: the head's kind in the reference and in our PyTorch module; empty if these
      do not have it. A subclass under another kind is not exported to them.
    figures: the figures that `loss` reports.
  """

  network: nn.Module
  noise_shape: tuple[int, ...]
  loss_unit: ClassVar[str]
  noise_law: ClassVar[str] = "standard normal"
  shaping: ClassVar[tuple[str, ...]] = ("kind", "blocks")
  fewest_steps: ClassVar[int] = 1
  onnx_obstacle: ClassVar[str] = ""
  reference_kind: ClassVar[str] = ""
  figures: ClassVar[tuple[Figure, ...]] = ()

  @abc.abstractmethod
  def __init__(self, sizes: config.Head, trunk: Trunk):
    """Builds the network."""

  @abc.abstractmethod
  def init(self, key: jax.Array) -> Params:
    """Returns initial parameters, float32."""

  @abc.abstractmethod
  def loss(
    self,
    params: Params,
    hidden_PD: jax.Array,
    posterior: Posterior,
    key: jax.Array,
    settings: config.CalmLoss,
  ) -> tuple[jax.Array, Figures]:
    """Training loss per patch of one example, [P] float32, and figures [P] to report with it.

    Lower is better; `loss_unit` is its unit.

    Args:
      posterior: mean and log_std, [P, Z] each, of the patch that each hidden state predicts.
      key: key of the example's noise.
    """

  @abc.abstractmethod
  def draw_noise(self, key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Returns noise [*shape, *noise_shape]."""

  @abc.abstractmethod
  def condition(self, params: Params, hidden_D: jax.Array) -> Any:
    """Returns what all samples of a hidden state share, from hidden states [..., D]: [..., *]."""

  @abc.abstractmethod
  def samples(self, params: Params, condition: Any, noise: jax.Array) -> jax.Array:
    """Returns N latents [N, ..., Z] float32, given `condition` and noise [N, ..., *noise_shape]."""

  def sample(self, params: Params, hidden_D: jax.Array, key: jax.Array, count: int) -> jax.Array:
    """Returns `count` (N) latents [N, ..., Z] float32 of hidden states [..., D].

    The same key gives the same latents.
    """
    noise = self.draw_noise(key, (count, *hidden_D.shape[:-1]))
    return self.samples(params, self.condition(params, hidden_D), noise)

  @classmethod
  @abc.abstractmethod
  def train_flops(cls, sizes: config.Head, width: int, latent: int) -> int:
    """Forward FLOPs of one training sample of a patch, as the reference computes it."""

  @classmethod
  @abc.abstractmethod
  def sampling_flops(cls, sizes: config.Head, width: int, latent: int) -> tuple[int, int]:
    """Forward FLOPs of sampling: once per hidden state, and per sample."""

  @classmethod
  def computed_flops(cls, sizes: config.Head, width: int, latent: int, samples: int) -> float:
    """Training FLOPs of a patch that our program computes for `samples` (N) samples.

    Raises:
      CalmError: for a head whose computed FLOPs are not counted.
    """
    raise errors.CalmError(
      f"computed FLOPs are counted for the energy head only, not for {sizes.kind!r}"
    )

  @classmethod
  def tensors(cls, sizes: config.Head) -> list[foreign.Tensor]:
    """Returns the head's tensors under the reference's names, if it has a `reference_kind`."""
    return []

  @classmethod
  def recognize(cls, folder: foreign.Folder, latent: int) -> dict[str, int] | None:
    """Returns the head's settings in a folder of the reference, None if it holds another head.

    Args:
      latent: Z, of the folder's autoencoder.

    Raises:
      CalmError: for tensors that contradict each other or config.json.
    """
    return None
