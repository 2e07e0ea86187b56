"""Evaluation: lm_eval on the suites of the papers, and analyses of the routing."""
