"""`data/backbones/<backbone>/backbone.json`: what is known of a backbone, read without its weights and without torch."""

import json
from pathlib import Path

DESCRIPTION = "backbone.json"
KEYS = ("name", "architecture", "model_args", "transform", "weights_sha256", "source", "licence", "planted")
LAYOUT = ("trained_registers", "mlp_widths")  # a number; neurons of each block's MLP


def read_description(folder: Path) -> dict:
    """What `backbone.json` in the folder says.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is not such a description, or a key is missing.
    """
    path = folder / DESCRIPTION
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing; a backbone is a folder made by the backbone stage")
    try:
        info = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON ({error}); run the backbone stage again") from error
    if not isinstance(info, dict):
        raise ValueError(f"{path} holds a {type(info).__name__}, expected an object; run the backbone stage again")
    if missing := [key for key in (*KEYS, *LAYOUT) if key not in info]:
        raise ValueError(f"{path} lacks {', '.join(missing)}; run the backbone stage again")
    return info
