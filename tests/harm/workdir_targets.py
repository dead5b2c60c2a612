"""Named damage to a workdir: parts that belong together are swapped or edited."""

import json
import pathlib
import shutil

from harm import specimens
from harm.targets import edit, fifo, nested, replace, target


@target("calm", "export", "evaluate", "resume")
def autoencoder_swapped(place):
  """The frozen autoencoder was replaced by another of the same sizes."""
  replace(place.case / "autoencoder", place.root / "other_autoencoder")


@target("calm", "export", "resume")
def autoencoder_checkpoints_swapped(place):
  """The frozen autoencoder has the checkpoints of another of the same sizes."""
  replace(place.case / "autoencoder/checkpoints", place.root / "other_autoencoder/checkpoints")


@target("calm", "evaluate")
def autoencoder_config_edited(place):
  """The frozen autoencoder's config has another floor of the KL."""
  edit(place.case / "autoencoder/config.json", loss__kl_floor=0.25)


@target("autoencoder", "export", "resume")
def checkpoints_swapped(place):
  """The checkpoints are those of another run of the same sizes and steps."""
  replace(place.case / "checkpoints", place.root / "other_autoencoder/checkpoints")


@target("autoencoder", "export", "resume")
def checkpoint_swapped(place):
  """The last checkpoint is that of another run of the same sizes and steps."""
  replace(place.case / "checkpoints/4", place.root / "other_autoencoder/checkpoints/4")


@target("autoencoder", "resume")
def checkpoint_rest_swapped(place):
  """The optimizer state is that of the previous checkpoint."""
  replace(place.case / "checkpoints/4/rest", place.case / "checkpoints/2/rest")


@target("autoencoder", "export", "resume")
def checkpoint_renamed(place):
  """The last checkpoint has the number of a later step."""
  (place.case / "checkpoints/4").rename(place.case / "checkpoints/5")


@target("autoencoder", "export", "resume")
def checkpoint_copied(place):
  """The last checkpoint was replaced by an earlier one."""
  replace(place.case / "checkpoints/4", place.case / "checkpoints/2")


@target("autoencoder", "resume", must_report=True)
def checkpoints_removed(place):
  """All checkpoints were removed, for example by rm -r checkpoints."""
  shutil.rmtree(place.case / "checkpoints")


@target("autoencoder", "resume")
def checkpoint_folder_in_the_way(place):
  """An empty folder has the number of the next step."""
  (place.case / "checkpoints/5").mkdir()


@target("autoencoder", "resume")
def checkpoint_newer_folder_in_the_way(place):
  """An empty folder has the number of a step after the last."""
  (place.case / "checkpoints/9").mkdir()


@target("autoencoder", "resume", "export")
def checkpoint_is_a_file(place):
  """The last checkpoint is a file."""
  shutil.rmtree(place.case / "checkpoints/4")
  (place.case / "checkpoints/4").write_text("x")


@target("autoencoder", "resume", "export")
def checkpoints_are_a_file(place):
  """The folder of checkpoints is a file."""
  shutil.rmtree(place.case / "checkpoints")
  (place.case / "checkpoints").write_text("x")


def _meta(place: specimens.Place) -> pathlib.Path:
  return place.case / "checkpoints/4/meta/metadata"


@target("autoencoder", "resume")
def position_edited(place):
  """The last checkpoint says that fewer batches were read."""
  path = _meta(place)
  values = json.loads(path.read_text())
  values["data"] = {
    name: max(0, x - 1) if isinstance(x, int) else x for name, x in values["data"].items()
  }
  path.write_text(json.dumps(values))


@target("autoencoder", "resume")
def position_text(place):
  """The position of the data in the last checkpoint is text."""
  edit(_meta(place), data="here")


@target("autoencoder", "resume", "export")
def meta_list(place):
  """The meta of the last checkpoint is a list."""
  _meta(place).write_text("[1]")


@target("autoencoder", "resume", "export")
def meta_nested(place):
  """The meta of the last checkpoint is nested 100,000 deep."""
  nested(_meta(place))


@target("autoencoder", "export")
def meta_config_edited(place):
  """The config in the last checkpoint's meta was edited."""
  edit(_meta(place), config__model__width=17)


@target("calm", "evaluate", "generate", "export")
def config_rope_edited(place):
  """config.json has another rope_theta, which changes no shape."""
  edit(place.case / "config.json", model__rope_theta=500.0)


@target("calm", "evaluate", "generate", "export")
def config_heads_edited(place):
  """config.json has other numbers of heads, which change no shape."""
  edit(place.case / "config.json", model__heads=4, model__kv_heads=2)


@target("calm", "evaluate")
def config_dtype_edited(place):
  """config.json has another type of activations, bfloat16."""
  edit(place.case / "config.json", training__compute_dtype="bfloat16")


@target("calm", "evaluate")
def config_samples_edited(place):
  """config.json has another number of samples."""
  edit(place.case / "config.json", loss__samples=6)


@target("calm", "export", "generate")
@target("transformer", "evaluate", "resume", "report")
def config_list(place):
  """config.json is a list."""
  (place.case / "config.json").write_text("[1]")


@target("transformer", "evaluate", "resume", "report", "export")
def config_nested(place):
  """config.json is nested 100,000 deep."""
  nested(place.case / "config.json")


@target("transformer", "evaluate", "export")
def config_part_is_a_list(place):
  """The model's settings in config.json are a list."""
  edit(place.case / "config.json", model=[1])


@target("transformer", "export")
def config_million_layers(place):
  """config.json has a million layers."""
  edit(place.case / "config.json", model__layers=10**6)


@target("transformer", "export", "report", "resume")
def config_fifo(place):
  """config.json is a pipe."""
  fifo(place.case / "config.json")


@target("transformer", "export")
def origin_fifo(place):
  """origin.json is a pipe."""
  fifo(place.case / "origin.json")


@target("transformer", "resume", "report")
def metrics_fifo(place):
  """metrics.jsonl is a pipe."""
  fifo(place.case / "metrics.jsonl")


@target("transformer", "generate")
def tokenizer_fifo(place):
  """The tokenizer is a pipe."""
  fifo(place.case / "tokenizer.model")


@target("transformer", "evaluate", "generate", "resume")
def origin_list(place):
  """origin.json is a list."""
  (place.case / "origin.json").write_text("[1]")


@target("transformer", "evaluate", "resume")
def origin_nested(place):
  """origin.json is nested 100,000 deep."""
  nested(place.case / "origin.json")


@target("calm", "generate", "export")
def origin_start_patch(place):
  """The start patch of generation was edited."""
  edit(place.case / "origin.json", start_patch=[9, 8, 7, 6])


@target("calm", "generate")
def origin_start_patch_text(place):
  """The start patch of generation is not a list of tokens."""
  edit(place.case / "origin.json", start_patch="abcd")


@target("calm", "generate")
def origin_start_patch_beyond(place):
  """The start patch of generation holds tokens outside the vocabulary."""
  edit(place.case / "origin.json", start_patch=[10**9, -1, 3, 4])


@target("transformer", "generate", "export")
def origin_eos(place):
  """origin.json names another EOS token."""
  edit(place.case / "origin.json", eos_id=9)


@target("transformer", "generate", "export")
def origin_eos_beyond(place):
  """origin.json names an EOS token outside the vocabulary."""
  edit(place.case / "origin.json", eos_id=10**6)


@target("transformer", "generate")
def origin_vocab_text(place):
  """The vocabulary's size in origin.json is text."""
  edit(place.case / "origin.json", vocab_size="many")


@target("transformer", "resume", "evaluate")
def origin_store_hash(place):
  """origin.json names another store."""
  edit(place.case / "origin.json", store_hash="0" * 16)


@target("calm", "evaluate", "resume")
def origin_autoencoder_fingerprint(place):
  """origin.json names another autoencoder."""
  edit(place.case / "origin.json", autoencoder_fingerprint="00000000")


@target("transformer", "generate", "export")
def tokenizer_swapped(place):
  """The workdir's tokenizer was replaced by another of the same size."""
  replace(place.case / "tokenizer.model", place.root / "other_store/tokenizer.model")


@target("transformer", "resume", must_report=True)
def tokenizer_swapped_before_a_restart(place):
  """The workdir's tokenizer was replaced by another of the same size; training resumes."""
  replace(place.case / "tokenizer.model", place.root / "other_store/tokenizer.model")


@target("transformer", "generate", "export", "resume")
def tokenizer_and_its_hash_swapped(place):
  """The tokenizer and its hash in origin.json were replaced by another's."""
  manifest = json.loads((place.root / "other_store/manifest.json").read_text())
  other = manifest["tokenizer"]["sha256"][:16]
  replace(place.case / "tokenizer.model", place.root / "other_store/tokenizer.model")
  edit(place.case / "origin.json", tokenizer_hash=other)


@target("autoencoder", "export", "resume")
def garbage_seal(place):
  """seal.json holds garbage."""
  (place.case / "seal.json").write_text("[1, ")
