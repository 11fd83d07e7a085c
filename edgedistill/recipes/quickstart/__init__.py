"""The quickstart recipe: its task, its data and the generator that made them."""
