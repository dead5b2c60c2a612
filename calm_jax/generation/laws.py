"""Hidden states -> distribution of the next patch of each row, one class per kind of model."""

import math
from collections.abc import Callable
from typing import Any

import jax
from jax import numpy as jnp

from calm_jax import config, errors
from calm_jax.generation import candidates, choosers, requests, rules, temperature
from calm_jax.models import calm, layers
from calm_jax.objectives import autoencoding
from calm_jax.training import trained as trained_lib

# (rows [S], noise of a draw for each [S, *]) -> latents [S, Z].
Draws = Callable[[jax.Array, jax.Array], jax.Array]


class CalmLaw:
  """Distribution of CALM's next patch: samples of the head are decoded, and one is chosen.

  Attributes:
    patch_size: K.
    window: number of patches that the model reads, as many as of an example in training.
    params: parameters, the first argument of the other methods.
  """

  def __init__(self, trained: trained_lib.Trained, sampler: requests.Sampler):
    """Raises CalmError for a sampler that needs a head that reads the temperature."""
    self._require_own_draws(sampler)
    autoencoder = trained.parents["autoencoder"]
    self._model, self._autoencoder = trained.model, autoencoder.model
    self._rule = rules.RULES[sampler.rule]
    # With at_limit=error the choice is not used, so any chooser will do.
    self._chooser = choosers.CHOOSERS.get(sampler.at_limit, choosers.batch)
    self._draws_all = sampler.rule == "none"
    self.patch_size = self._autoencoder.sizes.patch_size
    self.window = trained.run.data.context // self.patch_size - 1
    self.params = (trained.params, autoencoder.params)
    self._reads_latents = trained.run.model.reads_latents

  def _require_own_draws(self, sampler: requests.Sampler) -> None:
    config.require(
      sampler.rule != rules.DIRECT and not sampler.draw_temperature,
      "this model has no head that reads the temperature, which --rule=direct and "
      "--draw_temperature need: train one with python -m calm_jax.main --config=tempered.py:SIZE "
      "--config.calm=WORKDIR, and give its workdir",
    )

  def draw_power(self, value: float) -> float:
    """Returns s of the draws for a text at a temperature."""
    return 1.0

  def powers(self, request: requests.Request) -> tuple[float, float]:
    """Returns s of the draws, and the power to which a race raises their law; see `Wanted`.

    Raises:
      CalmError: for a temperature that can't be reached, or too few candidates for it.
    """
    power, draw_power = temperature.power(request.temperature), self.draw_power(request.temperature)
    race = power / draw_power
    if request.num_candidates < race:
      per = "1/temperature" if draw_power == 1 else "draws' temperature/temperature"
      raise errors.CalmError(
        f"num_candidates must be at least {per} = {race:g}, got {request.num_candidates}"
      )
    return draw_power, race

  def note(self, request: requests.Request) -> str:
    """Returns a line on how a temperature is reached that may not be expected, or ""."""
    return ""

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

  def _draws(self, params, hidden_BD, wanted: candidates.Wanted) -> Draws:
    """Returns the function of draws."""
    head, own = self._model.head, params[0]["head"]
    return _draws_of(head, own, head.condition(own, hidden_BD))

  def choose(
    self, params, hidden_BD, wanted: candidates.Wanted, slots: int, sizes: list[int]
  ) -> candidates.Choice:
    """Returns the next patch of each row, which begins with its tail even if no draw did."""
    latents = self._draws(params, hidden_BD, wanted)

    def draw(row_S, number_S):
      key_S = candidates.keys_of(wanted.key_B[row_S], candidates.DRAW, number_S)
      noise_S = jax.vmap(lambda key: self._model.head.draw_noise(key, ()))(key_S)
      latent_SZ = latents(row_S, noise_S)
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


class TemperedLaw(CalmLaw):
  """Distribution of the next patch of a language model with a tempered head beside its own.

  At T = 1, and for rules other than `direct`, it is that of the language model. With `direct` the
  tempered head draws at the text's temperature, or at its lowest, and a race does the rest.
  """

  def __init__(self, trained: trained_lib.Trained, sampler: requests.Sampler):
    """Raises CalmError if --draw_temperature is outside the trained range."""
    super().__init__(trained.parents["calm"], sampler)
    self._head, self._least = trained.model, trained.run.loss.least_temperature
    self._is_direct, self._draw_temperature = sampler.rule == rules.DIRECT, sampler.draw_temperature
    self.params = (*self.params, trained.params)
    config.require(
      not self._draw_temperature or self._least <= self._draw_temperature <= 1,
      f"--draw_temperature={self._draw_temperature} is outside of what the head was trained for: "
      f"give one in [{self._least:g}, 1]",
    )

  def _require_own_draws(self, sampler: requests.Sampler) -> None:
    """Accepts every sampler."""

  def draw_power(self, value: float) -> float:
    """Returns s of the draws for a text at a temperature."""
    lowest = self._draw_temperature or (self._least if self._is_direct else 1.0)
    return min(temperature.power(value), 1 / lowest)

  def note(self, request: requests.Request) -> str:
    """Returns a line if a temperature is below the trained range, else ""."""
    if not self._is_direct or self._draw_temperature or request.temperature >= self._least:
      return ""
    draw_power, race = self.powers(request)
    return (
      f"temperature {request.temperature:g} is below [{self._least:g}, 1], for which the head was "
      f"trained: races of power {race:.3g} over draws at {1 / draw_power:.3g}"
    )

  def _draws(self, params, hidden_BD, wanted: candidates.Wanted) -> Draws:
    """Returns the function of draws, which computes only the heads that rows need."""
    is_tempered_B = wanted.draw_power_B > 1

    def own(hidden_BD):
      return self._model.head.condition(params[0]["head"], hidden_BD)

    def tempered(hidden_BD):
      return self._head.condition(params[2], hidden_BD, wanted.draw_power_B)

    needs_own = jnp.any(wanted.active_B & ~is_tempered_B)
    needs_tempered = jnp.any(wanted.active_B & is_tempered_B)
    own_condition = _if(needs_own, own, hidden_BD)
    tempered_condition = _if(needs_tempered, tempered, hidden_BD)

    own_draws = _draws_of(self._model.head, params[0]["head"], own_condition)
    tempered_draws = _draws_of(self._head, params[2], tempered_condition)

    def draws(row_S, noise_S):
      own_SZ = _if(needs_own, own_draws, row_S, noise_S)
      tempered_SZ = _if(needs_tempered, tempered_draws, row_S, noise_S)
      return jnp.where(is_tempered_B[row_S][:, None], tempered_SZ, own_SZ)

    return draws


def _draws_of(head, params, condition) -> Draws:
  """Returns the function of draws of a head, given what the samples of each row share."""

  def draws(row_S, noise_S):
    condition_S = jax.tree.map(lambda x: x[row_S], condition)
    return head.samples(params, condition_S, noise_S[None])[0]

  return draws


def _if(condition: jax.Array, function: Callable[..., Any], *arguments: jax.Array) -> Any:
  """Returns function(*arguments), or zeros of its shape if the condition does not hold."""
  shapes = jax.eval_shape(function, *arguments)

  def zeros(*_):
    return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)

  return jax.lax.cond(condition, function, zeros, *arguments)


class TransformerLaw:
  """Distribution of the baseline's next token, P(x)^(1/T) / Σ P^(1/T), sampled exactly."""

  patch_size = 1

  def __init__(self, trained: trained_lib.Trained, sampler: requests.Sampler):
    self._model, self.params = trained.model, trained.params
    self.window = trained.run.data.context - 1

  def powers(self, request: requests.Request) -> tuple[float, float]:
    """Returns 1, and 1/T of a request."""
    return 1.0, temperature.token_power(request.temperature)

  def note(self, request: requests.Request) -> str:
    """Returns "": any temperature is exact."""
    return ""

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
