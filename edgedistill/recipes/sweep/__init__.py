"""The packaged recipe ``sweep``: which settings are worth it, on the quickstart's task."""

TAKES = {
    "quickstart": (
        "data/train.jsonl",
        "data/drills.jsonl",
        "data/lists.jsonl",
        "data/dev.jsonl",
        "data/holdout.jsonl",
    ),
}
