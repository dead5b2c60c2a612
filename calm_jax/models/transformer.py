"""Tokens -> logits: the Llama Transformer that CALM is compared with."""

from collections.abc import Callable
from typing import Any

import jax
from flax import linen as nn
from jax import numpy as jnp

from calm_jax import config
from calm_jax.models import layers, llama, memory
from calm_jax.parallel import mesh


class Transformer(nn.Module):
  """Tokens -> hidden states; the one at token i predicts token i + 1. Untied output layer."""

  sizes: config.Transformer
  vocab_size: int
  dtype: jnp.dtype = jnp.float32
  execution: config.Execution = config.Execution()

  def setup(self):
    sizes = self.sizes
    self.embed = nn.Embed(
      self.vocab_size,
      sizes.width,
      dtype=self.dtype,
      embedding_init=layers.embedding_init(sizes.init, sizes.width),
    )
    self.llama = llama.Llama(sizes, self.dtype, self.execution)
    self.out = nn.Dense(
      self.vocab_size,
      use_bias=False,
      dtype=self.dtype,
      kernel_init=layers.kernel_init(sizes.init),
    )

  def hidden(
    self, token_BS: jax.Array, cache: memory.Memory | None = None
  ) -> tuple[jax.Array, memory.Memory | None]:
    """Returns hidden states [B, S, D] and the cache with the S tokens in it."""
    x_BSD = mesh.constrain(self.embed(token_BS), "batch", "position", None)
    return self.llama(x_BSD, cache)

  def logits(self, hidden_D: jax.Array) -> jax.Array:
    """Returns the logits of the next token, [..., V] float32."""
    return self.out(hidden_D).astype(jnp.float32)

  def __call__(self, token_BS: jax.Array) -> jax.Array:
    """Returns the logits at every token; creates every parameter."""
    return self.logits(self.hidden(token_BS)[0])

  @nn.nowrap  # `function` may copy the module, which a method may not.
  def mapped(self, function: Callable[[Any], Any]) -> Any:
    """Returns the model with `function` applied to each of its linen modules, itself."""
    return function(self)

  def initial(self, key: jax.Array) -> Any:
    """Returns initial parameters, float32."""
    return self.init(key, jnp.zeros((1, 2), jnp.int32))["params"]
