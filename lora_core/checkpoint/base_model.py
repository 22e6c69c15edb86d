"""Where the small base model lies that ships with the package (docs/base-model.md)."""

from pathlib import Path


def base_model_path() -> Path:
    """Folder of the shipped model: Hugging Face layout, weights in bfloat16, and its recipe.json.

    Raises:
        FileNotFoundError: the installation lacks the folder.
    """
    folder = Path(__file__).parent.parent / "base_model"
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(
            f"no base model in {folder}: install lora-core anew, or make one with "
            "`lora-core pretrain`"
        )
    return folder
