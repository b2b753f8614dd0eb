"""Triton kernels: antidiagonal scores, block selection, block-sparse attention. The only package that imports triton."""
