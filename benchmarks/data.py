"""Measure the two data stages and batch loading against their bars: memory, throughput, disk,
waiting.

In: text files of your own. Out: one line a measurement, with its bar and whether it holds. Rates
stand beside a reference that runs in the same process, the two in turn: the median of their ratios
counts.

    uv run benchmarks/data.py memory corpus/*.parquet
        create_shard.py over 0.2, 0.6 and 2 GB
    uv run benchmarks/data.py write corpus/*.parquet
        text shards beside reading with pyarrow alone
    uv run benchmarks/data.py tokenizer-memory corpus/*.parquet
        train_tokenizer.py on 1 GB, and its refusal
    uv run benchmarks/data.py encode corpus/*.parquet
        token shards beside one big encode_batch
    uv run benchmarks/data.py loading corpus/*.parquet
        batches beside the training steps that take them
    uv run benchmarks/data.py tokenizer prose.parquet maths.parquet --gpt2 FOLDER
                                                                      bytes per token on held-out
                                                                      text, each file apart
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import psutil
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import config as settings  # noqa: E402
import train_tokenizer  # noqa: E402
from config import PRESETS, Config, DataConfig, TextSource  # noqa: E402
from hearth import cli, log  # noqa: E402
from hearth.data import ingest, shard_folder, sources, token_shards  # noqa: E402
from hearth.data.tokenizer import Tokenizer  # noqa: E402
from hearth.training import loop  # noqa: E402
from hearth.training.batches import PretrainingBatches  # noqa: E402
from model import Model, build_model  # noqa: E402

SHARD_MEMORY = 1.0e9  # bars: bytes, bytes, and shares of the reference
TOKENIZER_MEMORY = 4.0e9
WRITE_SHARE, ENCODE_SHARE, EXTRA_DISK, WAITING = 0.5, 0.9, 0.1, 0.01
ROUNDS = 3  # of measurement and reference, in turn
STEPS = 20  # batches loaded


def main() -> None:
    """Run the measurement that the command line names."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=list(MEASUREMENTS))
    parser.add_argument("files", nargs="+", help="text files, folders or globs")
    parser.add_argument(
        "--gb", type=float, nargs="+", help="sizes to measure at, in 10^9 bytes of text"
    )
    parser.add_argument("--vocab-size", type=int, default=32_768)
    parser.add_argument(
        "--gpt2", help="folder with GPT-2's vocab.json and merges.txt, for the tokenizer"
    )
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=".", prefix=".benchmark-") as folder:
        MEASUREMENTS[options.what](options, Path(folder).absolute())


def verdict(title: str, value: str, bar: str, holds: bool) -> None:
    """One line of the report."""
    log.say(f"{title:<48} {value:>22}   bar {bar:<8} {'holds' if holds else 'MISSED'}")


# -------------------------------------------------------------------------------------------- input


def documents(files: list[str]) -> Iterator[str]:
    yield from sources.text_documents(TextSource(name="input", files=tuple(files)))


def enlarged(files: list[str], gb: float, folder: Path) -> Path:
    """A parquet file of `gb` of text: the documents over and over, each time with another last
    line.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = folder / f"{gb:g}.parquet"
    left, round_ = gb * 1e9, 0
    with pq.ParquetWriter(path, pa.schema([("text", pa.string())])) as writer:
        while left > 0:
            batch: list[str] = []
            for text in documents(files):
                batch.append(f"{text}\n(copy {round_})" if round_ else text)
                left -= len(batch[-1].encode())
                if len(batch) == 1000 or left <= 0:
                    writer.write_table(pa.table({"text": batch}))
                    batch = []
                if left <= 0:
                    break
            if batch:
                writer.write_table(pa.table({"text": batch}))
            round_ += 1
    return path


def watched(command: list[str], folder: Path) -> tuple[float, float, float]:
    """Run a command; (peak resident bytes, seconds, most bytes under `folder` beyond those at the
    end).
    """
    started, most, peak = time.monotonic(), 0, 0.0
    process = subprocess.Popen(command, cwd=ROOT)
    while process.poll() is None:
        peak = max(peak, resident_peak(process.pid))
        most = max(most, folder_bytes(folder))
        time.sleep(0.05)
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} ended with {process.returncode}")
    at_end = folder_bytes(folder)
    return peak, time.monotonic() - started, (most - at_end) / at_end


def resident_peak(pid: int) -> float:
    """Most resident bytes of a process so far; where the system keeps no such mark, those of this
    moment.
    """
    try:
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return 1024.0 * int(line.split()[1])
        return float(psutil.Process(pid).memory_info().rss)
    except (OSError, psutil.Error):  # it ended meanwhile
        return 0.0


def folder_bytes(folder: Path) -> int:
    total = 0
    for path in folder.rglob("*"):
        try:
            total += path.stat().st_size if path.is_file() else 0
        except FileNotFoundError:
            continue
    return total


def script(name: str, folder: Path, *words: str, validation_share: float = 0.005) -> list[str]:
    chat = ["--sft1.files", str(folder / "chat.jsonl"), "--sft2.files", str(folder / "chat.jsonl")]
    (folder / "chat.jsonl").write_text(
        '{"prompt": "a", "completion": "b"}\n{"prompt": "c", "completion": "d"}\n'
    )
    runs = ["--preset", "16gb", "--runs", str(folder / "runs")]
    runs += ["--data.validation_share", str(validation_share)]
    return [sys.executable, str(ROOT / name), *runs, *chat, *words]


# ------------------------------------------------------------------------------------- measurements


def memory(options: argparse.Namespace, folder: Path) -> None:
    """Peak resident memory and extra disk of create_shard.py, over growing input."""
    for gb in options.gb or (0.2, 0.6, 2.0):
        path = enlarged(options.files, gb, folder)
        peak, seconds, extra = watched(
            script("create_shard.py", folder, "--data.text_files", str(path)), folder / "runs"
        )
        title = f"create_shard.py, {gb:g} GB in {log.duration(seconds)}"
        verdict(
            f"{title}: peak memory", log.size(peak), log.size(SHARD_MEMORY), peak <= SHARD_MEMORY
        )
        verdict(f"{title}: extra disk", f"{extra:.1%}", f"{EXTRA_DISK:.0%}", extra < EXTRA_DISK)
        path.unlink()
        shutil.rmtree(folder / "runs")


def tokenizer_memory(options: argparse.Namespace, folder: Path) -> None:
    """Peak resident memory and extra disk of train_tokenizer.py, on growing samples."""
    for gb in options.gb or (1.0,):
        path = enlarged(options.files, 1.02 * gb, folder)
        words = ["--data.text_files", str(path), "--tokenizer.sample_mb", str(round(1000 * gb))]
        watched(script("create_shard.py", folder, *words), folder / "runs")
        peak, seconds, extra = watched(
            script("train_tokenizer.py", folder, *words), folder / "runs"
        )
        title = f"train_tokenizer.py, {gb:g} GB in {log.duration(seconds)}"
        verdict(
            f"{title}: peak memory",
            log.size(peak),
            log.size(TOKENIZER_MEMORY),
            peak <= TOKENIZER_MEMORY,
        )
        verdict(f"{title}: extra disk", f"{extra:.1%}", f"{EXTRA_DISK:.0%}", extra < EXTRA_DISK)
        least, per_byte = train_tokenizer.TRAINING_MEMORY
        asked = least + per_byte * gb * 1e9
        verdict(
            f"{title}: what it asks for", log.size(asked), log.size(TOKENIZER_MEMORY), peak <= asked
        )
        path.unlink()
        shutil.rmtree(folder / "runs")
    try:
        # a sample as large as all that is free
        train_tokenizer.require_memory(train_tokenizer.free_memory())
        verdict("a sample beyond this machine's memory", "was begun", "refusal", False)
    except settings.UserError as refusal:
        log.say(f"  {refusal}")
        verdict("a sample beyond this machine's memory", "was refused", "refusal", True)


def write(options: argparse.Namespace, folder: Path) -> None:
    """Text shards from parquet, beside reading the same column with pyarrow alone."""
    import pyarrow.parquet as pq

    path = enlarged(options.files, (options.gb or [0.3])[0], folder)
    data = DataConfig(text_files=(str(path),))

    def reference() -> float:
        return sum(batch.nbytes for batch in pq.ParquetFile(path).iter_batches(columns=["text"]))

    def ours() -> float:
        shutil.rmtree(folder / "text", ignore_errors=True)
        manifest = ingest.write_text_shards(
            TextSource(name="own", files=(str(path),)), folder / "text", data
        )
        return sum(split["text_bytes"] for split in manifest["splits"].values())

    compare("text shards", "pyarrow reading", ours, reference, WRITE_SHARE)


def encode(options: argparse.Namespace, folder: Path) -> None:
    """Token shards from text shards, beside `encode_batch` on one big list of the same texts."""
    config = small_run(folder, enlarged(options.files, (options.gb or [0.03])[0], folder))
    corpus, tokenizer, texts = text_and_tokenizer(config, options.vocab_size)
    backend = tokenizer._backend
    n_bytes = sum(len(text.encode()) for text in texts)
    total = sum(corpus.text_bytes(split) for split in shard_folder.SPLITS)

    def reference() -> float:
        backend.encode_batch(texts, add_special_tokens=False)
        return n_bytes

    def ours() -> float:
        shutil.rmtree(corpus.tokens, ignore_errors=True)
        train_tokenizer.encode_corpus(
            tokenizer, corpus, config.tokenizer.shard_tokens, verify=False
        )
        return total

    compare("token shards", "encode_batch", ours, reference, ENCODE_SHARE)


def text_and_tokenizer(
    config: Config, vocab_size: int
) -> tuple[train_tokenizer.Corpus, Tokenizer, list[str]]:
    """The text shards of the run's one corpus, a tokenizer from its first documents, and its
    training documents.
    """
    source = config.data.corpora()[0]
    ingest.write_text_shards(source, config.run_dir / "text" / source.name, config.data)
    corpus = train_tokenizer.open_corpus(source, config, verify=False)
    texts = [text for texts in corpus.batches("train") for text in texts]
    return corpus, Tokenizer.train([texts[:500]], vocab_size), texts


def small_run(folder: Path, path: Path) -> Config:
    preset = PRESETS["16gb"]
    return replace(preset, runs=str(folder / "runs"), data=DataConfig(text_files=(str(path),)))


def compare(
    name: str, other: str, ours: Callable[[], float], reference: Callable[[], float], bar: float
) -> None:
    """Run both in turn and report the median ratio of their rates."""
    reference()  # the files are in the page cache and the libraries loaded before anything counts
    ours()
    ratios = []
    for _ in range(ROUNDS):
        there, here = rate(reference), rate(ours)
        log.say(f"  {name} {here:7.1f} MB/s, {other} {there:7.1f} MB/s")
        ratios.append(here / there)
    share = statistics.median(ratios)
    verdict(f"{name} beside {other}", f"{share:.0%}", f"{bar:.0%}", share >= bar)


def rate(job: Callable[[], float]) -> float:
    """10^6 bytes a second."""
    started = time.monotonic()
    return job() / (time.monotonic() - started) / 1e6


def loading(options: argparse.Namespace, folder: Path) -> None:
    """Seconds inside `batch(step)` beside the seconds of the step: demo and 16gb, on this machine's
    processor.

    The faster the device, the more loading weighs: the last line says how fast one may train before
    it is 1%.
    """
    config = small_run(folder, enlarged(options.files, (options.gb or [0.1])[0], folder))
    corpus, tokenizer, _ = text_and_tokenizer(config, options.vocab_size)
    train_tokenizer.encode_corpus(tokenizer, corpus, config.tokenizer.shard_tokens, verify=False)
    for preset in ("demo", "16gb"):
        shape = PRESETS[preset]
        loop = replace(shape.pretrain, steps=STEPS + 1)
        forget_pages(corpus.tokens)
        cold, warm = (
            loading_seconds(corpus.tokens, shape.model.context, loop, tokenizer.bos)
            for _ in range(2)
        )
        waiting = max(cold, warm)
        step = step_seconds(shape, loop.tokens_per_step)
        log.say(
            f"  {preset}: a batch in {1e3 * cold:.2f} ms from the disk, {1e3 * warm:.2f} ms from "
            "memory"
        )
        title = f"waiting for data, {preset}, step of {step:,.1f} s"
        verdict(
            title,
            f"{waiting / (waiting + step):.4%}",
            f"{WAITING:.0%}",
            waiting < WAITING * (waiting + step),
        )
        fastest = WAITING * loop.tokens_per_step / waiting
        log.say(
            f"  {preset}: loading is below {WAITING:.0%} of the step up to {log.count(fastest)} "
            "tokens per second"
        )


def forget_pages(folder: Path) -> None:
    """Take the shards out of the page cache, where the system lets one."""
    for path in folder.glob("*.npy"):
        with path.open("rb") as file:
            os.fsync(file.fileno())
            if hasattr(os, "posix_fadvise"):
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def loading_seconds(folder: Path, context: int, loop: settings.PretrainConfig, bos: int) -> float:
    """The mean over `STEPS` steps of the time inside `batch(step)`, after a first one that draws
    the permutation.
    """
    train = token_shards.TokenShards(folder, "train")
    batches = PretrainingBatches([train], [1.0], loop, context=context, bos=bos, seed=0)
    batches.batch(0)
    started = time.perf_counter()
    for step in range(1, STEPS + 1):
        batches.batch(step)
    return (time.perf_counter() - started) / STEPS


def step_seconds(config: Config, n_tokens: int) -> float:
    """Forward and backward of 256 random tokens, times those in `n_tokens`."""
    model: Model = build_model(config.model, seed=0, device=torch.device("cpu"))
    n = 256
    ids = torch.randint(config.model.vocab_size, (n,), generator=torch.Generator().manual_seed(0))
    starts = torch.arange(n) == 0
    batch = loop.Batch(ids, ids.roll(-1), torch.ones(n), starts, n)
    seconds = []
    for _ in range(ROUNDS):
        started = time.perf_counter()
        loop.accumulate(model, batch, n)
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds) * n_tokens / n


def tokenizer_report(options: argparse.Namespace, folder: Path) -> None:
    """The two stages over each file as a corpus of its own; train_tokenizer.py prints the report on
    held-out text.
    """
    words = [
        "--data.text_files",
        *options.files,
        "--data.text_weights",
        *["1"] * len(options.files),
    ]
    words += ["--model.vocab_size", str(options.vocab_size)]
    for number, name in enumerate(options.files):
        log.say(f"own-{number} is {name}")
    watched(script("create_shard.py", folder, *words, validation_share=0.02), folder / "runs")
    gpt2 = ["--gpt2", options.gpt2] if options.gpt2 else []
    watched(
        script("train_tokenizer.py", folder, *words, *gpt2, validation_share=0.02), folder / "runs"
    )


MEASUREMENTS = {
    "memory": memory,
    "write": write,
    "tokenizer-memory": tokenizer_memory,
    "encode": encode,
    "loading": loading,
    "tokenizer": tokenizer_report,
}

if __name__ == "__main__":
    cli.run_script(main, "stopped.")
