"""Take a trained model elsewhere: a folder for transformers and vLLM, files for llama.cpp and
ollama.

In: a checkpoint, the run's furthest unless another is named. Out: a new folder. Any shape goes to
transformers, with its own code; the portable shape (--model.shape portable) is a Qwen3, which
loads without any and goes to llama.cpp too.

    uv run export_model.py --preset demo --to huggingface demo-hf
    uv run export_model.py --preset demo --name portable --to gguf demo-gguf
    uv run export_model.py --preset demo --checkpoint base --to huggingface demo-base-hf
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from config import Config, UserError
from hearth import cli, log
from hearth.export import gguf, huggingface, qwen3
from hearth.training import checkpoint


@dataclass(frozen=True)
class Options:
    """What only this script knows."""

    # huggingface or gguf, and the new folder
    to: tuple[Literal["huggingface", "gguf"], str] | None = None
    # a stage of the run (base sft1 sft2), or a checkpoint's folder; none is the furthest stage
    checkpoint: str | None = None


def main(config: Config, options: Options) -> None:
    """Write the folder asked for and say what to do with it."""
    if options.to is None:
        raise UserError("Say what to write and where: --to huggingface FOLDER or --to gguf FOLDER.")
    kind, out = options.to[0], Path(options.to[1])
    source = find(config, options.checkpoint)
    loaded = checkpoint.load_for_inference(source)
    if kind == "gguf":
        command = replace(config, name="portable").command("run_pipeline.py")
        qwen3.refuse_others(loaded.config.model, f"{command} --model.shape portable")
        gguf.write(source, loaded, out)
    else:
        huggingface.write(source, loaded, out)
    log.say(f"{source} is now in {out}:")
    for file in sorted(out.iterdir()):
        log.say(f"  {file.name}  {log.size(file.stat().st_size)}")


def find(config: Config, name: str | None) -> Path:
    """The checkpoint's folder that `name` means."""
    if name is None:
        return checkpoint.furthest(config)
    for folder in (config.run_dir / name, Path(name)):
        if newest := checkpoint.newest(folder):
            return newest
    return Path(name)


if __name__ == "__main__":
    parsed = cli.parse_cli_with(Options(), __doc__)
    cli.run_script(lambda: main(*parsed), "stopped; nothing was written.")
