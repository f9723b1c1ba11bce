"""The command line, thin over ``stages`` and ``hub``: nothing heavy is imported before a verb is known."""
