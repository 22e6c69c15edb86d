"""lora_kernels."""
