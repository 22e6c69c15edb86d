"""The command line: one file a verb, dispatched by `lora_core.cli.main`."""
