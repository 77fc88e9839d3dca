"""Take a trained model elsewhere: a folder for transformers and vLLM, files for llama.cpp and
ollama, a page for a browser.

In: a checkpoint, the run's furthest unless another is named. Out: a new folder. Any shape goes to
transformers, with its own code; the portable shape (--model.shape portable) is a Qwen3, which
loads without any and goes to llama.cpp and onnxruntime too.

    uv run export_model.py --preset demo --to huggingface demo-hf
    uv run export_model.py --preset demo --name portable --to gguf demo-gguf
    uv run export_model.py --preset demo --name portable --to onnx demo-page
    uv run export_model.py --preset demo --checkpoint base --to huggingface demo-base-hf
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from config import Config, UserError
from hearth import cli, log, run
from hearth.cli import portable
from hearth.export import gguf, huggingface, onnx, qwen3
from hearth.training import checkpoint


@dataclass(frozen=True)
class Options:
    """What only this script knows."""

    # huggingface, gguf or onnx, and the new folder
    to: tuple[Literal["huggingface", "gguf", "onnx"], str] | None = None
    # a stage of the run (base sft1 sft2), or a checkpoint's folder; none is the furthest stage
    checkpoint: str | None = None


SCRIPT = cli.Script(__doc__, Options())


def main(config: Config, options: Options) -> None:
    """Write the folder asked for and say what is in it."""
    if options.to is None:
        raise UserError("Say what to write and where: --to huggingface FOLDER, gguf or onnx.")
    kind, out = options.to[0], Path(options.to[1])
    source = run.find_checkpoint(options.checkpoint, config)
    loaded = checkpoint.load_for_inference(source)
    if kind != "huggingface":
        model = loaded.config.model
        other = replace(loaded.config, runs=config.runs, name="portable", model=portable(model))
        qwen3.refuse_others(model, run.command(other, "run_pipeline.py"))
    {"huggingface": huggingface, "gguf": gguf, "onnx": onnx}[kind].write(source, loaded, out)
    log.say(f"{source} is now in {out}:")
    for file in sorted(path for path in out.rglob("*") if path.is_file()):
        log.say(f"  {file.relative_to(out)}  {log.size(file.stat().st_size)}")


if __name__ == "__main__":
    cli.run_script(lambda: main(*run.parse(SCRIPT)), "stopped; nothing was written.")
