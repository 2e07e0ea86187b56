"""Evaluation: lm_eval on the suites of the papers, offline benchmark items, and analyses of the routing."""
