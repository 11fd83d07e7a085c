"""The packaged recipe ``code``: small Python functions, judged by running them with hidden tests."""
