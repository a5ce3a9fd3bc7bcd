"""Classifiers on frozen features: linear probes, logistic regression, nearest neighbours, and what they predict.

`probes` and `predictions` read and write files with numpy alone; `training`, `heads` and `neighbours` compute with torch. It
may import `regvit.files`, `data`, `features` and `stats`; no model is opened here.
"""
