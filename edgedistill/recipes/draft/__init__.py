"""The packaged recipe ``draft``: a small model that writes ahead of the quickstart's student."""

from edgedistill.recipes.quickstart import TASK

TAKES = {"quickstart": (*TASK, "data/general.jsonl")}
