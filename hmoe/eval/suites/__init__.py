"""Task groups of lm_eval that name the papers' benchmarks: YAML files, and this, which has them packaged."""
