"""Runs that are killed, hindered and fed with damaged files, at random: ``python -m tests.torture --help``."""
