"""The quickstart recipe: its task, its data and the generator that made them."""

TASK = (
    "data/train.jsonl",
    "data/drills.jsonl",
    "data/lists.jsonl",
    "data/dev.jsonl",
    "data/dev-ood.jsonl",
    "data/holdout.jsonl",
    "data/ood.jsonl",
)
"""What other recipes on its task take."""
