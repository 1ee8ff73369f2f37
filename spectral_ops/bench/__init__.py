"""The benchmark: what it measures, how, and the results files it keeps. ``python -m spectral_ops bench`` runs it."""
