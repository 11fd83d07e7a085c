"""The packaged recipe ``reasoning``: problems of reasoning-gym, thought through, judged by their verifiers."""
