"""lora_core."""
