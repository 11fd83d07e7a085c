"""The packaged recipe ``draft``: a small model that writes ahead of the quickstart's student."""

TAKES = {
    "quickstart": (
        "data/train.jsonl",
        "data/drills.jsonl",
        "data/lists.jsonl",
        "data/dev.jsonl",
        "data/dev-ood.jsonl",
        "data/holdout.jsonl",
        "data/ood.jsonl",
        "data/general.jsonl",
    ),
}
