"""A public parameter-golf script on the race's data and clock, as it is, for calibration on the card at hand.

    python -m benchmarks.race_peer train_gpt.py --name baseline --data DIR/data-4096 --out DIR [--seconds 180]
        [--batch 262144] [--seq-len 2048] [--seed 1337] [--until REGEX] [--env KEY=VALUE ...]

DATA is a data set of ours (`benchmarks.race` leaves one), whose shards the scripts read as they are; they get links to
them under the names that they look for, and their settings through the environment. The script itself is given: none is
in this repository. Where `flash_attn_interface` is not installed a stand-in takes its place. `--until` ends the script
at the first line that matches: what a record does after its training takes longer than that.

Told are the tokens per second (a median over the logged steps), every validation and the seconds of the whole; the log
is OUT/NAME.log, for `benchmarks.race_plot --log`.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from statistics import median

from benchmarks.race_plot import curve_of
from trainer.data.manifest import DataSet

_STAND_INS = Path(__file__).parent / "stand_ins"
# `train_time` of some scripts is in milliseconds and of some in minutes to one decimal; these say the rate themselves.
_STEP = re.compile(r"(?:step:)?(?P<step>\d+)/\d+ train_loss:.*train_time:\s*(?P<milliseconds>[\d.]+)ms")
_RATE = re.compile(r"\d+/\d+ train_loss:.*tok/s:\s*(?P<rate>[\d.]+)")


def linked(data: Path, folder: Path) -> tuple[DataSet, dict[str, str]]:
    """The data set, and the settings that say where the links to its files are."""
    dataset = DataSet.load(data)
    vocab_size = dataset.manifest.vocab_size
    shards = folder / "datasets" / f"fineweb10B_sp{vocab_size}"
    tokenizer = folder / "tokenizers" / f"fineweb_{vocab_size}_bpe.model"
    shutil.rmtree(folder, ignore_errors=True)
    for path, origin in [
        *((shards / f"fineweb_train_{n:06d}.bin", shard) for n, shard in enumerate(dataset.train_shards)),
        *((shards / f"fineweb_val_{n:06d}.bin", shard) for n, shard in enumerate(dataset.val_shards)),
        (tokenizer, data / "tokenizer.model"),
    ]:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.symlink_to(origin.resolve())
    return dataset, {
        "DATA_DIR": str(folder),
        "DATA_PATH": str(shards),
        "TOKENIZER_PATH": str(tokenizer),
        "VOCAB_SIZE": str(vocab_size),
    }


def rate_of(log: str, batch: int) -> float | None:
    """Tokens per second: the median of what logged steps say, which is a mean since the start, or of what lies between
    two of them."""
    if said := [float(match["rate"]) for match in _RATE.finditer(log)]:
        return median(said)
    steps = [(int(match["step"]), float(match["milliseconds"]) * 1e-3) for match in _STEP.finditer(log)]
    between = [
        batch * (later[0] - earlier[0]) / (later[1] - earlier[1])
        for earlier, later in pairwise(steps)
        if later[0] - earlier[0] > 1  # single steps are those of the beginning
    ]
    return median(between) if between else None


def run(command: list[str], environment: dict[str, str], folder: Path, log: Path, until: str | None) -> int | None:
    """The script's exit status; None if it was ended at a line that matches `until`."""
    process = subprocess.Popen(
        command,
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
    )
    assert process.stdout is not None
    try:
        with log.open("w") as file:
            for line in process.stdout:
                file.write(line)
                file.flush()
                if until is not None and re.search(until, line):
                    return None
        return process.wait()
    finally:  # nor does it outlive this one
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("script", type=Path)
    parser.add_argument("--name", required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=180.0)
    parser.add_argument("--batch", type=int, default=262144)
    parser.add_argument("--seq-len", type=int, default=2048)
    parser.add_argument("--seed", type=int, default=1337)
    parser.add_argument("--until")
    parser.add_argument("--env", nargs="*", default=[], metavar="KEY=VALUE")
    asked = parser.parse_args()
    folder = (asked.out / asked.name).resolve()
    dataset, places = linked(asked.data, folder / "data")
    print(f"val sha256 {dataset.manifest.val_sha256}", flush=True)
    environment = os.environ | places | {
        "MAX_WALLCLOCK_SECONDS": str(asked.seconds),
        "TRAIN_BATCH_TOKENS": str(asked.batch),
        "TRAIN_SEQ_LEN": str(asked.seq_len),
        "SEED": str(asked.seed),
        "RUN_ID": asked.name,
    }  # fmt: skip
    environment |= dict(setting.split("=", 1) for setting in asked.env)
    if find_spec("flash_attn_interface") is None:
        environment["PYTHONPATH"] = os.pathsep.join([str(_STAND_INS), *filter(None, [os.environ.get("PYTHONPATH")])])
    log = asked.out / f"{asked.name}.log"
    began = time.monotonic()
    status = run([sys.executable, str(asked.script.resolve())], environment, folder, log, asked.until)
    seconds = time.monotonic() - began
    said = log.read_text()
    if status:
        sys.exit(f"exit {status}; {log} ends with\n{said[-2000:]}")
    rate = rate_of(said, asked.batch)
    print(
        f"{asked.name}: {'no step logged' if rate is None else f'{rate / 1e6:.3f}M tokens/s'}, validations "
        f"{curve_of(said)}, {seconds:.0f} s in all" + (" up to the line asked for" if status is None else "")
    )


if __name__ == "__main__":
    main()
