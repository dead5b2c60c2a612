"""Every setting of a run, its meaning, its published value and its range, as frozen dataclasses.

An unknown name is refused with the nearest known name, a value out of range with the range.
"""

import dataclasses
import reprlib
import typing
from typing import Any, Literal

from calm_jax import errors, spelling


def require(condition: bool, message: str) -> None:
  """Raises CalmError(message) unless `condition` holds."""
  if not condition:
    raise errors.CalmError(message)


# Compiled programs count in 32-bit integers.
LARGEST_INT = 2**31 - 1
# Above any published model, yet arrays have far fewer than 2^63 elements and tracing terminates.
LARGEST_WIDTH, MOST_LAYERS, LARGEST_PATCH = 2**20, 2**10, 2**12
# Samples or draws per patch, of which all pairs are compared.
MOST_DRAWS = 2**16
MOST_STEPS = 1000  # Sampling steps of a head.
# The smallest normal number of float32 and the largest number.
FLOATS = (2.0**-126, (2 - 2.0**-23) * 2.0**127)

# Prints a refused value in one line: its beginning, however deeply it is nested.
_short_repr = reprlib.Repr()
_short_repr.maxstring = _short_repr.maxother = _short_repr.maxlong = 200


def require_positive(settings: Any, *names: str, most: int = LARGEST_INT) -> None:
  """Raises CalmError unless each named field is above 0 and in the range of int32 or float32.

  Args:
    settings: a dataclass.
    names: names of its fields.
    most: the largest integer that is allowed.
  """
  for name in names:
    value = getattr(settings, name)
    require(value > 0, f"{name} must be above 0, got {value}")
    _require_in_range(name, value, 1, most)


def require_not_negative(settings: Any, *names: str) -> None:
  """Raises CalmError unless each named field is 0 or passes `require_positive`."""
  for name in names:
    value = getattr(settings, name)
    require(value >= 0, f"{name} must not be negative, got {value}")
    if value:
      _require_in_range(name, value, 0, LARGEST_INT)


def _require_in_range(name: str, value: float, least: int, most: int) -> None:
  """Raises CalmError unless an integer is at most `most` and a float is in float32's range."""
  if isinstance(value, int):
    require(value <= most, f"{name} must lie in [{least}, {most}], got {value}")
    return
  low, high = FLOATS
  require(
    low <= value <= high,
    f"{name} must lie in [{low:.3g}, {high:.3g}], the range of float32, got {value}",
  )


def is_text(value: str) -> bool:
  """Returns whether UTF-8 can encode a string: whether it holds no half of a surrogate pair."""
  try:
    value.encode()
  except UnicodeEncodeError:
    return False
  return True


def shown(value: Any) -> str:
  """Returns a value as one line, shortened if it is long."""
  return _short_repr.repr(value)


@dataclasses.dataclass(frozen=True)
class Data:
  """The training data.

  Attributes:
    path: a token store written by `calm_jax.prepare`, or synthetic:V for random tokens below V,
      to measure speed without a corpus.
    context: tokens per example (a block of the store); a multiple of K.
    reuse_batch: train on the first batch in every step, to measure speed or to debug.
  """

  path: str = ""
  context: int = 8192
  reuse_batch: bool = False

  def __post_init__(self):
    require_positive(self, "context")


@dataclasses.dataclass(frozen=True)
class Autoencoder:
  """Sizes of the autoencoder, stage one.

  Attributes:
    patch_size: K, tokens per patch.
    width: E, width of a token in encoder and decoder.
    ffn: inner width of the SwiGLU blocks.
    encoder_layers, decoder_layers: number of layers; half of them process single tokens and half
      the patch, so the number is even.
    latent: Z, dimensions of the latent vector.
    init: initial weights; `reference` draws them with std 0.02, as published, `fan_in` with
      std 1/sqrt(fan_in), which small models need.
  """

  patch_size: int = 4
  width: int = 512
  ffn: int = 1280
  encoder_layers: int = 2
  decoder_layers: int = 2
  latent: int = 128
  init: Literal["fan_in", "reference"] = "reference"

  def __post_init__(self):
    require_positive(self, "patch_size", most=LARGEST_PATCH)
    require_positive(self, "width", "ffn", "latent", most=LARGEST_WIDTH)
    require_positive(self, "encoder_layers", "decoder_layers", most=MOST_LAYERS)
    for name in ("encoder_layers", "decoder_layers"):
      value = getattr(self, name)
      require(
        value % 2 == 0, f"{name} must be even (half before, half after the patch), got {value}"
      )


@dataclasses.dataclass(frozen=True)
class AutoencodingLoss:
  """Objective of the autoencoder, stage one: K * cross-entropy + kl_weight * KL.

  Attributes:
    kl_weight: weight of the KL divergence to N(0, I), summed over the latent's dimensions.
    kl_floor: KL per dimension, in nats, below which it is not penalized.
    drop_token: share of input tokens replaced by `drop_token_id` (DropToken).
    drop_token_id: id of the replacement; the reference uses 0, a real token in most vocabularies.
    drop_latent: dropout rate of the latent (DropLatent).
  """

  kl_weight: float = 1e-3
  kl_floor: float = 0.5
  drop_token: float = 0.15
  drop_token_id: int = 0
  drop_latent: float = 0.15

  def __post_init__(self):
    for name in ("drop_token", "drop_latent"):
      value = getattr(self, name)
      require(0 <= value < 1, f"{name} must lie in [0, 1), got {value}")
    require_not_negative(self, "kl_weight", "kl_floor")


@dataclasses.dataclass(frozen=True)
class Transformer:
  """Sizes of a Llama Transformer over tokens, the baseline, or over patches.

  Attributes:
    layers: number of Transformer layers.
    width: D, width of the hidden state; a multiple of twice the heads.
    ffn: F, inner width of the SwiGLU blocks.
    heads: H, query heads.
    kv_heads: G, key and value heads; a divisor of H.
    rope_theta: base of the rotary embedding of positions, which are tokens or patches.
    init: initial weights; `reference` draws them with std 0.02, as published, `fan_in` with
      std 1/sqrt(fan_in), which small models need. The Transformer layers have std 0.02 in both:
      it was as good on small models.
  """

  layers: int = 16
  width: int = 1024
  ffn: int = 2752
  heads: int = 16
  kv_heads: int = 16
  rope_theta: float = 10000.0
  init: Literal["fan_in", "reference"] = "reference"

  def __post_init__(self):
    require_positive(self, "layers", most=MOST_LAYERS)
    require_positive(self, "width", "ffn", "heads", "kv_heads", most=LARGEST_WIDTH)
    require_positive(self, "rope_theta")
    require(
      self.width % (2 * self.heads) == 0,
      f"width must be a multiple of 2 * heads = {2 * self.heads}, got {self.width}",
    )
    require(
      self.heads % self.kv_heads == 0,
      f"heads must be a multiple of kv_heads = {self.kv_heads}, got {self.heads}",
    )


@dataclasses.dataclass(frozen=True)
class Backbone(Transformer):
  """Sizes of the Transformer over patches, the backbone of stage two.

  Attributes:
    patch_size: K, tokens per patch; must be equal to the K of the autoencoder.
    input: input of a patch: its tokens (`discrete`, as published), its latent (`continuous`), or
      the sum of `both`.
  """

  patch_size: int = 4
  input: Literal["both", "continuous", "discrete"] = "discrete"

  def __post_init__(self):
    super().__post_init__()
    require_positive(self, "patch_size")

  @property
  def reads_tokens(self) -> bool:
    return self.input != "continuous"

  @property
  def reads_latents(self) -> bool:
    return self.input != "discrete"


@dataclasses.dataclass(frozen=True)
class Head:
  """The generative head.

  Attributes:
    kind: energy, flow or diffusion: a row of `models.heads.registry.HEADS`.
    blocks: residual blocks; the paper has one per four backbone layers.
    noise: R, dimensions of the energy head's uniform noise.
    steps: sampling steps of the flow head (midpoint: two network calls each) and of the
      diffusion head; 0 for the published 10 and 100.
  """

  kind: str = "energy"
  blocks: int = 4
  noise: int = 64
  steps: int = 0

  def __post_init__(self):
    require_positive(self, "blocks", most=MOST_LAYERS)
    require_positive(self, "noise", most=LARGEST_WIDTH)
    require(
      0 <= self.steps <= MOST_STEPS,
      f"steps must be 0 or lie in [1, {MOST_STEPS}], got {self.steps}",
    )


@dataclasses.dataclass(frozen=True)
class CalmLoss:
  """Objective of stage two: the numbers of samples and draws, and the energy score's distance.

  Attributes:
    samples: N, samples per patch of the energy head; for other heads in training, repetitions
      with fresh noise and a fresh target; in evaluation, samples of any head.
    targets: what the energy head's samples are compared with: `draws` of the posterior, as
      published, or its `exact` expectation by quadrature. Evaluation always uses the exact one.
    posterior_draws: M, posterior draws per patch.
    alpha: exponent of the energy score's distance, in (0, 2]. With 2 the score is not proper: it
      only requires the right mean (BrierLM 0 in the paper).
    token_weight: weight of the token loss: the cross-entropy of the next patch's tokens, nats a
      token, each read from the hidden state alone by a Linear and the autoencoder's token table.
      It teaches the trunk; no draw reads it. 0, as published, leaves it and its parameters out.
    token_every: one position in this many, from a random first one, has a token loss.
  """

  samples: int = 8
  targets: Literal["draws", "exact"] = "draws"
  posterior_draws: int = 100
  alpha: float = 1.0
  token_weight: float = 0.0
  token_every: int = 1

  def __post_init__(self):
    require(0 < self.alpha <= 2, f"alpha must lie in (0, 2], got {self.alpha}")
    require(
      self.samples >= 2, f"samples (N) must be at least 2 for the repulsion, got {self.samples}"
    )
    require_positive(self, "samples", "posterior_draws", most=MOST_DRAWS)
    require_positive(self, "alpha", "token_every")
    require_not_negative(self, "token_weight")


@dataclasses.dataclass(frozen=True)
class Optimizer:
  """AdamW with gradient clipping and a learning rate schedule.

  Attributes:
    learning_rate: peak learning rate.
    schedule: constant, cosine or wsd (warmup, stable, decay): a row of
      `training.optimizer.SCHEDULES`.
    warmup_steps: steps of linear warmup; the rate is above 0 at step 0 and reaches the peak at
      step warmup_steps - 1.
    decay_steps: number of final steps in which `wsd` decays to final_share of the peak.
    final_share: final rate of `cosine` and `wsd`, as a share of the peak.
    b1, b2: decay rates of AdamW's first and second moment.
    eps: AdamW's epsilon, added to the square root of the second moment.
    weight_decay: AdamW's weight decay of matrices; biases and norms are not decayed.
    clip_norm: global gradient norm above which gradients are scaled down.
  """

  learning_rate: float = 3e-4
  schedule: str = "constant"
  warmup_steps: int = 2000
  decay_steps: int = 0
  final_share: float = 0.0
  b1: float = 0.9
  b2: float = 0.95
  eps: float = 1e-8
  weight_decay: float = 0.1
  clip_norm: float = 1.0

  def __post_init__(self):
    require_positive(self, "learning_rate", "eps", "clip_norm")
    require_not_negative(self, "warmup_steps", "decay_steps", "weight_decay")
    require(0 <= self.final_share <= 1, f"final_share must lie in [0, 1], got {self.final_share}")
    for name in ("b1", "b2"):
      require(0 <= getattr(self, name) < 1, f"{name} must lie in [0, 1), got {getattr(self, name)}")


@dataclasses.dataclass(frozen=True)
class Training:
  """The training loop: its length, its batch, and how often it logs, evaluates and saves.

  Attributes:
    steps: optimizer steps of the run, in total.
    batch: examples per step, over all accumulation parts.
    accumulation: number of parts of a batch that are processed one after the other.
    seed: seed of the parameters, the data order and all noise.
    compute_dtype: type of activations; parameters and losses are float32.
    log_every: steps between two logs of the metrics.
    eval_every: steps between two evaluations on held-out text; 0 for none.
    eval_blocks: held-out examples per evaluation.
    checkpoint_every: steps between two checkpoints.
    checkpoint_minutes: also save after this many minutes without a checkpoint; 0 for never.
    keep_latest: number of newest checkpoints to keep.
    keep_every: also keep the checkpoints at multiples of this many steps; 0 for none.
    max_skipped: consecutive non-finite steps after which the run stops.
  """

  steps: int = 250_000
  batch: int = 256
  accumulation: int = 1
  seed: int = 0
  compute_dtype: Literal["bfloat16", "float32"] = "bfloat16"
  log_every: int = 10
  eval_every: int = 1000
  eval_blocks: int = 64
  checkpoint_every: int = 1000
  checkpoint_minutes: float = 0.0
  keep_latest: int = 3
  keep_every: int = 0
  max_skipped: int = 10

  def __post_init__(self):
    require_positive(self, "steps", "batch", "accumulation", "log_every", "eval_blocks")
    require_positive(self, "checkpoint_every", "keep_latest", "max_skipped")
    require_not_negative(self, "eval_every", "keep_every", "checkpoint_minutes")
    require(0 <= self.seed < 2**32, f"seed must lie in [0, 2**32), got {self.seed}")
    require(
      self.batch % self.accumulation == 0,
      f"batch must be divisible by accumulation = {self.accumulation}, got {self.batch}",
    )


@dataclasses.dataclass(frozen=True)
class Mesh:
  """The device mesh of data * fsdp * sequence * tensor devices; one size may be -1 for the rest.

  Attributes:
    data: copies of the parameters; each processes its own examples. Slices that a data-center
      network joins are split along this axis.
    fsdp: shards of parameters and optimizer state; each also processes its own examples.
    sequence: shards of the positions of an example.
    tensor: shards of each layer's width.
  """

  data: int = 1
  fsdp: int = -1
  sequence: int = 1
  tensor: int = 1

  def __post_init__(self):
    sizes = dataclasses.asdict(self)
    for name, size in sizes.items():
      require(size > 0 or size == -1, f"{name} must be above 0, or -1 for the rest, got {size}")
    rest = " and ".join(name for name, size in sizes.items() if size == -1)
    require(" and " not in rest, f"{rest} are -1: only one axis can take the rest of the devices")


@dataclasses.dataclass(frozen=True)
class Execution:
  """How the numbers are computed; these settings do not change the results.

  Attributes:
    attention: splash, cudnn, blocks or xla, a row of `kernels.attention.KERNELS`; `auto` for
      the fastest on the platform.
    remat: what the backward pass recomputes: none, dots, named, offload or full, a row of
      `models.remat.POLICIES`.
    unroll: unroll the loop over layers in the program; compilation takes longer.
  """

  attention: str = "auto"
  remat: str = "none"
  unroll: bool = False


@dataclasses.dataclass(frozen=True)
class Limits:
  """Minutes after which a phase counts as stuck and the process exits to be restarted; 0 for none.

  Attributes:
    startup_minutes: from the start of the process to the first step.
    step_minutes: for a step, a batch of an evaluation, or a save.
    shutdown_minutes: from the last step to the end.
  """

  startup_minutes: float = 60.0
  step_minutes: float = 30.0
  shutdown_minutes: float = 30.0

  def __post_init__(self):
    require_not_negative(self, *dataclasses.asdict(self))


@dataclasses.dataclass(frozen=True)
class Profile:
  """Profiles, which are written to the folder `profile` of the workdir.

  Attributes:
    steps: number of steps to trace, 0 for none. A memory profile is written after them.
    skip: steps of the attempt before the first traced step.
    port: port of a server that a profiler can request traces from at any time; 0 for none.
  """

  steps: int = 0
  skip: int = 10
  port: int = 0

  def __post_init__(self):
    require_not_negative(self, *dataclasses.asdict(self))
    require(self.port < 2**16, f"port must be below 65536, got {self.port}")


@dataclasses.dataclass(frozen=True)
class Run:
  """Settings that every stage has. A stage's own class adds its model, its loss and its parents.

  Attributes:
    stage: the kind of run, which decides what else can be set.
    start_from: workdir of the same stage whose weights replace the initial values; empty for
      none.
  """

  stage: str = ""
  data: Data = dataclasses.field(default_factory=Data)
  start_from: str = ""
  optimizer: Optimizer = dataclasses.field(default_factory=Optimizer)
  training: Training = dataclasses.field(default_factory=Training)
  mesh: Mesh = dataclasses.field(default_factory=Mesh)
  execution: Execution = dataclasses.field(default_factory=Execution)
  limits: Limits = dataclasses.field(default_factory=Limits)
  profile: Profile = dataclasses.field(default_factory=Profile)


@dataclasses.dataclass(frozen=True)
class Companions:
  """Vocabulary and parents that a config file's size goes with, for acts without a workdir.

  A config file's `get_companions` returns them for a size, as `get_config` returns the settings.

  Attributes:
    vocab_size: V of the tokenizer, by default Llama 3's.
    parents: settings of the run that each parent of the stage comes from, by the parent's name;
      a parent that is not named has its stage's default settings, the published ones.
  """

  vocab_size: int = 128_256
  parents: typing.Mapping[str, Run] = dataclasses.field(default_factory=dict)


def nearest(name: str, known: typing.Iterable[str]) -> str:
  """Returns a sentence that lists the known names and suggests the one most like `name`."""
  known = sorted(known)
  similar = spelling.similar(name, known)
  listed = f"known: {', '.join(known)}"
  return f"did you mean {similar[0]!r}? {listed}" if similar else listed
