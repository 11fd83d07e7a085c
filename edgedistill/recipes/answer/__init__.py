"""The packaged recipe ``answer``: the teacher's text alone, on the quickstart's task."""

from edgedistill.recipes.quickstart import TASK

TAKES = {"quickstart": TASK}
