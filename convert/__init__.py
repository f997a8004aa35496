"""Checkpoints in other forms. Every route goes through one: full fp32 weights in one safetensors file."""
