"""ConfigDict at the door -> frozen dataclasses inside.

The dataclasses are the one list of settings and of their published values. A
name that is not in them is refused with the nearest one that is; a value out of
range is refused with the range.
"""

import dataclasses
import difflib
import hashlib
import math
import reprlib
import typing
from typing import Any, Literal

import ml_collections

from calm_jax import errors, files


def require(condition: bool, message: str) -> None:
  """Raises CalmError(message) unless `condition` holds."""
  if not condition:
    raise errors.CalmError(message)


# Programs count in 32 bits.
LARGEST_INT = 2**31 - 1
# Above any model known; an array's elements stay far below 2^63, and a program can be traced.
LARGEST_WIDTH, MOST_LAYERS, LARGEST_PATCH = 2**20, 2**10, 2**12
# Of a patch, compared each with each.
MOST_DRAWS = 2**16
# The least normal number of float32 and the largest.
FLOATS = (2.0**-126, (2 - 2.0**-23) * 2.0**127)

# What is told of a value that is refused: its beginning, however deep it is nested.
_told = reprlib.Repr()
_told.maxstring = _told.maxother = _told.maxlong = 200


def require_positive(settings: Any, *names: str, most: int = LARGEST_INT) -> None:
  """Raises CalmError unless each named field of `settings` is above zero and can be held.

  Args:
    most: the largest whole number.
  """
  for name in names:
    value = getattr(settings, name)
    require(value > 0, f"{name} must be above 0, got {value}")
    _require_held(name, value, 1, most)


def require_not_negative(settings: Any, *names: str) -> None:
  """Raises CalmError unless each named field of `settings` is 0, or as `require_positive` asks."""
  for name in names:
    value = getattr(settings, name)
    require(value >= 0, f"{name} must not be negative, got {value}")
    if value:
      _require_held(name, value, 0, LARGEST_INT)


def _require_held(name: str, value: float, least: int, most: int) -> None:
  if isinstance(value, int):
    require(value <= most, f"{name} must lie in [{least}, {most}], got {value}")
    return
  low, high = FLOATS
  require(
    low <= value <= high, f"{name} must lie in [{low:.3g}, {high:.3g}], float32's, got {value}"
  )


def is_text(value: str) -> bool:
  """Tells whether a string can be written as UTF-8: it holds no half of a surrogate pair."""
  try:
    value.encode()
  except UnicodeEncodeError:
    return False
  return True


def shown(value: Any) -> str:
  """Returns a value in one line, cut where it is long."""
  return _told.repr(value)


@dataclasses.dataclass(frozen=True)
class Data:
  """What a stage reads.

  Attributes:
    path: a token store written by `calm_jax.prepare`, or synthetic:V for random tokens of
      a vocabulary of V, to measure without one.
    context: tokens an example (a block of the store); a multiple of K.
    reuse_batch: train on the first batch again and again, to measure or to debug.
  """

  path: str = ""
  context: int = 8192
  reuse_batch: bool = False

  def __post_init__(self):
    require_positive(self, "context")


@dataclasses.dataclass(frozen=True)
class Autoencoder:
  """Sizes of stage one.

  Attributes:
    patch_size: K, tokens a patch.
    width: E, of a token in encoder and decoder.
    ffn: inner width of its SwiGLU blocks.
    encoder_layers, decoder_layers: half of each run on single tokens, half on
      the patch, so both are even.
    latent: Z, size of the latent vector.
    init: `reference` draws every weight with std 0.02 as published; `fan_in`
      with 1/sqrt(fan_in), which small models need.
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
  """Stage one's objective: K * cross-entropy + kl_weight * KL.

  Attributes:
    kl_weight: weight of the KL to N(0, I), summed over the latent's dimensions.
    kl_floor: nats below which a dimension's KL costs nothing.
    drop_token: share of input tokens replaced by `drop_token_id` (DropToken).
    drop_token_id: the reference uses 0, a real token in most vocabularies.
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
  """Sizes of a Llama Transformer: the baseline itself, or over patches.

  Attributes:
    layers: of the Transformer, as Llama's.
    width: D, of the hidden state.
    ffn: F, inner width of the SwiGLU blocks.
    heads: H, of queries; twice their number divides the width.
    kv_heads: G, heads of keys and values, a divisor of H.
    rope_theta: base of the rotary positions, which count tokens or patches.
    init: `reference` draws weights with std 0.02 as published; `fan_in` with 1/sqrt(fan_in),
      which small models need, but in the Transformer's own layers: these keep std 0.02, which
      did as well on small models.
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
  """Sizes of stage two's Transformer over patches.

  Attributes:
    patch_size: K, tokens a patch, that the run is written for; an autoencoder of another K
      is refused.
    input: what a patch is to it: its tokens (`discrete`, as published), its latent
      (`continuous`), or the sum of `both`.
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
    kind: energy, flow or diffusion: a row of `models.heads.HEADS`.
    blocks: residual blocks; the paper has a quarter as many as backbone layers.
    noise: R, dimensions of the energy head's uniform noise.
    steps: sampling steps of the flow head (midpoint: two calls of the network each)
      and the diffusion head; 0 for the published 10 and 100.
  """

  kind: str = "energy"
  blocks: int = 4
  noise: int = 64
  steps: int = 0

  def __post_init__(self):
    require_positive(self, "blocks", most=MOST_LAYERS)
    require_positive(self, "noise", most=LARGEST_WIDTH)
    fewest = 2 if self.kind == "diffusion" else 1
    require(
      self.steps == 0 or fewest <= self.steps <= 1000,
      f"steps must be 0 or lie in [{fewest}, 1000], got {self.steps}",
    )


@dataclasses.dataclass(frozen=True)
class CalmLoss:
  """Stage two's objective: what is drawn, and the distance of the energy score.

  Attributes:
    samples: N, of a patch: samples of the energy head, repetitions with fresh noise and
      target of the others in training; samples of any head in evaluation.
    targets: what the energy head's samples are compared with: `draws` of the posterior, as
      published, or its `exact` expectation, by quadrature. Evaluation takes the exact one.
    posterior_draws: M, draws of the posterior a patch.
    alpha: exponent of the energy score's distance, in (0, 2]. At 2 the score is not
      proper: it asks for the right mean alone (the paper's row of BrierLM 0).
  """

  samples: int = 8
  targets: Literal["draws", "exact"] = "draws"
  posterior_draws: int = 100
  alpha: float = 1.0

  def __post_init__(self):
    require(0 < self.alpha <= 2, f"alpha must lie in (0, 2], got {self.alpha}")
    require(
      self.samples >= 2, f"samples (N) must be at least 2 for the repulsion, got {self.samples}"
    )
    require_positive(self, "samples", "posterior_draws", most=MOST_DRAWS)
    require_positive(self, "alpha")


@dataclasses.dataclass(frozen=True)
class Optimizer:
  """AdamW with clipping and a schedule.

  Attributes:
    learning_rate: the peak.
    schedule: constant, cosine or wsd (warmup, stable, decay): a row of
      `training.optimizer.SCHEDULES`.
    warmup_steps: steps of linear rise; step 0 already moves, step warmup-1 is the peak.
    decay_steps: last steps over which `wsd` falls to final_share of the peak.
    final_share: where `cosine` and `wsd` end, as a share of the peak.
    b1, b2: AdamW's decay rates of the first and the second moment.
    eps: AdamW's, added to the root of the second moment.
    weight_decay: AdamW's, of matrices; biases and norms are not decayed.
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
  """The loop: how long, on how much at once, and when it reports, scores and saves.

  Attributes:
    steps: optimizer steps of the whole run.
    batch: examples a step, over all accumulation parts.
    accumulation: parts the batch is worked off in, one after the other.
    seed: of the parameters, the data order and all noise.
    compute_dtype: of activations; parameters and losses stay float32.
    log_every: steps between two reports of figures.
    eval_every: steps between two evaluations on held-out text; 0 for none.
    eval_blocks: held-out examples an evaluation.
    checkpoint_every: steps between two saves.
    checkpoint_minutes: save also when so many have passed since the last time; 0 for never.
    keep_latest: newest checkpoints kept.
    keep_every: checkpoints of the multiples of so many steps stay; 0 for none.
    max_skipped: non-finite steps in a row after which the run stops.
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
    require_positive(
      self, "steps", "batch", "accumulation", "log_every", "eval_blocks",
      "checkpoint_every", "keep_latest", "max_skipped",
    )  # fmt: skip
    require_not_negative(self, "eval_every", "keep_every", "checkpoint_minutes")
    require(0 <= self.seed < 2**32, f"seed must lie in [0, 2**32), got {self.seed}")
    require(
      self.batch % self.accumulation == 0,
      f"batch must be divisible by accumulation = {self.accumulation}, got {self.batch}",
    )


@dataclasses.dataclass(frozen=True)
class Mesh:
  """How devices are laid out: data * fsdp * sequence * tensor of them; one may be -1, the rest.

  Attributes:
    data: copies of the parameters. Slices joined by a data-center network lie along it.
    fsdp: parts that parameters and optimizer state are divided into; each also takes
      examples of its own.
    sequence: parts that the positions of an example are divided into.
    tensor: parts that each layer's width is divided into.
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
  """How the same numbers are computed.

  Attributes:
    attention: splash, cudnn, blocks or xla, a row of `models.attention.KERNELS`; `auto` for
      the fastest of the platform.
    remat: what the backward pass computes again: none, dots, named, offload or full, a row of
      `models.remat.POLICIES`.
    unroll: layers one after the other in the program, not as a loop: longer to compile.
  """

  attention: str = "auto"
  remat: str = "none"
  unroll: bool = False


@dataclasses.dataclass(frozen=True)
class Limits:
  """Minutes after which a phase counts as stuck: the process ends, to be started again.

  0 for none.

  Attributes:
    startup_minutes: from the first second to the first step.
    step_minutes: one step, one batch of an evaluation or one save.
    shutdown_minutes: from the last step to the end.
  """

  startup_minutes: float = 60.0
  step_minutes: float = 30.0
  shutdown_minutes: float = 30.0

  def __post_init__(self):
    require_not_negative(self, *dataclasses.asdict(self))


@dataclasses.dataclass(frozen=True)
class Profile:
  """What is recorded for a profiler, in the workdir's folder `profile`.

  Attributes:
    steps: how many steps are traced, 0 for none. A memory profile is written at their end.
    skip: steps of the attempt before the first that is traced.
    port: of a server that a profiler can ask for a trace at any time; 0 for none.
  """

  steps: int = 0
  skip: int = 10
  port: int = 0

  def __post_init__(self):
    require_not_negative(self, *dataclasses.asdict(self))
    require(self.port < 2**16, f"port must be below 65536, got {self.port}")


@dataclasses.dataclass(frozen=True)
class AutoencoderRun:
  """Stage one: patches -> latents -> patches.

  Attributes:
    stage: the kind of run, which tells what else there is to set.
    start_from: a workdir of the same stage whose weights the run starts from, in place
      of initial values; empty for none.
  """

  stage: Literal["autoencoder"] = "autoencoder"
  data: Data = dataclasses.field(default_factory=Data)
  start_from: str = ""
  model: Autoencoder = dataclasses.field(default_factory=Autoencoder)
  loss: AutoencodingLoss = dataclasses.field(default_factory=AutoencodingLoss)
  optimizer: Optimizer = dataclasses.field(default_factory=Optimizer)
  training: Training = dataclasses.field(default_factory=Training)
  mesh: Mesh = dataclasses.field(default_factory=Mesh)
  execution: Execution = dataclasses.field(default_factory=Execution)
  limits: Limits = dataclasses.field(default_factory=Limits)
  profile: Profile = dataclasses.field(default_factory=Profile)


@dataclasses.dataclass(frozen=True)
class CalmRun:
  """Stage two: the language model over the latents of a trained autoencoder.

  Attributes:
    stage: the kind of run, which tells what else there is to set.
    autoencoder: stage one's workdir. Its weights are copied into this run's own
      workdir at the start, which is complete without the other from then on. Empty
      with `start_from`, whose autoencoder is taken.
    start_from: a workdir of the same stage whose weights the run starts from, in place
      of initial values; empty for none.
  """

  stage: Literal["calm"] = "calm"
  data: Data = dataclasses.field(default_factory=Data)
  autoencoder: str = ""
  start_from: str = ""
  model: Backbone = dataclasses.field(default_factory=Backbone)
  head: Head = dataclasses.field(default_factory=Head)
  loss: CalmLoss = dataclasses.field(default_factory=CalmLoss)
  optimizer: Optimizer = dataclasses.field(default_factory=Optimizer)
  training: Training = dataclasses.field(default_factory=Training)
  mesh: Mesh = dataclasses.field(default_factory=Mesh)
  execution: Execution = dataclasses.field(default_factory=Execution)
  limits: Limits = dataclasses.field(default_factory=Limits)
  profile: Profile = dataclasses.field(default_factory=Profile)


@dataclasses.dataclass(frozen=True)
class TransformerRun:
  """The baseline: a Llama that predicts the next token by cross-entropy.

  Attributes:
    stage: the kind of run, which tells what else there is to set.
    start_from: a workdir of the same stage whose weights the run starts from, in place
      of initial values; empty for none.
  """

  stage: Literal["transformer"] = "transformer"
  data: Data = dataclasses.field(default_factory=lambda: Data(context=2048))
  start_from: str = ""
  model: Transformer = dataclasses.field(default_factory=Transformer)
  optimizer: Optimizer = dataclasses.field(default_factory=Optimizer)
  training: Training = dataclasses.field(default_factory=lambda: Training(batch=1024))
  mesh: Mesh = dataclasses.field(default_factory=Mesh)
  execution: Execution = dataclasses.field(default_factory=Execution)
  limits: Limits = dataclasses.field(default_factory=Limits)
  profile: Profile = dataclasses.field(default_factory=Profile)


Run = AutoencoderRun | CalmRun | TransformerRun

RUNS: dict[str, type[Run]] = {
  "autoencoder": AutoencoderRun,
  "calm": CalmRun,
  "transformer": TransformerRun,
}


@dataclasses.dataclass(frozen=True)
class Companions:
  """What goes with a config file's size where no workdir tells it, by default the published.

  A config file's `get_companions` returns it for a size, as its `get_config` the settings.

  Attributes:
    vocab_size: V of the tokenizer, by default Llama 3's.
    autoencoder: sizes of the autoencoder that stage two reads; other stages read none.
  """

  vocab_size: int = 128_256
  autoencoder: Autoencoder = dataclasses.field(default_factory=Autoencoder)


def require_same_patches(run: Run, codec: Autoencoder, whose: str, other: str) -> None:
  """Raises CalmError unless stage two is written for the K of its autoencoder.

  Args:
    whose: the autoencoder, for people. other: the flag that gives another one.
  """
  if not isinstance(run, CalmRun) or run.model.patch_size == codec.patch_size:
    return
  ours, theirs = run.model.patch_size, codec.patch_size
  context = run.data.context // ours * theirs
  raise errors.CalmError(
    f"config.model.patch_size is {ours}, but {whose} has K = {theirs} tokens a patch: give another "
    f"{other}, or --config.model.patch_size={theirs} --config.data.context={context}, which keeps "
    "the patches an example"
  )


def nearest(name: str, known: typing.Iterable[str]) -> str:
  """Returns `known` as a sentence, led by the entry that resembles `name` most."""
  known = sorted(known)
  match = difflib.get_close_matches(name, known, n=1)
  listed = f"known: {', '.join(known)}"
  return f"did you mean {match[0]!r}? {listed}" if match else listed


def _nearest_to(value: Any, known: typing.Iterable[str]) -> str:
  """Returns `nearest` for a value of any type."""
  return nearest(value if isinstance(value, str) else "", known)


def choose(sizes: typing.Mapping[str, Run], size: str) -> Run:
  """Returns the run of a config file's size, the part after its colon.

  Raises:
    CalmError: for a size that the file does not have.
  """
  if size not in sizes:
    raise errors.CalmError(f"unknown size {size!r}: {nearest(size, sizes)}")
  return sizes[size]


def from_mapping(values: typing.Mapping[str, Any]) -> Run:
  """Returns the frozen run that a config file or a stored config.json describes.

  Raises:
    CalmError: for an unknown name (the nearest known one is named), a value of
      the wrong type or one out of range.
  """
  stage = values.get("stage", "")
  if not isinstance(stage, str) or stage not in RUNS:
    raise errors.CalmError(f"config.stage is {shown(stage)}: {_nearest_to(stage, RUNS)}")
  run = _build(RUNS[stage], values, "config")
  tokens = run.training.batch * run.data.context
  require(
    tokens <= LARGEST_INT,
    f"config.training.batch * config.data.context must lie in [1, {LARGEST_INT}], the tokens of a "
    f"step, got {tokens}",
  )
  return run


def _build(cls: type, values: typing.Mapping[str, Any], where: str) -> Any:
  fields = {field.name: field for field in dataclasses.fields(cls)}
  hints = typing.get_type_hints(cls)
  arguments = {}
  for name, value in values.items():
    if name not in fields:
      raise errors.CalmError(f"unknown setting {where}.{name}: {nearest(name, fields)}")
    if dataclasses.is_dataclass(hints[name]):
      known = f"{where}.{name} must hold settings, got {shown(value)}"
      require(isinstance(value, typing.Mapping), known)
      arguments[name] = _build(typing.cast(type, hints[name]), value, f"{where}.{name}")
    else:
      arguments[name] = _checked(hints[name], value, f"{where}.{name}")
  try:
    return cls(**arguments)
  except errors.CalmError as error:
    raise errors.CalmError(f"{where}.{error}") from None


def _checked(hint: Any, value: Any, where: str) -> Any:
  if typing.get_origin(hint) is Literal:
    choices = typing.get_args(hint)
    require(value in choices, f"{where} is {shown(value)}: {_nearest_to(value, choices)}")
    return value
  if hint is float and isinstance(value, int) and not isinstance(value, bool):
    value = float(value) if abs(value) < FLOATS[1] else math.inf
  require(
    isinstance(value, hint) and not (hint is int and isinstance(value, bool)),
    f"{where} must be of type {hint.__name__}, got {shown(value)}",
  )
  require(not (hint is float and not math.isfinite(value)), f"{where} must be finite, got {value}")
  require(
    not isinstance(value, str) or (is_text(value) and "\0" not in value),
    f"{where} holds characters that no file's name has, got {value!a}",
  )
  return value


def to_config_dict(run: Run) -> ml_collections.ConfigDict:
  """Returns `run` as the ConfigDict that a config file hands to the flags."""
  return ml_collections.ConfigDict(dataclasses.asdict(run))


def to_json(run: Run) -> str:
  """Returns `run` as indented JSON, the form it is stored in."""
  return files.to_json(dataclasses.asdict(run))


def digest(run: Run) -> str:
  """Returns 8 hex digits that identify the settings of a run."""
  return hashlib.sha256(to_json(run).encode()).hexdigest()[:8]


# What a run that has begun can't change: its parameters would no longer fit.
FIXED = ("stage", "model", "head", "autoencoder", "start_from")
# What it may change unasked: the numbers stay the same.
FREE = ("mesh", "execution", "limits", "profile")


def shapes(name: str, run: Run) -> bool:
  """Tells whether parameters trained under one value of a setting are wrong under another."""
  free = {"model.init", "head.steps"}
  if isinstance(run, CalmRun) and run.head.kind != "energy":
    free.add("head.noise")
  return name.partition(".")[0] in ("model", "head") and name not in free


def differences(a: Run, b: Run) -> dict[str, tuple[Any, Any]]:
  """Returns the settings in which two runs differ, with both values."""
  flat_a, flat_b = flat(dataclasses.asdict(a)), flat(dataclasses.asdict(b))
  names = [*flat_a, *(name for name in flat_b if name not in flat_a)]
  return {
    name: (flat_a.get(name), flat_b.get(name))
    for name in names
    if flat_a.get(name) != flat_b.get(name)
  }


def flat(tree: typing.Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
  """Returns nested settings by their names with dots, as training.steps."""
  result = {}
  for name, value in tree.items():
    if isinstance(value, dict):
      result |= flat(value, f"{prefix}{name}.")
    else:
      result[f"{prefix}{name}"] = value
  return result
