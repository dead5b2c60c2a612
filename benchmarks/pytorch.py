"""A plain PyTorch loop's training steps, as a contender; the models are those of `peers/`."""

import contextlib
import importlib
import pathlib
from collections.abc import Callable
from typing import Any

import torch
import transformers
from torch import nn

from benchmarks import jobs
from calm_jax import errors

PEERS = pathlib.Path(__file__).parent / "peers"


def model(job: jobs.BenchmarkJob) -> nn.Module:
  """Returns the model of a job's stage, of initial values: tokens [B, S] -> loss.

  Raises:
    CalmError: if no file of `peers/` has the stage's name.
  """
  stage = job.run.stage
  if not (PEERS / f"{stage}.py").is_file():
    raise errors.CalmError(f"no PyTorch model of stage {stage!r}: no benchmarks/peers/{stage}.py")
  return importlib.import_module(f"benchmarks.peers.{stage}").Model(job)


class Steps:
  """Forward, backward, clip, AdamW. Batches are on the device already."""

  def __init__(self, job: jobs.BenchmarkJob, compiled: bool):
    run, settings = job.run, job.run.optimizer
    torch.manual_seed(run.training.seed)
    self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    self._parts, self._clip = run.training.accumulation, settings.clip_norm
    self._uses_bfloat16 = run.training.compute_dtype == "bfloat16"
    module = model(job).to(self._device).train()
    self._params = [p for p in module.parameters() if p.requires_grad]
    groups = [
      {"params": [p for p in self._params if p.dim() > 1], "weight_decay": settings.weight_decay},
      {"params": [p for p in self._params if p.dim() <= 1], "weight_decay": 0.0},
    ]
    self._optimizer = torch.optim.AdamW(
      groups, settings.learning_rate, (settings.b1, settings.b2), settings.eps, fused=True
    )
    self._loss = torch.compile(module) if compiled else module
    shape = (run.training.batch, run.data.context)
    self._tokens = torch.randint(0, job.vocab_size, shape, device=self._device)

  def dispatch(self) -> Callable[[], None] | None:
    for part in self._tokens.chunk(self._parts):
      context = contextlib.nullcontext()
      if self._uses_bfloat16:
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
