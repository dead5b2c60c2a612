"""A device's kind, as JAX names it -> its published peak in FLOP/s, the denominator of MFU."""

from calm_jax.planning.compiled import topologies

# Dense bfloat16 FLOP/s, without sparsity, by the start of the kind. Source: NVIDIA's data sheets.
_GPUS = {
  "NVIDIA H200": 989.4e12,
  "NVIDIA H100 80GB HBM3": 989.4e12,
  "NVIDIA H100 PCIe": 756.5e12,
  "NVIDIA A100": 312e12,
}
_TPUS = {
  "TPU v4": "v4",
  "TPU v5 lite": "v5e",
  "TPU v5e": "v5e",
  "TPU v5": "v5p",
  "TPU v6 lite": "v6e",
  "TPU v6e": "v6e",
  "TPU7x": "7x",
}


def of(kind: str) -> float | None:
  """Returns the peak FLOP/s of a device, None if it is not in the tables."""
  for start, peak in _GPUS.items():
    if kind.startswith(start):
      return peak
  for start, name in _TPUS.items():
    if kind.startswith(start):
      chip = topologies.CHIPS[name]
      return chip.peak / chip.devices
  return None
