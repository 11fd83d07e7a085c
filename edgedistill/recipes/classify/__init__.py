"""The packaged recipe ``classify``: messages to a shop, each into one of seven queues, some of which nobody could be sure of."""
