"""The packaged recipe ``rationale``: Distilling Step-by-Step, on the word problems of ``think``."""

TAKES = {"think": ("data/train.jsonl", "data/dev.jsonl", "data/holdout.jsonl", "data/ood.jsonl")}
