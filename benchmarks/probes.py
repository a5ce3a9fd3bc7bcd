"""Heads trained together against heads trained one by one: `python -m benchmarks.probes`.

Forty heads, 4 readouts × 10 learning rates, on made-up features of the shape of a ViT-S data set. Both ways run in turn in
one process, so that a loaded machine slows both alike, and CPU seconds are taken (on a GPU: seconds); the ratio is the
median over the rounds. It also holds the weights of both against each other: batching must change nothing but the time.
Prints a line a round; `--out` writes JSON.

With few classes what a step costs besides its products is shared by all heads; with many (--classes 100) the products
dominate, which are as large either way.
"""

import argparse
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from benchmarks.machine import ROUNDS, in_turn, in_words, save
from regvit.probing.probes import ProbeSet
from regvit.probing.splits import Split
from regvit.probing.training import Settings, train_probes

READOUTS = {"cls": 1, "patch_mean": 1, "cls_reg": 2, "cls_patch": 2}  # width in tokens
RATES = (1e-4, 3e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 3e-2, 5e-2, 1e-1)
WANTED = 4.0  # times as fast, on a CPU with 10 classes
TOLERANCE = 1e-3  # of the largest weight; float32 sums in another order


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=4096)
    parser.add_argument("--channels", type=int, default=384, help="of a token")
    parser.add_argument("--classes", type=int, default=10)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, help="JSON; default: none")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)

    row, difference = compare(given, given.rounds, print)
    result = {
        "rows": [row],
        "largest_relative_difference_of_weights": difference,
        "settings": {key: value for key, value in vars(given).items() if key != "out"},
    }
    save(given.out, result)
    print(f"{row['name']}: {in_words(row)} times as fast (wanted {WANTED:g}); {row['detail']}; "
          f"their weights differ by at most {difference:.1e}")  # fmt: skip


def measure(quick: bool = False) -> list[dict]:
    """Rows of the table of all benchmarks: 40 heads together against one by one."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    given = argparse.Namespace(images=256 if quick else 4096, channels=32 if quick else 384, classes=10,
                               steps=3 if quick else 100, device=device)  # fmt: skip
    return [compare(given, 1 if quick else ROUNDS)[0]]


def compare(
    given: argparse.Namespace, rounds: int, say: Callable[[str], None] = lambda line: None
) -> tuple[dict, float]:
    """The row of the table, and the largest relative difference between the weights of both ways.

    Raises:
        SystemExit: that is over TOLERANCE.
    """
    data, found = features(given.images, given.channels, given.classes), {}

    def together() -> None:
        found["together"] = [train(data, given, list(READOUTS), list(RATES))]

    def one_by_one() -> None:
        found["one by one"] = [train(data, given, [name], [rate]) for name in READOUTS for rate in RATES]

    times = in_turn(together, one_by_one, rounds, given.device, say)
    difference = largest_difference(*found.values())
    if difference > TOLERANCE:
        raise SystemExit(f"the weights differ by {difference:.1e}, expected at most {TOLERANCE:g}")
    heads = f"{len(READOUTS) * len(RATES)} heads"
    detail = f"{heads}, {given.images:,} images, {given.channels} channels, {given.classes} classes, {given.device}"
    return times.row("probes together / one by one", WANTED, detail), difference


def features(n: int, channels: int, classes: int) -> tuple:
    """Overlapping classes; every readout is [a, b, …] of tokens with the class in each."""
    rng = np.random.default_rng(0)
    labels = rng.integers(classes, size=n)
    centres = rng.normal(size=(classes, channels)).astype(np.float32) * 0.1

    def token() -> np.ndarray:
        return centres[labels] + rng.normal(size=(n, channels)).astype(np.float32)

    values = {name: np.concatenate([token() for _ in range(width)], axis=1) for name, width in READOUTS.items()}
    return values, labels, tuple(map(str, range(classes)))


def train(data: tuple, given: argparse.Namespace, names: list[str], rates: list[float]) -> ProbeSet:
    values, labels, classes = data
    chosen = {name: values[name] for name in names}
    few = Split({name: part[:64] for name, part in chosen.items()}, labels[:64])
    return train_probes(Split(chosen, labels), few, classes, Settings(tuple(rates), given.steps), given.device)


def largest_difference(together: list[ProbeSet], one_by_one: list[ProbeSet]) -> float:
    """Of the weights of the heads that were chosen, to the largest weight."""
    (both,), differences = together, []
    for name, (probe,) in both.probes.items():
        own = next(each.probes[name][0] for each in one_by_one
                   if name in each.probes and each.probes[name][0].learning_rate == probe.learning_rate)  # fmt: skip
        differences.append(float(np.abs(probe.weight - own.weight).max() / np.abs(own.weight).max()))
    return max(differences)


if __name__ == "__main__":
    main()
