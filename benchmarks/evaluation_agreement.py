"""How far whole evaluations of one model lie apart, over batch sizes and numbers of processes.

    python -m benchmarks.evaluation_agreement MODEL --data DIR [--device cuda] [--stride 64 --context 2048]

Each evaluation is the verb in processes of its own, under torchrun where there are two (they may share one GPU).
Expected: 1e-6 BPB apart at most in float32 on a CPU, 1e-4 in bfloat16 on a GPU, where the shape of a batch decides
in which order matrix products add up; sums over tokens themselves differ by 1e-9 at most (see the tests).
Exits with 1 if the bound of the device is not held. The last column is the pass itself: not loading, not compiling.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

from trainer.report import EvaluateResult, read_result

BATCH_TOKENS = (16_384, 65_536, 262_144)
BOUNDS = {"float32": 1e-6, "bfloat16": 1e-4}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="An artifact, or a model.pt.")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    parser.add_argument("--batch-tokens", type=int, nargs="+", default=list(BATCH_TOKENS))
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--stride", type=int, help="Sliding windows too, each so many tokens further.")
    parser.add_argument("--context", type=int, help="Tokens of a sliding window; default: as in training.")
    asked = parser.parse_args()
    sliding = [] if asked.stride is None else ["--stride", str(asked.stride)]
    if asked.context is not None:
        sliding += ["--context", str(asked.context)]
    command = ["evaluate", str(asked.model.resolve()), "--data", str(asked.data.resolve()), "--device", asked.device]

    held = True
    for windows in [[], sliding] if sliding else [[]]:
        results = [
            (batch_tokens, ranks, _evaluate([*command, *windows, "--batch-tokens", str(batch_tokens)], ranks))
            for batch_tokens in asked.batch_tokens
            for ranks in asked.ranks
        ]
        held &= _report(results)
    sys.exit(0 if held else 1)


def _evaluate(command: list[str], ranks: int) -> EvaluateResult:
    launcher = [] if ranks == 1 else ["torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks), "-m"]
    with tempfile.TemporaryDirectory() as out:
        subprocess.run(
            [sys.executable, "-m", *launcher, "trainer", *command, "--out", out],
            check=True,
            stdout=subprocess.DEVNULL,
            cwd=Path(__file__).resolve().parents[1],
        )
        result = read_result(Path(out) / "result.json")
    assert isinstance(result, EvaluateResult)
    assert result.world_size == ranks
    return result


def _report(results: list[tuple[int, int, EvaluateResult]]) -> bool:
    first = results[0][2]
    windows = f"sliding, stride {first.stride}" if first.metric == "sliding" else "plain"
    print(f"{windows}, context {first.context}, {first.val_tokens} tokens, {first.compute_dtype} on {first.device}")
    print(f"{'batch tokens':>12} {'ranks':>5} {'val_bpb':>12} {'from first':>10} {'seconds':>8}")
    for batch_tokens, ranks, result in results:
        apart = result.val_bpb - first.val_bpb
        print(f"{batch_tokens:>12} {ranks:>5} {result.val_bpb:>12.8f} {apart:>10.1e} {result.scoring_seconds:>8.2f}")
    scores = [result.val_bpb for _, _, result in results]
    bound = BOUNDS[first.compute_dtype or "bfloat16"]
    largest = max(scores) - min(scores)
    print(f"largest difference {largest:.2e} BPB, bound {bound:g}\n")
    return largest <= bound


if __name__ == "__main__":
    main()
