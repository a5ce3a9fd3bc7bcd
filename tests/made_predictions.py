"""Data sets, features and probes that are made up so that their answers are known."""

import numpy as np

from regvit.data.manifest import Dataset, Row
from regvit.features.readouts import InMemory
from regvit.measures.prediction import Measured
from regvit.probing.probes import Baselines, Neighbours, Probe, ProbeSet

CLASSES = ("ant", "bee", "cat")
CENTRES = np.random.default_rng(0).normal(size=(3, 6))


def made_set(name, role, counts, shift=0.0, classes=CLASSES, seed=0):
    """A data set whose CLS tokens lie about the centres of their classes, with two registers that are CLS and noise."""
    rng = np.random.default_rng([seed, len(name)])
    rows, cls = [], []
    for split, count in counts.items():
        for i in range(count):
            label = classes[i % len(classes)] if role != "anomaly" else ""
            rows.append(Row(f"{split}{i}", f"{i}.png", label, split))
            centre = CENTRES[CLASSES.index(label)] if label in CLASSES else 3 * rng.normal(size=6)
            cls.append(centre + shift + 0.8 * rng.normal(size=6))
    cls = np.array(cls, dtype=np.float32)
    registers = np.stack([cls, rng.normal(size=cls.shape).astype(np.float32)], axis=1)
    dataset = Dataset(name, None, () if role == "anomaly" else classes, tuple(rows), name[0] * 64)
    return Measured(dataset, role, InMemory({"cls": cls, "registers": registers}))


def all_sets(seed=0):
    home = made_set("home", "id", {"train": 90, "val": 6, "test": 60}, seed=seed)
    away = made_set("away", "ood", {"train": 5, "test": 45}, 0.5, ("cat", "bee", "ant"), seed)
    far = made_set("far", "ood", {"test": 30}, 1.0, ("cat", "ant"), seed)
    anomalies = {
        name: made_set(name, "anomaly", {"test": count}, seed=seed) for name, count in [("alien", 40), ("noise", 25)]
    }
    return {"home": home, "away": away, "alien": anomalies["alien"], "far": far, "noise": anomalies["noise"]}


def made_probes(seeds=3):
    """Probes as good as the centres allow, a little different for each seed; one readout pools its registers."""
    rng = np.random.default_rng(1)

    def probe(name, repeat, seed, pool=None):
        weight = np.tile(CENTRES, (1, repeat)).astype(np.float32) + rng.normal(0, 0.1, (3, 6 * repeat)).astype(
            np.float32
        )
        bias = (-0.5 * repeat * (CENTRES**2).sum(1)).astype(np.float32)
        return Probe(name, weight, bias, 5, 0.1, seed, pool=pool, n_registers=0 if pool is None else len(pool))

    probes = {
        "cls": tuple(probe("cls", 1, s) for s in range(seeds)),
        "cls_reg_learned": tuple(
            probe("cls_reg_learned", 2, s, np.array([1.0 + s, -1.0], dtype=np.float32)) for s in range(seeds)
        ),
    }
    baselines = Baselines({"cls": probe("cls", 1, None)}, {"cls": Neighbours(7, 0.07, 5)}, CLASSES, 90, 6)
    return ProbeSet(probes, CLASSES, {}, 90, 6), baselines


def is_test(sets):
    return [row.split == "test" for row in sets.dataset.rows]
