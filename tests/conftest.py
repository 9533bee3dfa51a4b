"""Runs before any test module: where JAX computes and caches, and type checks on our imports."""

import importlib.metadata
import os
import pathlib
import sys

import jaxtyping

VERSION = importlib.metadata.version("jaxlib")
ROOT = pathlib.Path(__file__).resolve().parents[1]
# JAX writes cache entries in place, so every xdist worker keeps its own folder.
WORKER = os.environ.get("PYTEST_XDIST_WORKER", "main")

# Inherited by the processes that tests start; a caller's own values win.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
# The process that starts the workers has set its own folder, and they inherit it.
OURS = str(ROOT / ".pytest_cache" / "jax_")
if os.environ.get("JAX_COMPILATION_CACHE_DIR", OURS).startswith(OURS):
  os.environ["JAX_COMPILATION_CACHE_DIR"] = OURS + WORKER
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
# Kernels by the older emitters of XLA's CPU compiler, in a third of the time. Not for a version
# that may have dropped them, nor for commands in processes of their own, which run as a user's do.
QUICK = " --xla_cpu_use_fusion_emitters=false" * VERSION.startswith(("0.10.", "0.11."))
os.environ.setdefault("XLA_FLAGS", f"--xla_force_host_platform_device_count=8{QUICK}")
os.environ.setdefault("MPLBACKEND", "agg")

for module in ("jax", "hybridlm"):
  if module in sys.modules:
    raise RuntimeError(f"{module} was imported before tests/conftest.py could set it up")

jaxtyping.install_import_hook("hybridlm", "beartype.beartype")
