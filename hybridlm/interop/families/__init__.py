"""Families of published models: one module a family, each a table and two config functions."""

from collections.abc import Mapping

from hybridlm.interop.families import (
  bamba,
  falcon_h1,
  granitemoehybrid,
  llama,
  mamba2,
  nemotron,
  nemotron_h,
)
from hybridlm.interop.families.table import Family

# By `model_type`, in the order in which an export that names no family tries them.
FAMILIES: Mapping[str, Family] = {
  family.name: family
  for family in (
    mamba2.FAMILY,
    nemotron_h.FAMILY,
    llama.FAMILY,
    nemotron.FAMILY,
    bamba.FAMILY,
    granitemoehybrid.FAMILY,
    falcon_h1.FAMILY,
    mamba2.ORIGINAL,
  )
}
