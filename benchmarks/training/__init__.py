"""Training against transformers + PEFT + bitsandbytes: tokens a second and peak memory."""
