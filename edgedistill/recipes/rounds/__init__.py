"""The packaged recipe ``rounds``: the student learns from its own right answers, then from new ones to what it fails."""

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
