"""The packaged recipe ``think``: word problems, solved step by step before the answer."""
