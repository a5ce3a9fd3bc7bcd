"""How figures are shown: label with its unit, digits, and which direction is better. One entry a metric, in the order of the
tables; a figure without an entry is not in them (it is in `metrics/compare/figures.csv`)."""

from __future__ import annotations

from typing import NamedTuple

HIGHER, LOWER, NEITHER = 1, -1, 0


class Metric(NamedTuple):
    """One figure.

    Args:
        label: with the unit.
        better: 1 where more is better, −1 where less is, 0 where neither is.
        scale: what the value is multiplied by, 100 for per cent.
        digits: after the point.
        glance: whether it has a row in the first table, and under which label.
    """

    label: str
    better: int = HIGHER
    scale: float = 100
    digits: int = 1
    glance: str = ""


METRICS: dict[str, dict[str, Metric]] = {
    "verify": {
        "outlier_fraction": Metric("outlier patches, %", LOWER, 100, 3, "outlier patches, %"),
        "cls_cosine": Metric("CLS cosine", HIGHER, 1, 3, "CLS cosine to the unplanted model"),
        "patch_mean_cosine": Metric("patch_mean cosine", HIGHER, 1, 3),
        "patch_cosine": Metric("patch cosine", HIGHER, 1, 3),
        "outlier_patch_cosine": Metric("outlier patch cosine", HIGHER, 1, 3),
        "cls_attention_on_outliers": Metric("CLS attention on outliers, %", LOWER),
        "cls_attention_on_registers": Metric("on registers, %", NEITHER),
        "found_neurons": Metric("of the found neurons, %", NEITHER, 100, 0),
    },
    "attention": {
        "entropy": Metric("entropy, nats", NEITHER, 1, 2, "entropy of CLS attention, nats"),
        "on_outliers": Metric("on outliers, %", LOWER, glance="CLS attention on outliers, %"),
        "on_registers": Metric("on registers, %", NEITHER, glance="CLS attention on registers, %"),
        "on_cls": Metric("on CLS, %", NEITHER),
        "largest": Metric("largest weight, %", NEITHER, glance="largest weight of CLS attention, %"),
        "morans_i": Metric("coherence (Moran's I)", HIGHER, 1, 3, "coherence of CLS attention"),
        "object_mass": Metric("on objects, %", HIGHER),
        "object_auroc": Metric("object AUROC, %", HIGHER, glance="object AUROC of CLS attention, %"),
        "register_overlap": Metric("overlap of registers' maps, %", NEITHER),
        "all_entropy": Metric("all queries: entropy, nats", NEITHER, 1, 2),
        "all_largest": Metric("all queries: largest weight, %", NEITHER),
        "all_coherence": Metric("all queries: correlation with distance", NEITHER, 1, 3),
    },
    "tokens": {
        "outlier_fraction": Metric("patches that are outliers, %", LOWER, 100, 2),
        "untreated_outlier_fraction": Metric("in the backbone without registers, %", NEITHER, 100, 2),
        "outlier_on_border": Metric("of them on the border, %", NEITHER),
        "neighbour_similarity_outlier": Metric("cosine to neighbours, outlier", NEITHER, 1, 3),
        "neighbour_similarity_normal": Metric("cosine to neighbours, normal patch", NEITHER, 1, 3),
        "outlier_on_low_information": Metric("outliers among the quarter of least information, %", NEITHER),
        "ashman_d": Metric("two modes of log norms apart (Ashman's D; > 2: two)", NEITHER, 1, 1),
        "appears_in_layer": Metric("outliers appear in block", NEITHER, 1, 0),
        "position_top1_normal": Metric("position, normal patch, top-1 %", glance="position, normal patch, top-1 %"),
        "position_top1_outlier": Metric("position, outlier patch, top-1 %", glance="position, outlier patch, top-1 %"),
        "pixels_l2_normal": Metric("pixels, normal patch, L2 error", LOWER, 1, 2, "pixels, normal patch, L2 error"),
        "pixels_l2_outlier": Metric("pixels, outlier patch, L2 error", LOWER, 1, 2, "pixels, outlier patch, L2 error"),
    },
    "token_classes": {
        "class_top1_cls": Metric("CLS"),
        "class_top1_register": Metric("register"),
        "class_top1_normal": Metric("normal patch"),
        "class_top1_normal_beside": Metric("normal patch of images with outliers"),
        "class_top1_outlier": Metric("outlier patch"),
        **{f"class_top1_register_{i}": Metric(f"register {i}") for i in range(8)},
        "register_cosine": Metric("cosine between registers", NEITHER, 1, 3),
    },
    "discover": {
        "corloc": Metric("chosen setting", glance="CorLoc of the chosen setting, %"),
        "corloc_mean": Metric("mean over features", glance="CorLoc, mean over all features, %"),
        "corloc_k": Metric("k"),
        "corloc_q": Metric("q"),
        "corloc_v": Metric("v"),
        "corloc_token": Metric("token"),
        "corloc_published": Metric("published setting"),
        "corloc_dino_seg": Metric("box of CLS attention"),
        "corloc_token_cut": Metric("TokenCut"),
        "corloc_token_cut_published": Metric("TokenCut, published τ"),
    },
    "discover_published": {
        "corloc_lost": Metric("LOST", glance="CorLoc of LOST as published, %"),
        "corloc_dino_seg": Metric("DINO-seg"),
        "corloc_token_cut": Metric("TokenCut", glance="CorLoc of TokenCut as published, %"),
    },
    "segment": {
        "miou": Metric("mIoU, %", glance="segmentation mIoU, %"),
        "miou_by_image": Metric("mIoU by image, %", glance="segmentation mIoU by image, %"),
        "pixel_accuracy": Metric("pixel accuracy, %", glance="pixel accuracy, %"),
        "pixel_accuracy_at_outliers": Metric("at outliers, %", glance="pixel accuracy at outliers, %"),
        "pixel_accuracy_elsewhere": Metric("elsewhere, same images, %"),
    },
    "depth": {
        "rmse": Metric("RMSE, m", LOWER, 1, 3, "depth RMSE, m"),
        "rmse_at_outliers": Metric("at outliers, m", LOWER, 1, 3, "depth RMSE at outliers, m"),
        "rmse_elsewhere": Metric("elsewhere, same images, m", LOWER, 1, 3),
        "abs_rel": Metric("relative error, %", LOWER),
        "delta1": Metric("δ < 1.25, %", HIGHER),
    },
    "hummingbird": {
        "miou": Metric("mIoU, %", glance="segmentation in context, mIoU, %"),
        "miou_by_image": Metric("mIoU by image, %"),
        "pixel_accuracy": Metric("pixel accuracy, %", glance="in context, pixel accuracy, %"),
        "pixel_accuracy_at_outliers": Metric("at outliers, %", glance="in context, pixel accuracy at outliers, %"),
        "pixel_accuracy_elsewhere": Metric("elsewhere, same images, %"),
    },
    "correspond": {
        "pck": Metric("points found, %", glance="points found in another view, %"),
        "pck_at_outliers": Metric("at outliers, %", glance="points found in another view, at outliers, %"),
        "pck_elsewhere": Metric("elsewhere, same images, %"),
        "pck_by_pair": Metric("by pair, %"),
    },
    "retrieve": {
        f"{name}_{readout}": Metric(
            f"{label}, {readout}, %", glance=f"retrieval, {label} from {readout}, %" if name == "map" else ""
        )
        for readout in ("cls", "reg_mean", "patch_mean")
        for name, label in (("map", "mAP"), ("recall1", "recall@1"), ("recall5", "recall@5"), ("recall10", "recall@10"))
    },
    "zeroshot": {
        "top1": Metric("top-1, %", glance="zero-shot top-1, %"),
        "top5": Metric("top-5, %"),
        "untreated_top1": Metric("untreated top-1, %"),
        "gain": Metric("gain, points", HIGHER),
    },
    "zeroshot_segment": {
        "miou": Metric("mIoU, %", glance="zero-shot segmentation mIoU, %"),
        **{f"miou_{foil}": Metric(f"mIoU, {foil}, %") for foil in ("plain", "qq", "kk_gaussian", "qq_kk")},
        "pixel_accuracy_plain": Metric("pixel accuracy, %"),
        "pixel_accuracy_objects": Metric("pixel accuracy, %", glance="object or background, pixel accuracy, %"),
        "ap": Metric("AP, %", glance="object or background, AP, %"),
    },
    "evaluate": {
        "top1": Metric("top-1, %", glance="top-1 from {readout}, %"),
        "auroc": Metric("AUROC, %"),
        "fpr95": Metric("FPR95, %", LOWER),
    },
    "identify": {
        "outlier_fraction": Metric("untreated", LOWER, 100, 2),
        "outlier_fraction_after": Metric("one register", LOWER, 100, 2),
        "outlier_fraction_ablated": Metric("neurons silenced", LOWER, 100, 2),
        "outlier_fraction_empty": Metric("empty register", NEITHER, 100, 2),
        "outlier_fraction_random": Metric("random neurons moved", NEITHER, 100, 2),
    },
}
