"""The packaged recipe ``chain``: a small student by way of an intermediate one, on the quickstart's task."""

TAKES = {
    "quickstart": (
        "data/train.jsonl",
        "data/drills.jsonl",
        "data/lists.jsonl",
        "data/dev.jsonl",
        "data/dev-ood.jsonl",
        "data/holdout.jsonl",
        "data/ood.jsonl",
    ),
}
