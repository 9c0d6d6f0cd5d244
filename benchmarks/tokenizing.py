"""Compare `jetmoe data tokenize` with the libraries that it uses and with Megatron-LM's own tool, in one run.

    python -m benchmarks.tokenizing --work DIR [--megatron CHECKOUT] [--megabytes 100] [--workers 2] [--repeat 2]

The corpus is the Python sources of the running interpreter's installed packages; the tokenizer, a BPE of 4096 ids,
is trained on a part of it by our own command. Each runs on the same cores in a separate process, and all must give the
same token ids. Megatron-LM's tool is measured if a checkout is given; what it imports must be installed or on
PYTHONPATH. Writes the table to benchmarks/results/tokenize.md.
"""

import argparse
import datetime
import hashlib
import importlib.metadata
import json
import os
import platform
import shutil
import subprocess
import sys
import sysconfig
import time
from dataclasses import dataclass
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
RESULTS = REPOSITORY / "benchmarks" / "results" / "tokenize.md"
EOD = 2
TRAINING_BYTES = 20_000_000
LIMIT = 1800  # seconds a command may take


@dataclass
class Row:
    name: str
    seconds: float
    cpu_seconds: float  # of all its processes
    peak_bytes: int  # memory of its largest process
    load: float  # of the machine at the start, mean of one minute
    digest: str  # of the token ids


def main(work: Path, megatron: Path | None, megabytes: int, workers: int, repeat: int) -> None:
    work.mkdir(parents=True, exist_ok=True)
    corpus, text_bytes, documents = make_corpus(work, megabytes * 10**6)
    tokenizer = make_tokenizer(work, corpus)
    environment = {**os.environ, "RAYON_NUM_THREADS": str(workers), "OMP_NUM_THREADS": "1"}
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:workers])  # and so for all processes below

    def measure(name: str, command: list[str], prefix: Path, environment: dict[str, str] = environment) -> Row:
        rows = [measure_once(name, command, prefix, environment) for _ in range(repeat)]
        return min(rows, key=lambda row: row.seconds)

    def ours(name: str, *options: str) -> Row:
        prefix = work / "ours"
        command = [sys.executable, "-m", "data_tools", "tokenize", str(corpus), "--tokenizer", str(tokenizer)]
        command += ["--output", str(prefix), "--workers", str(workers), "--overwrite", *options]
        return measure(f"`jetmoe data tokenize`, {workers} workers{name}", command, prefix)

    def library(name: str, call: str) -> Row:
        command = [
            sys.executable,
            "-m",
            "benchmarks.tokenizing",
            "--library",
            name,
            str(corpus),
            str(tokenizer),
            str(work / name),
        ]
        return measure(f"`{call}` alone, {workers} threads, nothing parsed or written", command, work / name)

    rows = [
        ours(""),
        ours(", `--engine tokenizers`", "--engine", "tokenizers"),
        library("fastokens", "fastokens encode_batch_flat"),
        library("tokenizers", "tokenizers encode_batch_fast"),
    ]
    startup = 0.0
    if megatron is not None:
        paths = [str(megatron), *filter(None, [os.environ.get("PYTHONPATH")])]
        settings = {**environment, "PYTHONPATH": ":".join(paths)}

        def theirs(source: Path) -> Row:
            command = [sys.executable, str(megatron / "tools" / "preprocess_data.py"), "--input", str(source)]
            command += ["--output-prefix", str(work / "theirs"), "--workers", str(workers), "--append-eod"]
            command += ["--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model", str(plain(tokenizer))]
            name = f"Megatron-LM `tools/preprocess_data.py`, {workers} workers"
            return measure(name, command, work / "theirs_text_document", settings)

        startup = theirs(part_of(corpus, work / "one.jsonl", 1)).seconds
        rows.append(theirs(corpus))
    different = [row.name for row in rows if row.digest != rows[0].digest]
    if different:
        raise SystemExit(f"token ids differ from ours: {', '.join(different)}")
    report = describe(rows, text_bytes, documents, startup, megatron, megabytes, workers, repeat)
    RESULTS.write_text(report)
    print(report)


def make_corpus(work: Path, limit: int) -> tuple[Path, int, int]:
    """Write the first sources, about `limit` bytes of text, as JSON lines. Returns file, bytes of text, documents."""
    corpus = work / "corpus.jsonl"
    documents = text_bytes = 0
    with open(corpus, "w") as stream:
        for path in sorted(Path(sysconfig.get_path("purelib")).rglob("*.py")):
            try:
                text = path.read_bytes().decode()
            except (UnicodeDecodeError, OSError):
                continue
            if text.strip() and text_bytes < limit:
                stream.write(json.dumps({"text": text, "source": path.name}) + "\n")
                documents += 1
                text_bytes += len(text.encode())
    return corpus, text_bytes, documents


def part_of(corpus: Path, part: Path, size: int) -> Path:
    """The first lines of a corpus, at least size bytes."""
    with open(corpus) as stream:
        part.write_text("".join(stream.readlines(size)))
    return part


def make_tokenizer(work: Path, corpus: Path) -> Path:
    folder, part = work / "tokenizer", part_of(corpus, work / "part.jsonl", TRAINING_BYTES)
    command = [sys.executable, "-m", "data_tools", "tokenizer", str(part), "--output", str(folder)]
    subprocess.run([*command, "--vocab-size", "4096", "--overwrite"], cwd=REPOSITORY, check=True, timeout=LIMIT)
    return folder


def plain(tokenizer: Path) -> Path:
    """A copy that encodes special tokens spelled in a text as plain text, as our command does."""
    folder = tokenizer.with_name("tokenizer-plain")
    shutil.copytree(tokenizer, folder, dirs_exist_ok=True)
    config = folder / "tokenizer_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "split_special_tokens": True}))
    return folder


def measure_once(name: str, command: list[str], prefix: Path, environment: dict[str, str]) -> Row:
    load = os.getloadavg()[0]
    start = time.perf_counter()
    with open(os.devnull, "w") as nowhere:
        process = subprocess.Popen(command, cwd=REPOSITORY, env=environment, stdout=nowhere, stderr=subprocess.STDOUT)
        _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - start
    if status:
        raise SystemExit(f"failed: {' '.join(command)}")
    digest = hashlib.sha256(prefix.with_suffix(".bin").read_bytes()).hexdigest()
    cpu_seconds = usage.ru_utime + usage.ru_stime
    if (timed := prefix.with_suffix(".seconds")).exists():  # of a library's call only
        seconds, cpu_seconds = map(float, timed.read_text().split())
    return Row(name, seconds, cpu_seconds, usage.ru_maxrss * 1024, load, digest)


def encode(name: str, corpus: Path, tokenizer: Path, prefix: Path) -> None:
    """Encode all texts in memory with one library and record that time. Then write the ids as our command does."""
    import numpy as np

    texts = [json.loads(line)["text"] for line in corpus.open("rb")]
    path, documents = str(tokenizer / "tokenizer.json"), []
    batches = [texts[start : start + 64] for start in range(0, len(texts), 64)]
    seconds = cpu_seconds = 0.0
    if name == "fastokens":
        from fastokens import Tokenizer

        model = Tokenizer.from_file(path)
        for batch in batches:
            start, cpu_start = time.perf_counter(), time.process_time()
            ids, offsets = model.encode_batch_flat(batch, split_special_tokens=True)
            seconds += time.perf_counter() - start
            cpu_seconds += time.process_time() - cpu_start
            bounds = np.frombuffer(offsets, np.int64)
            documents += np.split(np.frombuffer(ids, np.uint32), bounds[1:-1])
    else:
        from tokenizers import Tokenizer

        model = Tokenizer.from_file(path)
        model.encode_special_tokens = True
        for batch in batches:
            start, cpu_start = time.perf_counter(), time.process_time()
            encodings = model.encode_batch_fast(batch, add_special_tokens=False)
            seconds += time.perf_counter() - start
            cpu_seconds += time.process_time() - cpu_start
            documents += [np.array(encoding.ids) for encoding in encodings]
    with open(prefix.with_suffix(".bin"), "wb") as stream:
        for document in documents:
            stream.write(np.append(document, EOD).astype(np.uint16).data)
    prefix.with_suffix(".seconds").write_text(f"{seconds} {cpu_seconds}")


def describe(
    rows: list[Row],
    text_bytes: int,
    documents: int,
    startup: float,
    megatron: Path | None,
    megabytes: int,
    workers: int,
    repeat: int,
) -> str:
    def rate(row: Row) -> float:
        return text_bytes / 1e6 / row.seconds

    ours = rows[0]
    lines = [
        "# Rates of tokenization",
        "",
        f"{documents} Python sources, {text_bytes / 1e6:.1f} MB of text; BPE of 4096 ids; {workers} cores.",
        "The token ids are the same in all rows.",
        f"A command's time is all of it, from its start to its end; the best of {repeat} runs.",
        "The processor's time is that of all its processes, and depends less on what else runs on the machine.",
        "",
        "| what | seconds | MB/s | our command is faster by | processor seconds | less by | memory, MB | load |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        numbers = [f"{row.seconds:.2f}", f"{rate(row):.1f}", f"{rate(ours) / rate(row):.1f}"]
        numbers += [f"{row.cpu_seconds:.1f}", f"{row.cpu_seconds / ours.cpu_seconds:.1f}"]
        lines.append(f"| {row.name} | {' | '.join(numbers)} | {row.peak_bytes / 1e6:.0f} | {row.load:.1f} |")
    lines += ["", "Memory: of the largest process. Load: of the machine before the run, mean of a minute."]
    if megatron is not None:
        steady = text_bytes / 1e6 / (rows[-1].seconds - startup)
        lines += [
            "",
            f"Megatron-LM's tool takes {startup:.1f} s for one document. Without that it does {steady:.1f} MB/s, and "
            f"our command, with its own start, is {rate(ours) / steady:.1f} times as fast.",
        ]
    git = ["git", "-C", str(REPOSITORY)]
    commit = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    changed = subprocess.run([*git, "status", "--short", "data_tools"], capture_output=True, text=True).stdout
    names = ("tokenizers", "fastokens", "orjson", "numpy", "transformers", "megatron-core")
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in names)
    lines += [
        "",
        f"- command: `python -m benchmarks.tokenizing --work DIR{' --megatron CHECKOUT' if megatron else ''} "
        f"--megabytes {megabytes} --workers {workers} --repeat {repeat}`",
        f"- commit: {commit}{' with changes in data_tools' if changed else ''}",
        f"- hardware: {cpu()}, {os.cpu_count()} cores, {memory_gib()} GiB, shared with other work: see the loads",
        f"- software: Python {platform.python_version()}, {versions}"
        f"{', Megatron-LM ' + version_of(megatron) if megatron else ''}",
        f"- date: {datetime.date.today()}",
        "",
    ]
    return "\n".join(lines)


def cpu() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def memory_gib() -> int:
    return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30)


def version_of(megatron: Path) -> str:
    values = dict.fromkeys(("MAJOR", "MINOR", "PATCH"), "?")
    for line in (megatron / "megatron" / "core" / "package_info.py").read_text().splitlines():
        name, _, value = line.partition(" = ")
        if name in values:
            values[name] = value.strip()
    return ".".join(values.values())


if __name__ == "__main__":
    if sys.argv[1:2] == ["--library"]:
        name, *paths = sys.argv[2:]
        encode(name, *map(Path, paths))
    else:
        parser = argparse.ArgumentParser(
            description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, prog="benchmarks/tokenizing.py"
        )
        parser.add_argument("--work", type=Path, required=True, help="folder for the corpus and all outputs")
        parser.add_argument("--megatron", type=Path, help="a checkout of Megatron-LM")
        parser.add_argument("--megabytes", type=int, default=100, help="text to encode, at most (100)")
        parser.add_argument("--workers", type=int, default=2, help="processes, and cores (2)")
        parser.add_argument("--repeat", type=int, default=2, help="runs of each; the best counts (2)")
        options = parser.parse_args()
        main(options.work.resolve(), options.megatron, options.megabytes, options.workers, options.repeat)
