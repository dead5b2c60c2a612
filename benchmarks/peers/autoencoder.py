"""Stage one in PyTorch: tokens [B, S] -> loss."""

import torch
from torch import nn
from torch.nn import functional

from benchmarks import jobs, torch_parts


class Model(nn.Module):
  """An autoencoder of initial values, and its loss as published."""

  def __init__(self, job: jobs.BenchmarkJob):
    super().__init__()
    self.settings, self.size = job.run.loss, job.run.model.patch_size
    self.ae_model = torch_parts.autoencoder(job.run.model, job.vocab_size)

  def forward(self, token_BS):
    token_BPK, settings = token_BS.unflatten(1, (-1, self.size)), self.settings
    is_dropped_BPK = torch.rand(token_BPK.shape, device=token_BPK.device) < settings.drop_token
    input_BPK = token_BPK.masked_fill(is_dropped_BPK, settings.drop_token_id)
    mean_BPZ, log_std_BPZ = self.ae_model.encode(input_BPK)
    z_BPZ = functional.dropout(torch_parts.draw(mean_BPZ, log_std_BPZ), settings.drop_latent)
    logits_V = self.ae_model.decode(z_BPZ).flatten(0, -2)
    kl_BPZ = 0.5 * (mean_BPZ**2 + (2 * log_std_BPZ).exp() - 1 - 2 * log_std_BPZ)
    kl = kl_BPZ.clamp(min=settings.kl_floor).sum(-1).mean()
    cross_entropy = functional.cross_entropy(logits_V, token_BPK.flatten())
    return self.size * cross_entropy + settings.kl_weight * kl
