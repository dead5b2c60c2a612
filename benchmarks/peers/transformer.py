"""The baseline in PyTorch: tokens [B, S] -> cross-entropy."""

import transformers
from torch import nn

from benchmarks import jobs, torch_parts


class Model(nn.Module):
  """A Llama of transformers, of initial values, with its own loss."""

  def __init__(self, job: jobs.BenchmarkJob):
    super().__init__()
    sizes = torch_parts.llama(job.run.model, job.vocab_size, job.run.data.context)
    self.llama = transformers.LlamaForCausalLM(sizes)

  def forward(self, token_BS):
    return self.llama(input_ids=token_BS, labels=token_BS).loss
