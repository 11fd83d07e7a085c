"""The packaged recipe ``pocket``: the quickstart's task in a tenth of the teacher's size, every way of shaping at once."""

from edgedistill.recipes.quickstart import TASK

TAKES = {"quickstart": (*TASK, "data/general.jsonl")}
