"""Tokens -> patches -> latents -> hidden -> samples -> tokens: CALM in PyTorch, in one file.

Continuous autoregressive language models (Shao, Li, Meng, Zhou: arXiv:2510.27688), as
exported by calm_jax. Needs torch >= 2.4 and transformers:

  model = AutoModel.from_pretrained(folder, trust_remote_code=True)
  new_S = model.generate(token_S, max_new_tokens=64, temperature=0.5)

A tensor's name ends in its shape: B batch, S tokens, P patches, K tokens per patch,
V vocabulary, E autoencoder width, Z latent, D model width, H query heads, G key/value
heads, C head channels, J patches in view, R noise, N samples.
"""

import collections
import itertools
import math
import operator

import torch
from torch import nn
from torch.nn import functional
from transformers import PretrainedConfig, PreTrainedModel

EPS = 1e-6  # Epsilon of every LayerNorm.
LEVELS, MAX_BETA = 1000, 0.999  # Noise levels, and the largest beta of a level.
FREQUENCIES, MAX_PERIOD = 128, 10_000.0  # Sinusoidal embedding of time.
POWER_FREQUENCIES, POWER_WIDTH = (1.0, 2.0, 4.0, 8.0), 64  # Embedding of 1/temperature.
DECODE_CHUNK = 256  # Patches whose logits [K, V] are in memory at once.

AUTOENCODER_DEFAULTS = {
  "patch_size": 4,  # K, tokens per patch.
  "vocab_size": 128256,  # V
  "hidden_size": 512,  # E
  "intermediate_size": 1280,  # Inner width of each SwiGLU.
  "latent_size": 128,  # Z
  "num_encoder_layers": 2,
  "num_decoder_layers": 2,
  "rms_norm_eps": 1e-6,
}

CALM_DEFAULTS = {
  "patch_size": 4,  # K, tokens per patch.
  "vocab_size": 128256,  # V
  "hidden_size": 1024,  # D
  "intermediate_size": 2752,  # Inner width of each SwiGLU.
  "num_hidden_layers": 16,
  "num_attention_heads": 16,  # H
  "num_key_value_heads": 16,  # G
  "rope_theta": 10000.0,
  "rms_norm_eps": 1e-6,
  "latent_size": 128,  # Z
  "noise_size": 64,  # R, of the energy head.
  "num_mlp_layers": 4,  # Blocks of the head.
  "head": "energy",  # Or "flow", or "diffusion".
  "sampling_steps": 0,  # Midpoint steps of flow, steps of diffusion; 0: the head's default.
  "input": "discrete",  # Tokens; or "continuous", latents; or "both".
  "max_position_embeddings": 2048,  # Patches.
  "least_temperature": 1.0,  # Below 1: a second head draws at temperatures from it to 1.
  "eos_token_id": None,  # Without one, texts end at their maximum length only.
  "autoencoder": {},  # The settings of AUTOENCODER_DEFAULTS.
}


def configure(config, defaults, settings):
  """Initializes a config from `settings`, and from `defaults` where they have no value."""
  PretrainedConfig.__init__(
    config, **{name: value for name, value in settings.items() if name not in defaults}
  )
  for name, default in defaults.items():
    setattr(config, name, settings.get(name, default))


class CalmAutoencoderConfig(PretrainedConfig):
  """Sizes of the autoencoder, see `AUTOENCODER_DEFAULTS`."""

  model_type = "calm_autoencoder"

  def __init__(self, **settings):
    configure(self, AUTOENCODER_DEFAULTS, settings)


class CalmConfig(PretrainedConfig):
  """Sizes of the language model and of its autoencoder, see `CALM_DEFAULTS`."""

  model_type = "calm"

  def __init__(self, **settings):
    configure(self, CALM_DEFAULTS, settings)


def mlp(inputs, width, outputs):
  """Returns Linear, SiLU, Linear: [..., inputs] -> [..., outputs]."""
  return nn.Sequential(nn.Linear(inputs, width), nn.SiLU(), nn.Linear(width, outputs))


def named(**modules):
  """Returns a sequence of modules under these names."""
  return nn.Sequential(collections.OrderedDict(modules))


class SwiGLU(nn.Module):
  """down(SiLU(gate x) · up x), no biases: [..., D] -> [..., D]."""

  def __init__(self, width, inner):
    super().__init__()
    self.gate_proj = nn.Linear(width, inner, bias=False)
    self.up_proj = nn.Linear(width, inner, bias=False)
    self.down_proj = nn.Linear(inner, width, bias=False)

  def forward(self, x_D):
    return self.down_proj(functional.silu(self.gate_proj(x_D)) * self.up_proj(x_D))


class Residual(nn.Module):
  """x + SwiGLU(RMSNorm(x)): [..., E] -> [..., E]."""

  def __init__(self, config):
    super().__init__()
    self.layernorm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
    self.mlp = SwiGLU(config.hidden_size, config.intermediate_size)

  def forward(self, x_E):
    return x_E + self.mlp(self.layernorm(x_E))


class Encoder(nn.Module):
  """Tokens [..., K] -> mean and log std of the posterior, concatenated, [..., 2Z]."""

  def __init__(self, config):
    super().__init__()
    width, self.middle = config.hidden_size, config.num_encoder_layers // 2
    self.embed_tokens = nn.Embedding(config.vocab_size, width)
    self.encoder_layers = nn.ModuleList(Residual(config) for _ in range(2 * self.middle))
    self.squeeze_layer = nn.Linear(config.patch_size * width, width)
    self.norm = nn.RMSNorm(width, config.rms_norm_eps)
    self.hidden_to_latent = nn.Linear(width, 2 * config.latent_size)

  def forward(self, token_K):
    x_KE = self.embed_tokens(token_K)
    for layer in self.encoder_layers[: self.middle]:
      x_KE = layer(x_KE)
    x_E = self.squeeze_layer(x_KE.flatten(-2))
    for layer in self.encoder_layers[self.middle :]:
      x_E = layer(x_E)
    return self.hidden_to_latent(self.norm(x_E))


class Decoder(nn.Module):
  """Latents [..., Z] -> features [..., K, E], which the token table maps to logits."""

  def __init__(self, config):
    super().__init__()
    width, self.middle = config.hidden_size, config.num_decoder_layers // 2
    self.patch_size = config.patch_size
    self.latent_to_hidden = nn.Linear(config.latent_size, width)
    self.decoder_layers = nn.ModuleList(Residual(config) for _ in range(2 * self.middle))
    self.expand_layer = nn.Linear(width, config.patch_size * width)
    self.norm = nn.RMSNorm(width, config.rms_norm_eps)

  def forward(self, z_Z):
    x_E = self.latent_to_hidden(z_Z.to(self.latent_to_hidden.weight.dtype))
    for layer in self.decoder_layers[: self.middle]:
      x_E = layer(x_E)
    x_KE = self.expand_layer(x_E).unflatten(-1, (self.patch_size, -1))
    for layer in self.decoder_layers[self.middle :]:
      x_KE = layer(x_KE)
    return self.norm(x_KE)


class CalmAutoencoder(PreTrainedModel):
  """Encodes each patch of K tokens into a latent of Z numbers, and decodes it."""

  config_class, _supports_sdpa = CalmAutoencoderConfig, True

  def __init__(self, config):
    super().__init__(config)
    self.encoder, self.decoder = Encoder(config), Decoder(config)
    self.post_init()

  def encode(self, token_K):
    """Returns the posterior of patches [..., K]: mean and log std, [..., Z] float32 each."""
    return self.encoder(token_K).float().chunk(2, dim=-1)

  def decode(self, z_Z):
    """Returns the logits of the K tokens of each latent: [..., Z] -> [..., K, V] float32."""
    return functional.linear(self.decoder(z_Z), self.encoder.embed_tokens.weight).float()

  def forward(self, token_K):
    """Returns the logits at the posterior's mean: [..., K] -> [..., K, V]."""
    return self.decode(self.encode(token_K)[0])


class Cache:
  """Rotated keys and values of the last `window` patches: [B, G, J, C] per layer."""

  def __init__(self, window):
    self.window, self.position, self.layers = window, 0, {}

  def extend(self, layer, *new_BGPC):
    """Appends keys and values of P patches to a layer; returns all keys and values of the layer."""
    cached_BGJC = self.layers.get(layer, [new[:, :, :0] for new in new_BGPC])
    all_BGJC = [torch.cat(pair, dim=2) for pair in zip(cached_BGJC, new_BGPC, strict=True)]
    if new_BGPC[0].shape[2] > 1 and all_BGJC[0].shape[2] > self.window:
      raise ValueError(f"{all_BGJC[0].shape[2]} patches don't fit a cache of {self.window}")
    self.layers[layer] = [x_BGJC[:, :, -self.window :] for x_BGJC in all_BGJC]
    return self.layers[layer]


def rotate(x_BHPC, angle_Pc):
  """Applies rotary positions to [B, H, P, C]; channel i is paired with i + C/2."""
  a_BHPc, b_BHPc = x_BHPC.float().chunk(2, dim=-1)
  cos_Pc, sin_Pc = angle_Pc.cos(), angle_Pc.sin()
  pair = (a_BHPc * cos_Pc - b_BHPc * sin_Pc, b_BHPc * cos_Pc + a_BHPc * sin_Pc)
  return torch.cat(pair, dim=-1).to(x_BHPC.dtype)


class Attention(nn.Module):
  """Causal attention over patches; groups of query heads share keys and values."""

  def __init__(self, config, number):
    super().__init__()
    width, self.number = config.hidden_size, number
    self.heads, self.groups = config.num_attention_heads, config.num_key_value_heads
    kv_width = self.groups * (width // self.heads)
    self.q_proj = nn.Linear(width, width, bias=False)
    self.k_proj = nn.Linear(width, kv_width, bias=False)
    self.v_proj = nn.Linear(width, kv_width, bias=False)
    self.o_proj = nn.Linear(width, width, bias=False)

  def forward(self, x_BPD, angle_Pc, cache):
    def project(linear, heads):
      return linear(x_BPD).unflatten(-1, (heads, -1)).transpose(1, 2)

    query_BHPC = rotate(project(self.q_proj, self.heads), angle_Pc)
    key_BGJC = rotate(project(self.k_proj, self.groups), angle_Pc)
    value_BGJC = project(self.v_proj, self.groups)
    if cache is not None:
      key_BGJC, value_BGJC = cache.extend(self.number, key_BGJC, value_BGJC)
    patches, in_view, mask_PJ = query_BHPC.shape[2], key_BGJC.shape[2], None
    if 1 < patches < in_view:  # A single patch, the last one, attends to all.
      mask_PJ = x_BPD.new_ones(patches, in_view, dtype=torch.bool).tril(in_view - patches)
    key_BHJC, value_BHJC = (
      x_BGJC.repeat_interleave(self.heads // self.groups, dim=1)
      for x_BGJC in (key_BGJC, value_BGJC)
    )
    y_BHPC = functional.scaled_dot_product_attention(
      query_BHPC, key_BHJC, value_BHJC, mask_PJ, is_causal=patches > 1 and mask_PJ is None
    )
    return self.o_proj(y_BHPC.transpose(1, 2).flatten(2))


class Layer(nn.Module):
  """One Llama layer: [B, P, D] -> [B, P, D]."""

  def __init__(self, config, number):
    super().__init__()
    self.input_layernorm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
    self.self_attn = Attention(config, number)
    self.post_attention_layernorm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
    self.mlp = SwiGLU(config.hidden_size, config.intermediate_size)

  def forward(self, x_BPD, angle_Pc, cache):
    x_BPD = x_BPD + self.self_attn(self.input_layernorm(x_BPD), angle_Pc, cache)
    return x_BPD + self.mlp(self.post_attention_layernorm(x_BPD))


class Transformer(nn.Module):
  """Llama's layers over patches and the final norm; also holds the token table."""

  def __init__(self, config):
    super().__init__()
    if config.input != "continuous":
      self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
    self.layers = nn.ModuleList(Layer(config, i) for i in range(config.num_hidden_layers))
    self.norm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
    self.theta = config.rope_theta
    self.half_channels = config.hidden_size // config.num_attention_heads // 2

  def forward(self, x_BPD, cache):
    options = {"dtype": torch.float32, "device": x_BPD.device}
    position_P = torch.arange(x_BPD.shape[1], **options) + (cache.position if cache else 0)
    exponent_c = torch.arange(self.half_channels, **options) / self.half_channels
    angle_Pc = position_P[:, None] * self.theta**-exponent_c
    for layer in self.layers:
      x_BPD = layer(x_BPD, angle_Pc, cache)
    if cache:
      cache.position += x_BPD.shape[1]
    return self.norm(x_BPD)


class EnergyBlock(nn.Module):
  """x + MLP([LayerNorm(x), y]), where the product with y is computed once for all N samples."""

  def __init__(self, width):
    super().__init__()
    self.in_ln = nn.LayerNorm(width, EPS)
    self.linears = nn.Sequential(
      *mlp(2 * width, width, width), nn.SiLU(), nn.Linear(width, 2 * width)
    )
    self.down_proj = nn.Linear(width, width)

  def forward(self, x_ND, y_D):
    weight, bias_D = self.linears[0].parameters()
    sample_DD, hidden_DD = weight.chunk(2, dim=1)
    u_D = functional.linear(y_D, hidden_DD, bias_D)
    u_ND = functional.linear(self.in_ln(x_ND), sample_DD) + u_D
    gate_ND, up_ND = self.linears[1:](u_ND).chunk(2, dim=-1)
    return x_ND + self.down_proj(functional.silu(gate_ND) * up_ND)


class EnergyHead(nn.Module):
  """Hidden [..., D] and noise [N, ..., R] -> samples [N, ..., Z] float32, in one pass."""

  draw = staticmethod(lambda shape, **where: torch.rand(shape, **where) - 0.5)

  def __init__(self, config):
    super().__init__()
    width, self.noise_shape = config.hidden_size, (config.noise_size,)
    self.noise_embd, self.hidden_embd = nn.Linear(*self.noise_shape, width), nn.Linear(width, width)
    self.norm_noise, self.norm_hidden = nn.LayerNorm(width, EPS), nn.LayerNorm(width, EPS)
    self.mlp_blocks = nn.ModuleList(EnergyBlock(width) for _ in range(config.num_mlp_layers))
    self.final_layer = named(
      in_ln=nn.LayerNorm(width, EPS), linears=mlp(width, width, config.latent_size)
    )

  def forward(self, hidden_D, noise_NR):
    x_ND = self.norm_noise(self.noise_embd(noise_NR.to(hidden_D.dtype)))
    y_D = self.norm_hidden(self.hidden_embd(hidden_D))
    for block in self.mlp_blocks:
      x_ND = block(x_ND, y_D)
    return self.final_layer(x_ND).float()


def sinusoid(time):
  """Returns the cosines, then the sines, of times in [0, 1000): [...] -> [..., 256] float32."""
  index = torch.arange(FREQUENCIES, dtype=torch.float32, device=time.device)
  angle = time.float()[..., None] * torch.exp(-math.log(MAX_PERIOD) / FREQUENCIES * index)
  return torch.cat([angle.cos(), angle.sin()], dim=-1)


class DenoiserBlock(nn.Module):
  """x + gate · MLP(modulated LayerNorm(x)): x and state, both [N, ..., D] -> [N, ..., D]."""

  def __init__(self, width):
    super().__init__()
    self.in_ln = nn.LayerNorm(width, EPS)
    self.mlp = mlp(width, width, width)
    self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 3 * width))

  def forward(self, x_ND, state_ND):
    shift_ND, scale_ND, gate_ND = self.adaLN_modulation(state_ND).chunk(3, dim=-1)
    return x_ND + gate_ND * self.mlp(self.in_ln(x_ND) * (1 + scale_ND) + shift_ND)


class Denoiser(nn.Module):
  """Noised latents [N, ..., Z], hidden [..., D], times [N, ...] -> [N, ..., outputs] float32."""

  def __init__(self, config, outputs):
    super().__init__()
    width = config.hidden_size
    self.time_embed = named(mlp=mlp(2 * FREQUENCIES, width, width))
    self.cond_embed = nn.Linear(width, width)
    self.input_proj = nn.Linear(config.latent_size, width)
    self.res_blocks = nn.ModuleList(DenoiserBlock(width) for _ in range(config.num_mlp_layers))
    modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))
    linear = nn.Linear(width, outputs)
    self.final_layer = nn.ModuleDict({"adaLN_modulation": modulation, "linear": linear})

  def forward(self, x_NZ, hidden_D, time_N):
    condition_D = self.cond_embed(hidden_D)
    state_ND = self.time_embed(sinusoid(time_N).to(condition_D.dtype)) + condition_D
    x_ND = self.input_proj(x_NZ.to(hidden_D.dtype))
    for block in self.res_blocks:
      x_ND = block(x_ND, state_ND)
    shift_ND, scale_ND = self.final_layer["adaLN_modulation"](state_ND).chunk(2, dim=-1)
    y_ND = functional.layer_norm(x_ND, x_ND.shape[-1:], eps=EPS) * (1 + scale_ND) + shift_ND
    return self.final_layer["linear"](y_ND).float()


class PowerEmbedding(nn.Module):
  """Powers 1/temperature [...] -> what the tempered head adds to the hidden state, [..., D]."""

  def __init__(self, width):
    super().__init__()
    self.mlp = mlp(1 + 2 * len(POWER_FREQUENCIES), POWER_WIDTH, width)

  def forward(self, power):
    log_1 = power.float().log()[..., None]
    angle = torch.cat([frequency * log_1 for frequency in POWER_FREQUENCIES], dim=-1)
    features = torch.cat([log_1, angle.sin(), angle.cos() - 1], dim=-1)
    return self.mlp(features.to(next(self.parameters()).dtype))


class FlowHead(nn.Module):
  """Hidden [..., D] and noise [N, ..., Z] -> samples [N, ..., Z] by the midpoint rule.

  The network takes floor(1000 t) for a time t in [0, 1), and returns dx/dt.
  """

  draw = staticmethod(torch.randn)

  def __init__(self, config):
    super().__init__()
    self.net = Denoiser(config, config.latent_size)
    self.steps, self.noise_shape = config.sampling_steps or 10, (config.latent_size,)

  def forward(self, hidden_D, noise_NZ):
    def slope(x_NZ, half_steps):
      time = LEVELS * half_steps // (2 * self.steps)  # In integers, so t is not rounded.
      return self.net(x_NZ, hidden_D, torch.full((), time, device=x_NZ.device))

    x_NZ = noise_NZ
    for i in range(self.steps):
      middle_NZ = x_NZ + slope(x_NZ, 2 * i) / (2 * self.steps)
      x_NZ = x_NZ + slope(middle_NZ, 2 * i + 1) / self.steps
    return x_NZ


class DiffusionHead(nn.Module):
  """Hidden [..., D] and noise [N, ..., 1 + T, Z] -> samples [N, ..., Z], denoised in T steps.

  A Gaussian diffusion with cosine schedule, noise prediction and learned range
  variance (Nichol and Dhariwal, arXiv:2102.09672), at T evenly spaced levels.
  """

  draw = staticmethod(torch.randn)

  def __init__(self, config):
    super().__init__()
    self.net = Denoiser(config, 2 * config.latent_size)
    self.steps = config.sampling_steps or 100
    self.noise_shape = (1 + self.steps, config.latent_size)

  def levels(self):
    """Returns the times of the T levels and their shares of signal variance, decreasing."""
    edge = [math.cos((i / LEVELS + 0.008) / 1.008 * math.pi / 2) ** 2 for i in range(LEVELS + 1)]
    ratios = (max(now / before, 1 - MAX_BETA) for before, now in itertools.pairwise(edge))
    signal = list(itertools.accumulate(ratios, operator.mul))
    times = [round(i * (LEVELS - 1) / (self.steps - 1)) for i in range(self.steps)]
    return times, [signal[time] for time in times]

  def forward(self, hidden_D, noise):
    times, signal = self.levels()
    x_NZ = noise[..., 0, :]
    for i in reversed(range(self.steps)):
      prediction = self.net(x_NZ, hidden_D, torch.full((), times[i], device=x_NZ.device))
      noise_NZ, between_NZ = prediction.chunk(2, dim=-1)
      now, before = signal[i], signal[i - 1] if i else 1.0
      beta = 1 - now / before
      x_NZ = (x_NZ - beta / math.sqrt(1 - now) * noise_NZ) / math.sqrt(1 - beta)
      if i:  # The last step adds no noise.
        log_variance = math.log(beta * (1 - before) / (1 - now))
        share_NZ = (between_NZ + 1) / 2
        log_variance_NZ = share_NZ * math.log(beta) + (1 - share_NZ) * log_variance
        x_NZ = x_NZ + torch.exp(log_variance_NZ / 2) * noise[..., self.steps - i, :]
    return x_NZ


HEADS = {"energy": EnergyHead, "flow": FlowHead, "diffusion": DiffusionHead}


def power_of(temperature, least):
  """Returns 1/temperature, rounded if an integer is near; below `least` one must be near."""
  power = 1 / temperature if 0 < temperature <= 1 else math.inf
  if math.isfinite(power):
    n = round(power)
    if abs(power - n) <= 1e-2:
      return n
    if temperature >= least:
      return power
  others = f", or lie in [{least}, 1]" if least < 1 else ""
  raise ValueError(f"temperature must be 1/n (1, 0.5, 0.333, ...){others}, got {temperature}")


def candidate_weights(token_BNK, n):
  """Returns weights by which one of N candidate patches is drawn at temperature 1/n, [B, N].

  A patch that occurs at least m times weighs C(count, m), shared equally by its copies; m
  is the largest count of any patch, at most n. The distribution tends to P(x)^n / Σ P^n as N grows.

  Source: CALM (arXiv:2510.27688), algorithm 2.
  """
  count_BN = (token_BNK[:, :, None] == token_BNK[:, None]).all(-1).sum(-1).float()
  m_B1 = count_BN.amax(-1, keepdim=True).clamp(max=n)
  log_weight_BN = torch.lgamma(count_BN + 1) - torch.lgamma(count_BN - m_B1 + 1) - count_BN.log()
  return log_weight_BN.masked_fill(count_BN < m_B1, -math.inf).softmax(-1)


def until_eos(token_BS, eos):
  """Returns texts with EOS in place of all tokens after the first EOS, cut to the longest text."""
  if eos is None:
    return token_BS
  is_eos_BS = (token_BS == eos).int()
  past_BS = is_eos_BS.cumsum(1) > is_eos_BS
  return token_BS.masked_fill(past_BS, eos)[:, : (~past_BS).sum(1).max()]


class CalmModel(PreTrainedModel):
  """The language model over latents, with the autoencoder that defines them."""

  config_class, _supports_sdpa = CalmConfig, True

  def __init__(self, config):
    super().__init__(config)
    if config.head not in HEADS:
      raise ValueError(f"head must be one of {', '.join(HEADS)}, got {config.head!r}")
    width = config.hidden_size
    self.reads_tokens, self.reads_latents = config.input != "continuous", config.input != "discrete"
    self.ae_model = CalmAutoencoder(CalmAutoencoderConfig(**config.autoencoder))
    if self.reads_tokens:
      patch = mlp(config.patch_size * width, 2 * width, width)
      self.embed_proj = nn.Sequential(*patch, nn.LayerNorm(width, EPS))
    if self.reads_latents:
      self.latent_proj = nn.Linear(config.latent_size, width)
    self.transformer, self.generative_head = Transformer(config), HEADS[config.head](config)
    if config.least_temperature < 1:
      self.tempered_head, self.power_embd = HEADS[config.head](config), PowerEmbedding(width)
    self.post_init()

  def encode(self, token_K):
    """Returns the posterior of patches [..., K]: mean and log std, [..., Z] float32 each."""
    return self.ae_model.encode(token_K)

  def decode(self, z_Z):
    """Returns the logits of the K tokens of each latent: [..., Z] -> [..., K, V] float32."""
    return self.ae_model.decode(z_Z)

  def next_tokens(self, z_Z):
    """Returns the most likely tokens of each latent: [..., Z] -> [..., K]."""
    chunks = z_Z.reshape(-1, z_Z.shape[-1]).split(DECODE_CHUNK)
    tokens = torch.cat([self.decode(chunk).argmax(-1) for chunk in chunks])
    return tokens.reshape(*z_Z.shape[:-1], -1)

  def hidden_states(self, token_BPK, latent_BPZ=None, cache=None):
    """Returns hidden states [B, P, D]; the one at patch i predicts patch i + 1.

    Args:
      latent_BPZ: the patches' latents, needed unless `config.input` is discrete.
      cache: a `Cache` of the patches before, to which these are appended. Unless P is 1,
        P must not exceed the free part of its window.
    """
    x_BPD = 0
    if self.reads_tokens:
      x_BPD = self.embed_proj(self.transformer.embed_tokens(token_BPK).flatten(-2))
    if self.reads_latents:
      if latent_BPZ is None:
        raise ValueError(f"a model whose input is {self.config.input!r} needs latents [B, P, Z]")
      x_BPD = x_BPD + self.latent_proj(latent_BPZ.to(self.latent_proj.weight.dtype))
    return self.transformer(x_BPD, cache)

  def forward(self, token_BPK, latent_BPZ=None):
    """Returns hidden states [B, P, D]; see `hidden_states`."""
    return self.hidden_states(token_BPK, latent_BPZ)

  def draw_here(self, draw, shape, generator):
    """Returns `draw(shape)`, generated on the generator's device and moved to the model's."""
    device = self.device if generator is None else generator.device
    return draw(shape, generator=generator, device=device).to(self.device)

  def draw_noise(self, shape, generator=None):
    """Returns noise from the head's distribution, [*shape, *noise_shape] float32."""
    head = self.generative_head
    return self.draw_here(head.draw, (*shape, *head.noise_shape), generator)

  def samples(self, hidden_D, noise):
    """Returns latents [N, ..., Z] float32 for hidden [..., D], noise [N, ..., *noise_shape]."""
    return self.generative_head(hidden_D, noise)

  def tempered_samples(self, hidden_D, noise, power):
    """Returns the tempered head's latents, as `samples`; `power` is 1/temperature, a tensor []."""
    return self.tempered_head(hidden_D + self.power_embd(power), noise)

  def draw_once(self, hidden_BD, power, generator=None):
    """Returns the tempered head's next patch: tokens [B, K], latent [B, Z]."""
    noise = self.draw_noise((1, len(hidden_BD)), generator)
    power = torch.tensor(float(power), device=self.device)
    (z_BZ,) = self.tempered_samples(hidden_BD, noise, power)
    return self.next_tokens(z_BZ), z_BZ

  def choose(self, hidden_BD, n, count, generator=None):
    """Returns one of `count` candidates for the next patch: tokens [B, K], latent [B, Z]."""
    z_NBZ = self.samples(hidden_BD, self.draw_noise((count, len(hidden_BD)), generator))
    token_NBK = self.next_tokens(z_NBZ)
    weight_BN = candidate_weights(token_NBK.transpose(0, 1), n)
    if generator is not None:
      weight_BN = weight_BN.to(generator.device)
    chosen_B = torch.multinomial(weight_BN, 1, generator=generator)[:, 0].to(self.device)
    row_B = torch.arange(len(chosen_B), device=self.device)
    return token_NBK[chosen_B, row_B], z_NBZ[chosen_B, row_B]

  @torch.no_grad()
  def generate(self, token, max_new_tokens, temperature=1.0, num_candidates=200, generator=None):
    """Returns new tokens for prompts [B, S] or [S]: [B, new] or [new].

    A row ends with its EOS, which is repeated while other rows continue. The model sees
    the last `max_position_embeddings` − 1 patches.

    Args:
      temperature: 1 is the model's own distribution. Below 1, down to
        `config.least_temperature`, the tempered head makes the one draw of a patch; below that
        the temperature must be 1/n. 1/temperature is rounded to an integer within 0.01.
      num_candidates: draws per patch at a temperature of 1/n, for the batch approximation.

    Raises:
      ValueError: if the prompt is not a whole number of patches, or a setting is out of range.
    """
    least = self.config.least_temperature
    power = power_of(temperature, least)
    is_direct = power > 1 and temperature >= least
    eos, size = self.config.eos_token_id, self.config.patch_size
    token_BS = torch.atleast_2d(token).to(self.device)
    if not token_BS.shape[1] or token_BS.shape[1] % size:
      raise ValueError(
        f"a prompt must be whole patches of {size} tokens, at least one; got {token_BS.shape[1]}"
      )
    if max_new_tokens < 1 or (not is_direct and num_candidates < power):
      raise ValueError(
        f"max_new_tokens must be at least 1, got {max_new_tokens}, and num_candidates at least "
        f"1/temperature = {power}, got {num_candidates}"
      )
    # The patches that the model read of an example in training, whose last patch is only predicted.
    cache, latent_BPZ, new = Cache(self.config.max_position_embeddings - 1), None, []
    token_BPK = token_BS.unflatten(1, (-1, size))[:, -cache.window :]
    if self.reads_latents:
      mean_BPZ, log_std_BPZ = self.encode(token_BPK)
      eps_BPZ = self.draw_here(torch.randn, mean_BPZ.shape, generator)
      latent_BPZ = mean_BPZ + log_std_BPZ.exp() * eps_BPZ
    ended_B = torch.zeros(len(token_BS), dtype=torch.bool, device=self.device)
    while len(new) * size < max_new_tokens and not ended_B.all():
      hidden_BD = self.hidden_states(token_BPK, latent_BPZ, cache)[:, -1]
      if is_direct:
        token_BK, z_BZ = self.draw_once(hidden_BD, power, generator)
      else:
        count = num_candidates if power > 1 else 1
        token_BK, z_BZ = self.choose(hidden_BD, power, count, generator)
      token_BPK, latent_BPZ = token_BK[:, None], z_BZ[:, None]
      new.append(token_BK)
      if eos is not None:
        ended_B |= (token_BK == eos).any(-1)
    new_BS = until_eos(torch.cat(new, dim=1)[:, :max_new_tokens], eos)
    return new_BS if token.dim() == 2 else new_BS[0]
