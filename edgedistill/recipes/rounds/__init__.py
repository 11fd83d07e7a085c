"""The packaged recipe ``rounds``: the student learns from its own right answers, then from new ones to what it fails."""

from edgedistill.recipes.quickstart import TASK

TAKES = {"quickstart": TASK}
