"""HGQ2 on the MAGIC table: the peer of `benchmarks/fpga.py --parts magic`, in an environment of its own.

    pip install HGQ2 keras torch
    KERAS_BACKEND=torch python benchmarks/fpga_hgq2.py --data DIR --epochs 110

The same network and data, HGQ2's defaults, the strength of its penalty raised evenly in its logarithm. One
JSON object a line for each point of the front: accuracy, and EBOPs as HGQ2 counts them.
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path

os.environ.setdefault("KERAS_BACKEND", "torch")

import keras
import numpy as np
import torch
from hgq.config import LayerConfigScope, QuantizerConfigScope
from hgq.layers import QDense
from hgq.utils import trace_minmax
from hgq.utils.sugar import BetaScheduler


def read_table(path: Path) -> tuple[np.ndarray, np.ndarray]:
    rows = [line.split(",") for line in path.read_text().split()[1:]]
    x = np.array([[float(v) for v in row[:-1]] for row in rows], np.float32)
    return x, np.array([int(row[-1] == "h") for row in rows])


def network() -> keras.Model:
    with (
        QuantizerConfigScope(place="all", default_q_type="kbi", overflow_mode="SAT_SYM"),
        QuantizerConfigScope(place="datalane", default_q_type="kif", overflow_mode="WRAP"),
        LayerConfigScope(enable_ebops=True, beta0=1e-6),
    ):
        layers = [keras.layers.Input((10,)), *(QDense(n, activation="relu") for n in (64, 32, 32)), QDense(2)]
        return keras.Sequential(layers)


class Front(keras.callbacks.Callback):
    """Accuracy and EBOPs after each epoch."""

    def __init__(self, x: np.ndarray, x_test: np.ndarray, y_test: np.ndarray) -> None:
        super().__init__()
        self.x, self.x_test, self.y_test = x, x_test, y_test
        self.points: list[tuple[int, float, int]] = []

    def on_epoch_end(self, epoch: int, logs: object = None) -> None:
        cost = int(trace_minmax(self.model, self.x, batch_size=4096))
        guess = np.asarray(self.model.predict(self.x_test, batch_size=4096, verbose=0)).argmax(1)
        self.points.append((epoch + 1, 100 * float((guess == self.y_test).mean()), cost))

    def best(self) -> list[tuple[int, float, int]]:
        """Cheapest first, each more accurate than all that are cheaper."""
        found: list[tuple[int, float, int]] = []
        for point in sorted(self.points, key=lambda p: (p[2], -p[1])):
            if not found or point[1] > found[-1][1]:
                found.append(point)
        return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True, help="folder with magic/")
    parser.add_argument("--epochs", type=int, default=110)
    parser.add_argument("--strength", nargs=2, type=float, default=(1e-7, 1e-4), help="beta, first and last")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    keras.utils.set_random_seed(options.seed)
    x, y = read_table(options.data / "magic" / "magic_gamma_train.csv")
    x_test, y_test = read_table(options.data / "magic" / "magic_gamma_test.csv")
    mean, deviation = x.mean(0), x.std(0)
    x, x_test = (x - mean) / deviation, (x_test - mean) / deviation
    x, y = x[len(x) // 5 :], y[len(x) // 5 :]  # as many samples as the other networks see
    model = network()
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.Adam(2e-3), loss=loss)
    first, last = options.strength
    beta = BetaScheduler(lambda epoch: first * (last / first) ** (epoch / max(1, options.epochs - 1)))
    front = Front(x, x_test, y_test)
    model.fit(x, y, batch_size=256, epochs=options.epochs, callbacks=[beta, front], verbose=0)
    for epoch, accuracy, cost in front.best():
        print(json.dumps({"network": f"HGQ2, epoch {epoch}", "accuracy %": accuracy, "EBOPs": cost}))


if __name__ == "__main__":
    main()
