"""Statistics without a model: accuracies and anomaly metrics, one bootstrap, intervals and p-values, mIoU, boxes, figures.

Numbers in, numbers out: no torch (`compare` and `summary` read predictions with it), no file but tables of figures. It may
import `regvit.files` and `regvit.data.manifest`.
"""
