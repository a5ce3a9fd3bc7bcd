"""SPair-71k (Min et al. 2019, arXiv:1908.10543): pairs of photographs of one category with matching keypoints.

`spair:<SPair-71k>` reads in place what the archive unpacks to:

    JPEGImages/<category>/<image>.jpg
    Layout/large/test.txt                     12,234 names <number>-<image>-<image>:<category>
    PairAnnotation/test/<name>.json           src_imname, trg_imname, src_kps, trg_kps, trg_bndbox, category

Every image of the test pairs is a test row. A match is right within 0.1 of the longer side of the second object's box
(PCK@0.1). Keypoints are numbers of pixels, so their middles lie half a pixel further.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from regvit.data.correspondences import Pair, write_pairs
from regvit.data.dataset_builder import DatasetBuilder
from regvit.data.manifest import Row

ALPHA = 0.1  # of the box's longer side


def spair(builder: DatasetBuilder, rest: str) -> None:
    """Builds the source `spair:<folder>`; a pair of which an image cannot be used is left out and counted.

    Raises:
        FileNotFoundError: the list of pairs, or the annotation of one, is missing.
        ValueError: a pair has another number of keypoints in one image than in the other.
    """
    root = Path(rest).expanduser()
    builder.refuse_classes()
    builder.credit_to(
        "images",
        "SPair-71k, cvlab.postech.ac.kr",
        "for research and education only",
        "Min et al. 2019, arXiv:1908.10543",
    )
    listed = root / "Layout/large/test.txt"
    if not listed.is_file():
        raise FileNotFoundError(f"there is no {listed}: give the folder SPair-71k that the archive unpacks to")
    pairs, rows = [], {}
    for name in listed.read_text(encoding="utf-8").split():
        path = root / f"PairAnnotation/test/{name}.json"
        if not path.is_file():
            raise FileNotFoundError(f"there is no {path}, which {listed} names: unpack the archive again")
        about = json.loads(path.read_text(encoding="utf-8"))
        if len(about["src_kps"]) != len(about["trg_kps"]) or not about["src_kps"]:
            raise ValueError(
                f"{path} has {len(about['src_kps'])} and {len(about['trg_kps'])} keypoints, expected as many of both"
            )
        ids = []
        for image in (about["src_imname"], about["trg_imname"]):
            ids.append(f"{about['category']}_{Path(image).stem}")
            rows[ids[-1]] = Row(ids[-1], f"JPEGImages/{about['category']}/{image}", "", "test")
        x0, y0, x1, y1 = about["trg_bndbox"]
        points = np.concatenate([about["src_kps"], about["trg_kps"]], axis=1) + 0.5
        pairs.append(Pair(*ids, points, about["category"], ALPHA * max(x1 - x0, y1 - y0)))
    builder.read_in_place(root, builder.limit(sorted(rows.values(), key=lambda row: row.image_id)))
    there = set(builder.rows.rows().column("image_id"))
    whole = [pair for pair in pairs if {pair.first, pair.second} <= there]
    if len(whole) < len(pairs):
        builder.left_out["pairs of which an image is not there"] += len(pairs) - len(whole)
    write_pairs(builder.folder, whole)
