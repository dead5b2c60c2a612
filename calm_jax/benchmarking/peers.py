"""The same training steps in PyTorch, as contenders: Llama of transformers, no line of ours around.

What the published code computes, as it computes it: the hidden state goes through the
head once a sample, distances are those of a whole (N, M, P, Z) tensor, logits are whole.
Weights have the published names, so that ours can be put in.
"""

import contextlib
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import transformers
from torch import nn
from torch.nn import functional

from calm_jax import config
from calm_jax.benchmarking import contenders
from calm_jax.interchange.torch_module import modeling_calm as modeling


def _codec(sizes: config.Autoencoder, vocab_size: int) -> modeling.CalmAutoencoder:
  return modeling.CalmAutoencoder(
    modeling.CalmAutoencoderConfig(
      patch_size=sizes.patch_size,
      vocab_size=vocab_size,
      hidden_size=sizes.width,
      intermediate_size=sizes.ffn,
      latent_size=sizes.latent,
      num_encoder_layers=sizes.encoder_layers,
      num_decoder_layers=sizes.decoder_layers,
    )
  )


def _llama(sizes: config.Transformer, vocab_size: int, positions: int) -> Any:
  known: dict[str, Any] = {"attn_implementation": "sdpa"}  # As a dict: it is no declared argument.
  return transformers.LlamaConfig(
    vocab_size=vocab_size,
    hidden_size=sizes.width,
    intermediate_size=sizes.ffn,
    num_hidden_layers=sizes.layers,
    num_attention_heads=sizes.heads,
    num_key_value_heads=sizes.kv_heads,
    max_position_embeddings=positions,
    rms_norm_eps=1e-6,
    use_cache=False,
    tie_word_embeddings=False,
    **known,
  )


def _draw(mean, log_std, shape=()):
  return mean + log_std.exp() * torch.randn(*shape, *mean.shape, device=mean.device)


class Autoencoder(nn.Module):
  """Tokens [B, S] -> stage one's loss."""

  def __init__(self, job: contenders.Job):
    super().__init__()
    assert isinstance(job.run, config.AutoencoderRun)
    self.settings, self.size = job.run.loss, job.run.model.patch_size
    self.ae_model = _codec(job.run.model, job.vocab_size)

  def forward(self, token_BS):
    token_BPK, settings = token_BS.unflatten(1, (-1, self.size)), self.settings
    dropped_BPK = torch.rand(token_BPK.shape, device=token_BPK.device) < settings.drop_token
    read_BPK = token_BPK.masked_fill(dropped_BPK, settings.drop_token_id)
    mean_BPZ, log_std_BPZ = self.ae_model.encode(read_BPK)
    z_BPZ = functional.dropout(_draw(mean_BPZ, log_std_BPZ), settings.drop_latent)
    logits_V = self.ae_model.decode(z_BPZ).flatten(0, -2)
    kl_BPZ = 0.5 * (mean_BPZ**2 + (2 * log_std_BPZ).exp() - 1 - 2 * log_std_BPZ)
    kl = kl_BPZ.clamp(min=settings.kl_floor).sum(-1).mean()
    return self.size * functional.cross_entropy(logits_V, token_BPK.flatten()) + (
      settings.kl_weight * kl
    )


class Head(modeling.EnergyHead):
  """The energy head as published: what reads the hidden state is computed once a sample."""

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


class Calm(nn.Module):
  """Tokens [B, S] -> stage two's loss, with the energy head and tokens as input."""

  def __init__(self, job: contenders.Job):
    super().__init__()
    run = job.run
    assert isinstance(run, config.CalmRun)
    if run.head.kind != "energy" or run.model.input != "discrete":
      raise ValueError("only the energy head over tokens is written in PyTorch")
    width, codec = run.model.width, job.codec
    self.settings, self.size, self.noise = run.loss, codec.patch_size, run.head.noise
    self.ae_model = _codec(codec, job.vocab_size).requires_grad_(False)
    patch = modeling.mlp(codec.patch_size * width, 2 * width, width)
    self.embed_proj = nn.Sequential(*patch, nn.LayerNorm(width, modeling.EPS))
    positions = run.data.context // codec.patch_size
    self.transformer = transformers.LlamaModel(_llama(run.model, job.vocab_size, positions))
    self.generative_head = Head(
      modeling.CalmConfig(
        hidden_size=width, latent_size=codec.latent, noise_size=run.head.noise,
        num_mlp_layers=run.head.blocks,
      )
    )  # fmt: skip
    out: Any = self.generative_head.final_layer
    nn.init.zeros_(out.linears[-1].weight)

  def hidden(self, token_BPK):
    x_BPD = self.embed_proj(self.transformer.embed_tokens(token_BPK).flatten(-2))
    return self.transformer(inputs_embeds=x_BPD).last_hidden_state

  def samples(self, hidden_D, count):
    shape = (count, *hidden_D.shape[:-1], self.noise)
    return self.generative_head(hidden_D, torch.rand(shape, device=hidden_D.device) - 0.5)

  def _two(self, hidden_D):
    """Two samples' tokens: [2, ..., K]."""
    z_NZ = self.samples(hidden_D, 2)
    chunks = [self.ae_model.decode(z_Z).argmax(-1) for z_Z in z_NZ.flatten(0, -2).split(1024)]
    return torch.cat(chunks).reshape(*z_NZ.shape[:-1], -1)

  @torch.no_grad()
  def evaluate(self, token_BPK):
    """Returns Brier-4's terms of each position; below K = 4 by a pass for each, as published."""
    token_2BPK = self._two(self.hidden(token_BPK[:, :-1]))
    target_BPK, places = token_BPK[:, 1:], 4 // self.size
    for number in range(1, places):
      last = []
      for i in range(target_BPK.shape[1]):
        path_BPK = torch.cat(
          [token_BPK[:, : i + 1], token_2BPK[0, :, i].unflatten(-1, (-1, self.size))], dim=1
        )
        last.append(self._two(self.hidden(path_BPK)[:, -1]))
      token_2BPK = torch.cat([token_2BPK, torch.stack(last, dim=2)], dim=-1)
      following_BPK = token_BPK[:, 1:].roll(-number, 1)
      target_BPK = torch.cat([target_BPK, following_BPK], dim=-1)
    right_2BP = (token_2BPK == target_BPK).all(-1)
    return right_2BP.float().sum(0) - (token_2BPK[0] == token_2BPK[1]).all(-1).float()

  def forward(self, token_BS):
    token_BPK, settings = token_BS.unflatten(1, (-1, self.size)), self.settings
    with torch.no_grad():
      mean_BPZ, log_std_BPZ = self.ae_model.encode(token_BPK[:, 1:])
    sample_NBPZ = self.samples(self.hidden(token_BPK[:, :-1]), settings.samples)
    target_MBPZ = _draw(mean_BPZ, log_std_BPZ, (settings.posterior_draws,))
    count, alpha = settings.samples, settings.alpha
    among_NNBP = _distance(sample_NBPZ[:, None] - sample_NBPZ[None], alpha)
    repulsion_BP = among_NNBP.sum((0, 1)) / (count * (count - 1))
    attraction_BP = _distance(sample_NBPZ[:, None] - target_MBPZ[None], alpha).mean((0, 1))
    return (2 * attraction_BP - repulsion_BP).mean()


class Transformer(nn.Module):
  """Tokens [B, S] -> the baseline's cross-entropy."""

  def __init__(self, job: contenders.Job):
    super().__init__()
    assert isinstance(job.run, config.TransformerRun)
    sizes = _llama(job.run.model, job.vocab_size, job.run.data.context)
    self.llama = transformers.LlamaForCausalLM(sizes)

  def forward(self, token_BS):
    return self.llama(input_ids=token_BS, labels=token_BS).loss


MODELS = {"autoencoder": Autoencoder, "calm": Calm, "transformer": Transformer}


class Steps:
  """A plain loop's steps: forward, backward, clip, AdamW. Batches are on the device already."""

  def __init__(self, job: contenders.Job, compiled: bool):
    run, settings = job.run, job.run.optimizer
    torch.manual_seed(run.training.seed)
    self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    self._parts, self._clip = run.training.accumulation, settings.clip_norm
    self._half = run.training.compute_dtype == "bfloat16"
    model = MODELS[run.stage](job).to(self._device).train()
    self._params = [p for p in model.parameters() if p.requires_grad]
    groups = [
      {"params": [p for p in self._params if p.dim() > 1], "weight_decay": settings.weight_decay},
      {"params": [p for p in self._params if p.dim() <= 1], "weight_decay": 0.0},
    ]
    self._optimizer = torch.optim.AdamW(
      groups, settings.learning_rate, (settings.b1, settings.b2), settings.eps, fused=True
    )
    self._loss = torch.compile(model) if compiled else model
    shape = (run.training.batch, run.data.context)
    self._tokens = torch.randint(0, job.vocab_size, shape, device=self._device)

  def dispatch(self) -> Callable[[], None] | None:
    for part in self._tokens.chunk(self._parts):
      context = contextlib.nullcontext()
      if self._half:
        context = torch.autocast(self._device.type, dtype=torch.bfloat16)
      with context:
        loss = self._loss(part) / self._parts
      loss.backward()
    nn.utils.clip_grad_norm_(self._params, self._clip)
    self._optimizer.step()
    self._optimizer.zero_grad(set_to_none=True)
    if self._device.type == "cpu":
      return None
    event = torch.cuda.Event()
    event.record()
    return event.synchronize

  def facts(self) -> dict[str, Any]:
    cuda = self._device.type == "cuda"
    return {
      "platform": self._device.type,
      "device": torch.cuda.get_device_name() if cuda else "cpu",
      "devices": 1,
      "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
      "peak_bytes": torch.cuda.max_memory_allocated() if cuda else None,
    }


def evaluation(job: contenders.Job, token_BPK: np.ndarray) -> Callable[[], np.ndarray]:
  """Returns what scores a batch by stage two's model of initial values; see `Calm.evaluate`."""
  model, tokens = Calm(job).eval(), torch.tensor(token_BPK).long()
  return lambda: model.evaluate(tokens).numpy()
