"""Hidden states -> distribution of the next patch of each row, one class per kind of model."""

import math
from typing import Any

import jax
from jax import numpy as jnp

from calm_jax import errors
from calm_jax.generation import candidates, choosers, requests, rules, temperature
from calm_jax.models import calm, layers
from calm_jax.objectives import autoencoding
from calm_jax.training import trained as trained_lib


class CalmLaw:
  """Distribution of CALM's next patch: samples of the head are decoded, and one is chosen."""

  def __init__(self, trained: trained_lib.Trained, sampler: requests.Sampler):
    autoencoder = trained.parents["autoencoder"]
    self._model, self._autoencoder = trained.model, autoencoder.model
    self._rule = rules.RULES[sampler.rule]
    # With at_limit=error the choice is not used, so any chooser will do.
    self._chooser = choosers.CHOOSERS.get(sampler.at_limit, choosers.batch)
    self._draws_all = sampler.rule == "none"
    self.patch_size = self._autoencoder.sizes.patch_size
    self.params = (trained.params, autoencoder.params)
    self._reads_latents = trained.run.model.reads_latents

  def power(self, request: requests.Request) -> float:
    """Returns s = 1/T of a request.

    Raises:
      CalmError: for a temperature that can't be reached, or too few candidates for it.
    """
    power = temperature.power(request.temperature)
    if request.num_candidates < power:
      raise errors.CalmError(
        f"num_candidates must be at least 1/temperature = {power:g}, got {request.num_candidates}"
      )
    return power

  def least(self, power: float, limit: int) -> int:
    """Returns the smallest number of draws of a patch, given s = 1/T and N = `limit`."""
    return limit if self._draws_all else math.ceil(power)

  def advance(self, params, token_BPK, latent_BPZ, cache):
    """Reads P patches; returns the last hidden state, [B, D], and the extended cache."""
    hidden_BPD, cache = self._model.hidden(params[0], token_BPK, latent_BPZ, cache)
    return hidden_BPD[:, -1], cache

  def latents(self, params, token_BPK, key_B):
    """Returns a draw of each patch's posterior, [B, P, Z]; None if the model reads no latents."""
    if not self._reads_latents:
      return None
    posterior_BPZ = layers.apply(self._autoencoder, params[1], token_BPK, method="encode")
    mean_BPZ, log_std_BPZ = posterior_BPZ

    def draw(key, mean_PZ, log_std_PZ):
      return autoencoding.posterior_draws(key, mean_PZ, log_std_PZ, 1)[0]

    return jax.vmap(draw)(key_B, mean_BPZ, log_std_BPZ)

  def choose(
    self, params, hidden_BD, wanted: candidates.Wanted, slots: int, sizes: list[int]
  ) -> candidates.Choice:
    """Returns the next patch of each row, which begins with its tail even if no draw did."""
    model = self._model
    condition = model.head.condition(params[0]["head"], hidden_BD)

    def draw(row_S, number_S):
      key_S = candidates.keys_of(wanted.key_B[row_S], candidates.DRAW, number_S)
      noise_S = jax.vmap(lambda key: model.head.draw_noise(key, ()))(key_S)
      condition_S = jax.tree.map(lambda x: x[row_S], condition)
      latent_SZ = model.head.samples(params[0]["head"], condition_S, noise_S[None])[0]
      token_SK = calm.decode_tokens(self._autoencoder, params[1], latent_SZ)
      return candidates.Candidate(token_SK, latent_SZ if self._reads_latents else None)

    choice = candidates.choose(wanted, draw, self._rule, self._chooser, slots, sizes)
    in_tail_BK = jnp.arange(self.patch_size)[None] < wanted.length_B[:, None]
    token_BK = jnp.where(in_tail_BK, wanted.tail_BK, choice.patch.token_K)
    latent_BZ = choice.patch.latent_Z
    if latent_BZ is not None:
      is_edited_B = choice.agreed_B == 0  # These tokens were not decoded from a sample.
      key_B = candidates.keys_of(
        wanted.key_B, candidates.POSTERIOR, jnp.zeros_like(wanted.length_B)
      )
      posterior_B1Z: Any = self.latents(params, token_BK[:, None], key_B)
      latent_BZ = jnp.where(is_edited_B[:, None], posterior_B1Z[:, 0], latent_BZ)
    return choice._replace(patch=candidates.Candidate(token_BK, latent_BZ))


class TransformerLaw:
  """Distribution of the baseline's next token, P(x)^(1/T) / Σ P^(1/T), sampled exactly."""

  patch_size = 1

  def __init__(self, trained: trained_lib.Trained, sampler: requests.Sampler):
    self._model, self.params = trained.model, trained.params

  def power(self, request: requests.Request) -> float:
    """Returns 1/T of a request."""
    return temperature.token_power(request.temperature)

  def least(self, power: float, limit: int) -> int:
    """Returns the smallest number of draws of a token: one."""
    return 1

  def advance(self, params, token_BP1, latent, cache):
    """Reads P tokens; returns the last hidden state, [B, D], and the extended cache."""
    hidden_BPD, cache = layers.apply(self._model, params, token_BP1[..., 0], cache, method="hidden")
    return hidden_BPD[:, -1], cache

  def latents(self, params, token_BP1, key_B) -> None:
    """Returns None: tokens have no latents."""

  def choose(
    self, params, hidden_BD, wanted: candidates.Wanted, slots: int, sizes: list[int]
  ) -> candidates.Choice:
    """Returns the next token of each row. With patches of one token, a prompt has no tail."""
    logits_BV = layers.apply(self._model, params, hidden_BD, method="logits")
    zeros_B = jnp.zeros_like(wanted.length_B)
    key_B = candidates.keys_of(wanted.key_B, candidates.DRAW, zeros_B)
    logits_BV = temperature.tempered(logits_BV, wanted.power_B)
    token_B = jax.vmap(jax.random.categorical)(key_B, logits_BV)
    patch = candidates.Candidate(token_B[:, None].astype(jnp.int32), None)
    ones_B = zeros_B + 1
    return candidates.Choice(patch, ones_B > 0, ones_B, ones_B, ones_B, zeros_B)


Law = CalmLaw | TransformerLaw
