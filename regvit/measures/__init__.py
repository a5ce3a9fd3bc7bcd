"""What a run is measured by, one file a measurement. May import `regvit.files`, `data`, `models`, `registers`, `features`,
`stats` and `probing`; never `report`.

`tokens` (anatomy, token_probes), `attention`, `discover`, `segment` and `depth` read what one forward kept
(`regvit.features.dense_set`) and import no timm; identification, verification and zeroshot have forwards of their own.
Each leaves `figures.csv`, a row a figure, and `images.csv`, a value an image by which runs are paired (`tables`):

| stage | file | metrics, besides their variants |
|---|---|---|
| `identify` | identification | outliers_found, layer, threshold, outlier_fraction, `_after` (one register), `_ablated`, `_empty`, `_random`, register_neurons, explained; where planted precision, recall |
| `evaluate` | evaluation, prediction, detectors | top1, auroc, fpr95, fpr95_ood_positive, aupr_in, aupr_out |
| `verify` | verification | outlier_fraction, own_outlier_fraction, cls_attention_on_outliers, cls_attention_on_registers; where planted cls_cosine, patch_cosine, outlier_patch_cosine |
| `tokens` | anatomy, token_probes | outlier_fraction, neighbour_similarity, outlier_on_low_information, position_top1, position_distance and pixels_l2, each `_normal`, `_outlier`, `_difference` |
| `token_classes` | token_classes | class_top1 of each kind of token; register_cosine |
| `attention` | attention_quality, register_pairs | on_outliers, on_registers, largest, entropy, morans_i, distance_correlation, object_auroc, register_overlap |
| `discover` | dense/discovery | corloc (of the chosen setting), corloc_mean (over features), corloc_`<feature>`, corloc_published, corloc_dino_seg |
| `segment` | dense/segmentation, dense/dense_heads | miou, miou_by_image, pixel_accuracy, pixel_accuracy_at_outliers |
| `depth` | dense/depth, dense/dense_heads | rmse, abs_rel, delta1, …, rmse_at_outliers |
| `hummingbird` | training_free/hummingbird | miou, miou_by_image, pixel_accuracy, pixel_accuracy_at_outliers |
| `correspond` | training_free/correspondence | pck, pck_at_outliers, pck_by_pair |
| `retrieve` | training_free/retrieval | map_`<readout>`, recall`<k>`_`<readout>` |
| `discover_published` | training_free/published_discovery, token_cut | corloc_lost, corloc_dino_seg, corloc_token_cut |
| `zeroshot_segment` | training_free/zeroshot_segmentation, clip_patches | miou (of the first foil), miou_`<foil>`, pixel_accuracy_`<foil>`; of objects ap |
| `zeroshot` | zeroshot | top1, top5, gain |
"""
