"""The packaged recipe ``chain``: a small student by way of an intermediate one, on the quickstart's task."""

from edgedistill.recipes.quickstart import TASK

TAKES = {"quickstart": TASK}
