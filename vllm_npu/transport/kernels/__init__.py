"""Triton kernels. Importing a module of this folder needs Triton; launching a kernel needs an NVIDIA GPU."""
