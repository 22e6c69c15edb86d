"""Triton kernels: imported where one is launched, never by `import lora_kernels`."""
