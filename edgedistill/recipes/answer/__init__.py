"""The packaged recipe ``answer``: the teacher's text alone, on the quickstart's task."""

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
