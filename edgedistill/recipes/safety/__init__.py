"""The packaged recipe ``safety``: an assistant on a phone that helps, refuses a few kinds of harm, and asks back in doubt."""
