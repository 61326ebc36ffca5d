"""Carrying out operations in one streaming pass: `reference` in torch, `cpu` in numba, `gpu` in Triton."""
