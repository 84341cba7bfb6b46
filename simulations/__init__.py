"""Federations on one machine, running the production code; scenarios, baselines and reports."""
