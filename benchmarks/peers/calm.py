"""Stage two in PyTorch, the energy head over tokens: tokens [B, S] -> loss; BrierLM's terms."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import transformers
from torch import nn
from torch.nn import functional

from benchmarks import jobs, torch_parts
from calm_jax import errors
from calm_jax.interchange.torch_module import modeling_calm as modeling


class Head(modeling.EnergyHead):
  """The energy head as published, which computes all layers once per sample."""

  def forward(self, hidden_D, noise_NR):
    x_ND = self.norm_noise(self.noise_embd(noise_NR))
    y_ND = self.norm_hidden(self.hidden_embd(hidden_D.expand(len(noise_NR), *hidden_D.shape)))
    block: Any  # A submodule may be a tensor, to the type checker.
    for block in self.mlp_blocks:
      u_ND = block.linears(torch.cat([block.in_ln(x_ND), y_ND], dim=-1))
      gate_ND, up_ND = u_ND.chunk(2, dim=-1)
      x_ND = x_ND + block.down_proj(functional.silu(gate_ND) * up_ND)
    return self.final_layer(x_ND).float()


def _distance(x_Z, alpha):
  return torch.linalg.vector_norm(x_Z, dim=-1) ** alpha


class Model(nn.Module):
  """A language model of initial values over an autoencoder of initial values.

  Raises:
    CalmError: for another head or another input, which are not implemented in PyTorch.
  """

  def __init__(self, job: jobs.BenchmarkJob):
    super().__init__()
    run = job.run
    if run.head.kind != "energy" or run.model.input != "discrete":
      raise errors.CalmError(
        "PyTorch's model has head.kind=energy and model.input=discrete only, got "
        f"{run.head.kind} and {run.model.input}"
      )
    width, sizes = run.model.width, job.parents["autoencoder"].model
    self.settings, self.size, self.noise = run.loss, sizes.patch_size, run.head.noise
    self.ae_model = torch_parts.autoencoder(sizes, job.vocab_size).requires_grad_(False)
    patch = modeling.mlp(sizes.patch_size * width, 2 * width, width)
    self.embed_proj = nn.Sequential(*patch, nn.LayerNorm(width, modeling.EPS))
    positions = run.data.context // sizes.patch_size
    llama = torch_parts.llama(run.model, job.vocab_size, positions)
    self.transformer = transformers.LlamaModel(llama)
    self.generative_head = Head(
      modeling.CalmConfig(
        hidden_size=width,
        latent_size=sizes.latent,
        noise_size=run.head.noise,
        num_mlp_layers=run.head.blocks,
      )
    )
    out: Any = self.generative_head.final_layer
    nn.init.zeros_(out.linears[-1].weight)

  def hidden(self, token_BPK):
    x_BPD = self.embed_proj(self.transformer.embed_tokens(token_BPK).flatten(-2))
    return self.transformer(inputs_embeds=x_BPD).last_hidden_state

  def samples(self, hidden_D, count):
    shape = (count, *hidden_D.shape[:-1], self.noise)
    return self.generative_head(hidden_D, torch.rand(shape, device=hidden_D.device) - 0.5)

  def _two_samples(self, hidden_D):
    """Returns the tokens of two samples, [2, ..., K]."""
    z_NZ = self.samples(hidden_D, 2)
    chunks = [self.ae_model.decode(z_Z).argmax(-1) for z_Z in z_NZ.flatten(0, -2).split(1024)]
    return torch.cat(chunks).reshape(*z_NZ.shape[:-1], -1)

  @torch.no_grad()
  def evaluate(self, token_BPK):
    """Returns Brier-4's term per position, [B, P]; as published, K < 4 costs a pass each."""
    token_2BPK = self._two_samples(self.hidden(token_BPK[:, :-1]))
    target_BPK, spanned = token_BPK[:, 1:], 4 // self.size
    for number in range(1, spanned):
      continuations = []
      for i in range(target_BPK.shape[1]):
        path_BPK = torch.cat(
          [token_BPK[:, : i + 1], token_2BPK[0, :, i].unflatten(-1, (-1, self.size))], dim=1
        )
        continuations.append(self._two_samples(self.hidden(path_BPK)[:, -1]))
      token_2BPK = torch.cat([token_2BPK, torch.stack(continuations, dim=2)], dim=-1)
      following_BPK = token_BPK[:, 1:].roll(-number, 1)
      target_BPK = torch.cat([target_BPK, following_BPK], dim=-1)
    is_right_2BP = (token_2BPK == target_BPK).all(-1)
    return is_right_2BP.float().sum(0) - (token_2BPK[0] == token_2BPK[1]).all(-1).float()

  def forward(self, token_BS):
    token_BPK, settings = token_BS.unflatten(1, (-1, self.size)), self.settings
    with torch.no_grad():
      mean_BPZ, log_std_BPZ = self.ae_model.encode(token_BPK[:, 1:])
    sample_NBPZ = self.samples(self.hidden(token_BPK[:, :-1]), settings.samples)
    target_MBPZ = torch_parts.draw(mean_BPZ, log_std_BPZ, (settings.posterior_draws,))
    count, alpha = settings.samples, settings.alpha
    distance_NNBP = _distance(sample_NBPZ[:, None] - sample_NBPZ[None], alpha)
    repulsion_BP = distance_NNBP.sum((0, 1)) / (count * (count - 1))
    attraction_BP = _distance(sample_NBPZ[:, None] - target_MBPZ[None], alpha).mean((0, 1))
    return (2 * attraction_BP - repulsion_BP).mean()


def evaluation(job: jobs.BenchmarkJob, token_BPK: np.ndarray) -> Callable[[], np.ndarray]:
  """Returns a function that scores a batch with a model of initial values; see `Model.evaluate`."""
  model, tokens = Model(job).eval(), torch.tensor(token_BPK).long()
  return lambda: model.evaluate(tokens).numpy()
